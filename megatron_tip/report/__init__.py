"""How a run looks: report.png, and the page of `megatron-tip report`."""

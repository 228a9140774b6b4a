"""Reports of a run: report.png, and the page of `megatron-tip report`."""

"""The training run: set-up, the stages of a step, the held-out measurement and the loop."""

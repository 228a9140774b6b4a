"""The training run: set-up, one step as named stages, held-out measurement, the loop."""

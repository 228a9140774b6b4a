"""Checkpoints of a run: its state on disk, the writing of it, and the restoring of a run."""

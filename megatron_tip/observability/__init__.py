"""What a run tells: its folder, metrics, timings, progress, log and report."""

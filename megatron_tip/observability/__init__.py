"""Observability of a run: its folder, metrics, timings, traces, progress and log."""

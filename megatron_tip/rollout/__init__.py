"""Prompts, engines that generate, and the way from rollouts to micro-batches."""

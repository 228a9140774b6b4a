"""Rollouts: the engines that generate them, their formats, and their way to the ranks."""

"""Benchmarks of a trained student: `megatron-tip eval`."""

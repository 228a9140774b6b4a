"""Rollouts as micro-batches over data-parallel replicas."""

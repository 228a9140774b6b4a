"""Weights handed over in buckets: packing, memory that other processes open, and the part of each rank."""

"""What gains and scores of a bank say: bootstrap intervals, matched gaps, regressions, buckets. Needs no models."""

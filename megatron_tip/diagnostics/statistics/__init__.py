"""Statistics of a bank's gains and scores: bootstrap intervals, matched gaps, regressions, buckets. Needs no models."""

"""Sweeps: many runs of one recipe with different settings, ranked by a metric (``t2idist sweep``)."""

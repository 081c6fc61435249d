"""Ahead-of-time compilation for TPU slices: whether it fits, what it sends, how fast it can run."""

"""Ahead-of-time compilation for TPU slices: does it fit, what does it send, how fast can it run."""

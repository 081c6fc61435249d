"""Ahead-of-time compilation for TPU slices: memory, communication, and a bound on the speed."""

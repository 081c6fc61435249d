"""The host side of a run: what happens around the sampler and the trainer."""

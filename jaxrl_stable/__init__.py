"""Stable reinforcement learning of Mixture-of-Experts language models in JAX."""

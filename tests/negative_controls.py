"""Deliberate mistakes, which tests must be able to detect."""

import dataclasses

import jax.numpy as jnp


def shift(routing, offset):
    """Moves every choice by `offset` positions, as a wrong alignment would."""
    return dataclasses.replace(routing, experts=jnp.roll(routing.experts, offset, axis=2))

"""Paths between noise (t = 0) and data (t = 1): the state that a network sees, and its velocity.

A path is a value with the three methods of `Path`. To add one, write a class here or in a file beside this one, and add
a line to `PATHS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
import ml_collections

from deco_jax.method.point import MIN_REMAINING_TIME, Point, per_example
from deco_jax.shapes import Images, Times


class Path(Protocol):
    """How noise becomes an image; all images are [batch, height, width, 3] in float32, times [batch] in [0, 1]."""

    def point(self, x: Images, noise: Images, t: Times) -> Point:
        """Return state and velocity at t of the paths from `noise` to the images `x`."""
        ...

    def velocity_of(self, x: Images, state: Images, t: Times, floor: float = MIN_REMAINING_TIME) -> Images:
        """Return the velocity that a predicted image `x` implies at a state; 1 − t counts as at least `floor`."""
        ...

    def image_of(self, velocity: Images, state: Images, t: Times) -> Images:
        """Return the image that a predicted velocity leads to from a state, x̂."""
        ...


class LinearPath:
    """The straight line x_t = t·x + (1 − t)·ε, whose velocity x − ε does not depend on t."""

    def point(self, x: Images, noise: Images, t: Times) -> Point:
        t = per_example(t, x)
        return Point(t * x + (1 - t) * noise, x - noise)

    def velocity_of(self, x: Images, state: Images, t: Times, floor: float = MIN_REMAINING_TIME) -> Images:
        """Return (x − x_t) / max(1 − t, floor).

        Given the true image this is an x-prediction's target: JiT divides both by the floored time, so above t = 0.95
        the target is not x − ε.
        """
        return (x - state) / jnp.maximum(1 - per_example(t, state), floor)

    def image_of(self, velocity: Images, state: Images, t: Times) -> Images:
        """Return x_t + (1 − t)·v̂."""
        return state + (1 - per_example(t, state)) * velocity


def _energy(config: ml_collections.ConfigDict) -> Path:
    from deco_jax.method.energy import EnergyPath

    return EnergyPath(exact_derivative=config.loss.mean_flow)


PATHS: dict[str, Callable[[ml_collections.ConfigDict], Path]] = {
    "linear": lambda config: LinearPath(),
    "energy": _energy,
}


def make_path(config: ml_collections.ConfigDict) -> Path:
    """Build the path that config.path names."""
    return PATHS[config.path.name](config)

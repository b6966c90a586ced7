"""What all paths share: a point on a path, and times shaped to multiply images."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from deco_jax.shapes import Images

# JiT's floor of 1 − t (Li & He 2025): without it an x-prediction's velocity is unbounded towards t = 1.
MIN_REMAINING_TIME = 0.05


class Point(NamedTuple):
    """A point on the path of each image, both [batch, height, width, 3]."""

    state: Images
    velocity: Images  # d state / dt


def per_example(t: Array, like: Array) -> Array:
    """Reshape times, [batch] or one for all, so that they multiply `like` [batch, ...]."""
    t = jnp.asarray(t, jnp.promote_types(like.dtype, jnp.float32))
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t

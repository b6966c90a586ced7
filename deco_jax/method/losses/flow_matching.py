"""The pixel-space flow-matching loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.named_scope("loss")
def flow_matching_loss(error: Array) -> Array:
    """Mean square of v̂ − v over everything but the batch (Lipman et al. 2023, eq. 9).

    Args:
        error: predicted minus true velocity, [batch, height, width, 3].

    Returns:
        float32 [batch].
    """
    return jnp.mean(jnp.square(error.astype(jnp.float32)), axis=tuple(range(1, error.ndim)))

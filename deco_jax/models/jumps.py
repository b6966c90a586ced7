"""What a network is told for MeanFlow beside the time: how far to jump, and how to guide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from deco_jax.models.layers import Dtype, Linear, TimestepEmbedding, waves, zeros

STILL = (0.0, 1.0, 0.0, 1.0)  # a jump of length 0, which is no guidance


class JumpEmbedding(nnx.Module):
    """What MeanFlow adds to a time's embedding: how far to jump, and the guidance that the velocity shall include.

    Reads [batch, 4]: the jump's length in 0..1, the scale of guidance from 1 on, and the interval (low, high] of times
    in which it acts. Zero at first, so that a trained network goes on as it was.
    """

    def __init__(self, width: int, *, period: float, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.period = period
        waves = 2 * TimestepEmbedding.WAVES
        self.hidden = Linear(4 * waves, width, kernel_init=initializers.normal(0.02), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, jump: jax.Array) -> jax.Array:
        """jump [batch, 4] → [batch, width]."""
        length, scale, low, high = jnp.moveaxis(jump.astype(jnp.float32), 1, 0)
        numbers = jnp.stack([length, jnp.log(jnp.maximum(scale, 1.0)), low, high], axis=1)
        return self.out(jax.nn.silu(self.hidden(waves(numbers, self.period).reshape(len(jump), -1))))

"""A teacher's class token as one more token of a denoiser (REG)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.convert.mapping import VECTOR, Row
from deco_jax.models.layers import Dtype, Linear, RMSNorm, modulate, zeros
from deco_jax.models.official_names import linear_rows

# How its parameters are split, see `run.sharding`.
RULES = ((r"extra_token/embed/kernel$", -1), (r"extra_token/(output|modulation)/kernel$", -2))


class ClassToken(nnx.Module):
    """What takes the noised token in, before the first block, and its velocity out, after the last.

    Args:
        channels: of the teacher's token.
    """

    def __init__(self, width: int, channels: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.channels, self.dtype = channels, dtype
        self.embed = Linear(channels, width, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(width)
        start = {"kernel_init": zeros, "bias_init": zeros, "dtype": dtype, "rngs": rngs}
        self.modulation = Linear(width, 2 * width, **start)
        self.output = Linear(width, channels, **start)

    def enter(self, token: jax.Array) -> jax.Array:
        """Noised tokens [batch, channels] → [batch, 1, width]."""
        return self.embed(token.astype(self.dtype))[:, None]

    def velocity(self, h: jax.Array, condition: jax.Array) -> jax.Array:
        """Their last hidden states and the condition, [batch, width] → float32 [batch, channels]; zero at first."""
        shift, scale = jnp.split(self.modulation(condition), 2, axis=-1)
        return self.output(modulate(self.norm(h), shift, scale)).astype(jnp.float32)


def flops(width: int, channels: int) -> float:
    """Count the multiply-adds of both ways on one image; the blocks' are `trunk_flops`'s."""
    return 2 * width * channels + 2 * width**2


def rows() -> list[Row]:
    """Return its rows; the official code has no such token, so the names are ours."""
    layers = [f"extra_token.{name}" for name in ("embed", "modulation", "output")]
    norm = Row("extra_token.norm.weight", "extra_token.norm.scale", VECTOR)
    return [norm, *(row for layer in layers for row in linear_rows(layer, layer))]

"""REPA's projector: from the denoiser's hidden states to the teacher's feature space (Yu et al. 2025, §3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.models.layers import Dtype, Linear
from deco_jax.models.network import Network, functional
from deco_jax.shapes import Tokens

RULES = ((r"projector/\w+/kernel$", -2),)  # how its parameters are split, see `run.sharding`


class Projector(nnx.Module):
    """Linear–SiLU–Linear–SiLU–Linear: [batch, tokens, width] → [batch, tokens, teacher_width]."""

    def __init__(self, width: int, teacher_width: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.first = Linear(width, width, dtype=dtype, rngs=rngs)
        self.second = Linear(width, width, dtype=dtype, rngs=rngs)
        self.third = Linear(width, teacher_width, dtype=dtype, rngs=rngs)

    @jax.named_scope("projector")
    def __call__(self, hidden: Tokens) -> jax.Array:
        return self.third(jax.nn.silu(self.second(jax.nn.silu(self.first(hidden)))))


def make_projector(model: Any, teacher_width: int) -> Network:
    """The projector that fits `config.model`, computing in its dtype."""
    dtype = jnp.dtype(model.dtype)
    return functional(lambda rngs: Projector(model.width, teacher_width, dtype=dtype, rngs=rngs), dtype)

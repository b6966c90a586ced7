"""Projectors: from the denoiser's hidden states to a teacher's feature space.

mlp          three Linears (REPA, Yu et al. 2025, §3)
conv         one 3×3 convolution on the grid of tokens (iREPA)
transformer  two transformer blocks and a Linear (PixelREPA)

Some of the tokens may be hidden from it; then one learned vector stands in their place (PixelREPA).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deco_jax.models.jit import wave_positions
from deco_jax.models.layers import Dtype, LayerNorm, Linear, run_stack, stack, uniform
from deco_jax.models.network import Network, functional
from deco_jax.models.vit import Block, BlockStyle
from deco_jax.shapes import Tokens

# How its parameters are split, see `run.sharding`.
RULES = (
    (r"projector/mask_token$", None),
    (r"projector/blocks/(attention/out|mlp_out)/kernel$", -1),
    (r"projector/.*kernel$", -2),
)
BLOCKS = 2
HEAD_WIDTH = 64


class Projector(nnx.Module):
    """Linear–SiLU–Linear–SiLU–Linear: [batch, tokens, width] → [batch, tokens, teacher_width].

    Args:
        masked: whether tokens may be hidden.
    """

    def __init__(self, width: int, teacher_width: int, *, masked: bool = False, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.width, self.teacher_width, self.dtype = width, teacher_width, dtype
        self.make_layers(rngs)
        if masked:
            self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))

    def make_layers(self, rngs: nnx.Rngs) -> None:
        self.first = Linear(self.width, self.width, dtype=self.dtype, rngs=rngs)
        self.second = Linear(self.width, self.width, dtype=self.dtype, rngs=rngs)
        self.third = Linear(self.width, self.teacher_width, dtype=self.dtype, rngs=rngs)

    @jax.named_scope("projector")
    def __call__(self, hidden: Tokens, grid: tuple[int, int] | None = None, mask: jax.Array | None = None) -> jax.Array:
        """Project hidden states.

        Args:
            hidden: [batch, tokens, width].
            grid: rows and columns of the tokens.
            mask: bool [batch, tokens], the tokens to hide; None: none.

        Returns:
            [batch, tokens, teacher_width].
        """
        if mask is not None:
            hidden = jnp.where(mask[..., None], self.mask_token[...].astype(hidden.dtype), hidden)
        return self.project(hidden, grid)

    def project(self, hidden: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        return self.third(jax.nn.silu(self.second(jax.nn.silu(self.first(hidden)))))


class ConvProjector(Projector):
    """One 3×3 convolution, zeros around the grid."""

    def make_layers(self, rngs: nnx.Rngs) -> None:
        start = uniform(1 / math.sqrt(9 * self.width))  # PyTorch's
        self.convolution = nnx.Conv(
            self.width,
            self.teacher_width,
            (3, 3),
            padding=1,
            kernel_init=start,
            bias_init=start,
            dtype=self.dtype,
            rngs=rngs,
        )

    def project(self, hidden: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        assert grid is not None
        return self.convolution(hidden.reshape(len(hidden), *grid, -1)).reshape(*hidden.shape[:2], -1)


class TransformerProjector(Projector):
    """Two blocks with fixed positions, a norm and a Linear."""

    def make_layers(self, rngs: nnx.Rngs) -> None:
        heads = max(1, self.width // HEAD_WIDTH)
        heads = next(count for count in range(heads, 0, -1) if self.width % count == 0)
        style = BlockStyle(layer_scale=False)
        self.blocks = stack(lambda rngs: Block(self.width, heads, style, dtype=self.dtype, rngs=rngs), BLOCKS, rngs)
        self.norm = LayerNorm(self.width)
        self.head = Linear(self.width, self.teacher_width, dtype=self.dtype, rngs=rngs)

    def project(self, hidden: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        assert grid is not None
        h = hidden + jnp.asarray(wave_positions(*grid, self.width), hidden.dtype)
        h = run_stack(self.blocks, h, lambda block, h: block(h), dtype=self.dtype)
        return self.head(self.norm(h))


KINDS: dict[str, type[Projector]] = {"mlp": Projector, "conv": ConvProjector, "transformer": TransformerProjector}


def make_projector(model: Any, teacher_width: int, kind: str = "mlp", masked: bool = False) -> Network:
    """Build the projector that fits `config.model`, computing in its dtype."""
    dtype = jnp.dtype(model.dtype)
    return functional(
        lambda rngs: KINDS[kind](model.width, teacher_width, masked=masked, dtype=dtype, rngs=rngs), dtype
    )


def flops(kind: str, width: int, teacher_width: int, tokens: int) -> float:
    """Count the FLOPs of a projector on one image."""
    if kind == "mlp":
        return 2.0 * tokens * (2 * width**2 + width * teacher_width)
    if kind == "conv":
        return 2.0 * tokens * 9 * width * teacher_width
    blocks = BLOCKS * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    return 2.0 * (blocks + tokens * width * teacher_width)

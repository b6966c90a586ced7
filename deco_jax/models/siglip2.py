"""SigLIP2's vision towers, frozen vision transformers trained with captions, as teachers.

Source: Tschannen et al. 2025 (SigLIP 2), those for patches of 16 pixels and images of 256; weights in Hugging Face's
layout. Inference only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import MATRIX, TRANSPOSE, VECTOR, Row, to_ours
from deco_jax.convert.torch_files import below, read_weights
from deco_jax.errors import UserError
from deco_jax.models import vit
from deco_jax.models.layers import Dtype, LayerNorm, Linear, patchify, run_stack, stack
from deco_jax.models.network import FrozenNetwork, Params, View, functional
from deco_jax.models.official_names import linear_rows
from deco_jax.models.vit import FIRST, Block, BlockStyle, joined_rows, norm_rows
from deco_jax.resize import resize_bicubic
from deco_jax.shapes import Maps

PATCH = 16
GRID = 16  # side of the position table: 256² images


class Size(NamedTuple):
    """Width, depth, heads, the MLP's hidden units; Hugging Face's name."""

    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    name: str

    @property
    def style(self) -> BlockStyle:
        return BlockStyle(self.mlp_hidden, tanh=True, layer_scale=False)


SIZES = {
    "B": Size(768, 12, 12, 3072, "base"),
    "L": Size(1024, 24, 16, 4096, "large"),
    "So400m": Size(1152, 27, 16, 4304, "so400m"),
    "g-opt": Size(1536, 40, 16, 6144, "giant-opt"),
}


class Head(nnx.Module):
    """Attention of one learned vector over all tokens, then h += MLP(LN(h)): what stands for the whole image."""

    def __init__(self, size: Size, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.num_heads, self.dtype, width = size.num_heads, dtype, size.width
        self.probe = nnx.Param(initializers.normal(0.02)(rngs.params(), (width,)))
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width)
        self.mlp_in = Linear(width, size.mlp_hidden, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(size.mlp_hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [batch, tokens, width] → [batch, width]."""
        x = vit.with_first(tokens.astype(self.dtype), self.probe[...])
        q, k, v = self.qkv.to_heads(x, self.num_heads, 3)
        h = self.out.from_heads(jax.nn.dot_product_attention(q[:, :1], k[:, 1:], v[:, 1:]))
        return (h + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm(h)), approximate=True)))[:, 0]


class SigLIP2(nnx.Module):
    """Images to patch features.

    Args:
        size: its dimensions.
        dtype: compute dtype; resizing, norms and softmax are float32.
    """

    def __init__(self, size: Size, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.patch_embed = Linear(3 * PATCH**2, size.width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(initializers.normal(0.02)(rngs.params(), (GRID**2, size.width)))

        def block(rngs: nnx.Rngs) -> Block:
            return Block(size.width, size.num_heads, size.style, dtype=dtype, rngs=rngs)

        self.blocks = stack(block, size.depth, rngs)
        self.norm = LayerNorm(size.width)
        self.head = Head(size, dtype=dtype, rngs=rngs)

    @jax.named_scope("teacher")
    def __call__(self, images: Maps, patch_size: int = PATCH) -> View:
        """Return the features of the patches that a student with patches of `patch_size` pixels has.

        Args:
            images: [batch, height, width, 3], uint8 or float in [0, 1]; resized by 16 / patch_size (bicubic).

        Returns:
            The last LayerNorm's output, and what the head makes of it.
        """
        _, height, width, _ = images.shape
        x = 2 * vit.unit_interval(images) - 1
        if patch_size != PATCH:
            x = resize_bicubic(x, height * PATCH // patch_size, width * PATCH // patch_size)
        return self.features(x)

    def features(self, images: jax.Array) -> View:
        """Images in ±1, sides multiples of 16 → `View`."""
        _, height, width, _ = images.shape
        patches = patchify(images.astype(self.dtype), PATCH)
        h = self.patch_embed(patches.reshape(*patches.shape[:2], -1))
        positions = self.positions[...].astype(jnp.float32)
        if (rows := height // PATCH, columns := width // PATCH) != (GRID, GRID):
            table = positions.reshape(1, GRID, GRID, -1)
            positions = resize_bicubic(table, rows, columns).reshape(rows * columns, -1)
        h = run_stack(self.blocks, h + positions.astype(self.dtype), lambda block, h: block(h), dtype=self.dtype)
        tokens = self.norm(h.astype(jnp.float32))
        return View(tokens, self.head(tokens).astype(jnp.float32))


def teacher(size: str, path: str, dtype: str, patch_size: int) -> FrozenNetwork:
    """Return SigLIP2 as a teacher: images [batch, height, width, 3], uint8 or in [0, 1], to a `View`.

    Args:
        size: its name in `SIZES`.
        path: of its weights.
        dtype: that its matrices are kept and multiplied in.
        patch_size: of the student, whose tokens' features these are.
    """
    kind, dimensions = jnp.dtype(dtype), SIZES[size]
    network = functional(lambda rngs: SigLIP2(dimensions, dtype=kind, rngs=rngs), kind)

    def flops(height: int, width: int) -> float:
        return vit.flops(
            dimensions.width, dimensions.depth, height * width // patch_size**2, 0, PATCH, dimensions.style
        )

    return vit.frozen(network, kind, patch_size, functools.partial(load, path, size), flops)


def load(path: str | os.PathLike[str], size: str, dtype: Any = np.float32) -> Params:
    """Read the parameters of `SigLIP2` from a Hugging Face folder or `model.safetensors`, of all or the vision tower.

    Args:
        dtype: of the Linear kernels; everything else is float32.

    Raises:
        UserError: the file is missing (with where to get it), damaged, or of another size.
    """
    url = f"huggingface.co/google/siglip2-{SIZES[size].name}-patch16-256 (model.safetensors)"
    tensors = read_weights(path, "SigLIP2", f"download {url}")
    return from_torch(tensors, SIZES[size], dtype, what=str(path))


def from_torch(
    tensors: Mapping[str, np.ndarray], size: Size, dtype: Any = np.float32, what: str = "the teacher's file"
) -> Params:
    """Return the tensors as our parameters; the text model's are passed over. Errors as of `mapping.to_ours`."""
    tower, name = below(tensors, "vision_model."), "embeddings.position_embedding.weight"
    if name in tower and tower[name].shape != (GRID**2, size.width):
        raise UserError(
            f"{what}: {name} has the shape {list(tower[name].shape)}, expected {[GRID**2, size.width]}; take the file "
            f"of siglip2-{size.name}-patch16-256, or choose the teacher's size that the file has"
        )
    return to_ours(table(size), tower, dtype=vit.kernel_dtype(dtype), what=what)


def table(size: Size) -> list[Row]:
    """Return the rows of the published files, within the vision tower."""
    many, block = {"count": size.depth}, "encoder.layers.{i}"
    return [
        Row("embeddings.position_embedding.weight", "positions", MATRIX),
        Row("embeddings.patch_embedding.weight", "patch_embed.kernel", vit.convolution(PATCH)),
        Row("embeddings.patch_embedding.bias", "patch_embed.bias", VECTOR),
        *norm_rows(f"{block}.layer_norm1", "blocks.norm1", **many),
        *joined_rows([f"{block}.self_attn.{part}_proj" for part in "qkv"], "blocks.attention.qkv", **many),
        *linear_rows(f"{block}.self_attn.out_proj", "blocks.attention.out", **many),
        *norm_rows(f"{block}.layer_norm2", "blocks.norm2", **many),
        *linear_rows(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
        *linear_rows(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
        *norm_rows("post_layernorm", "norm"),
        Row("head.probe", "head.probe", FIRST),
        Row("head.attention.in_proj_weight", "head.qkv.kernel", TRANSPOSE),
        Row("head.attention.in_proj_bias", "head.qkv.bias", VECTOR),
        *linear_rows("head.attention.out_proj", "head.out"),
        *norm_rows("head.layernorm", "head.norm"),
        *linear_rows("head.mlp.fc1", "head.mlp_in"),
        *linear_rows("head.mlp.fc2", "head.mlp_out"),
    ]

"""DINOv3, a frozen vision transformer with a rotary embedding and registers, as a teacher.

Source: Siméoni et al. 2025 (DINOv3); weights in Hugging Face's layout. Inference only.
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

from deco_jax.convert.mapping import DROP_FIRST, VECTOR, Row, Transform, fused, to_ours
from deco_jax.convert.torch_files import read_weights
from deco_jax.models import vit
from deco_jax.models.layers import Dtype, LayerNorm, Linear, patchify, run_stack, stack
from deco_jax.models.network import FrozenNetwork, Params, View, functional
from deco_jax.models.official_names import linear_rows
from deco_jax.models.vit import FIRST, Block, BlockStyle, norm_rows
from deco_jax.resize import resize_bicubic
from deco_jax.shapes import Maps

PATCH = 16
REGISTERS = 4
PERIOD = 100.0
EPSILON = 1e-5
IGNORED = ("embeddings.mask_token",)  # a stand-in for hidden patches, used only while DINOv3 itself was trained


class Size(NamedTuple):
    """Width, depth, heads; hidden units of a gated MLP (0: a plain one of four times the width); Hugging Face's name.

    qkv_bias: whether queries and values have biases; keys never have.
    """

    width: int
    depth: int
    num_heads: int
    gated_hidden: int
    name: str
    qkv_bias: bool = True

    @property
    def style(self) -> BlockStyle:
        return BlockStyle(self.gated_hidden, gated=self.gated_hidden > 0, epsilon=EPSILON, qkv_bias=self.qkv_bias)


SIZES = {
    "S": Size(384, 12, 6, 0, "vits16"),
    "S+": Size(384, 12, 6, 1536, "vits16plus"),
    "B": Size(768, 12, 12, 0, "vitb16"),
    "L": Size(1024, 24, 16, 0, "vitl16"),
    "H+": Size(1280, 32, 20, 5120, "vith16plus"),
    "7B": Size(4096, 40, 32, 8192, "vit7b16", qkv_bias=False),
}


class DINOv3(nnx.Module):
    """Images to patch features.

    Args:
        size: its dimensions.
        dtype: compute dtype; resizing, norms, rotations and softmax are float32.
    """

    def __init__(self, size: Size, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.dtype, self.head_width = dtype, size.width // size.num_heads
        normal = initializers.normal(0.02)
        self.patch_embed = Linear(3 * PATCH**2, size.width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (size.width,)))
        self.register_tokens = nnx.Param(normal(rngs.params(), (REGISTERS, size.width)))

        def block(rngs: nnx.Rngs) -> Block:
            return Block(size.width, size.num_heads, size.style, dtype=dtype, rngs=rngs)

        self.blocks = stack(block, size.depth, rngs)
        self.norm = LayerNorm(size.width, epsilon=EPSILON)

    @jax.named_scope("teacher")
    def __call__(self, images: Maps, patch_size: int = PATCH) -> View:
        """Return the features of the patches that a student with patches of `patch_size` pixels has.

        Args:
            images: [batch, height, width, 3], uint8 or float in [0, 1]; resized by 16 / patch_size (bicubic).

        Returns:
            Those, and the class token's.
        """
        _, height, width, _ = images.shape
        x = (vit.unit_interval(images) - vit.MEAN) / vit.STD
        if patch_size != PATCH:
            x = resize_bicubic(x, height * PATCH // patch_size, width * PATCH // patch_size)
        return self.features(x)

    def features(self, images: jax.Array) -> View:
        """Normalised images, sides multiples of 16 → the last LayerNorm's output."""
        _, height, width, _ = images.shape
        patches = patchify(images.astype(self.dtype), PATCH)
        h = self.patch_embed(patches.reshape(*patches.shape[:2], -1))
        h = vit.with_first(h, self.class_token[...], self.register_tokens[...])
        turn = functools.partial(rotate, angles=jnp.asarray(angles(height // PATCH, width // PATCH, self.head_width)))
        h = run_stack(self.blocks, h, lambda block, h: block(h, turn), dtype=self.dtype)
        h = self.norm(h.astype(jnp.float32))
        return View(h[:, 1 + REGISTERS :], h[:, 0])


def angles(rows: int, columns: int, head_width: int) -> np.ndarray:
    """Return the rotary angles of a grid's patches, float32 [rows · columns, head_width / 2].

    The first half turns by the row, the second by the column: 2π times the patch's centre, in ±1 across the image,
    times the frequencies 100^(−k/(head_width/4)).
    """
    frequencies = PERIOD ** (-np.arange(head_width // 4) / (head_width / 4))
    y, x = ((np.arange(count) + 0.5) / count * 2 - 1 for count in (rows, columns))
    y, x = (axis.reshape(-1, 1) for axis in np.meshgrid(y, x, indexing="ij"))
    return (2 * np.pi * np.concatenate([y * frequencies, x * frequencies], axis=1)).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the pairs of channels (k, k + half) of the last tokens by their angles; the tokens before stay.

    Args:
        x: [batch, tokens, heads, head_width]; angles: [patches, head_width / 2].
    """
    first, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
    a, b = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([first, turned.astype(x.dtype)], axis=1)


def teacher(size: str, path: str, dtype: str, patch_size: int) -> FrozenNetwork:
    """Return DINOv3 as a teacher: images [batch, height, width, 3], uint8 or in [0, 1], to a `View`.

    Args:
        size: its name in `SIZES`.
        path: of its weights.
        dtype: that its matrices are kept and multiplied in.
        patch_size: of the student, whose tokens' features these are.
    """
    kind, dimensions = jnp.dtype(dtype), SIZES[size]
    network = functional(lambda rngs: DINOv3(dimensions, dtype=kind, rngs=rngs), kind)

    def flops(height: int, width: int) -> float:
        patches = height * width // patch_size**2
        return vit.flops(dimensions.width, dimensions.depth, patches, 1 + REGISTERS, PATCH, dimensions.style)

    return vit.frozen(network, kind, patch_size, functools.partial(load, path, size), flops)


def load(path: str | os.PathLike[str], size: str, dtype: Any = np.float32) -> Params:
    """Read the parameters of `DINOv3` from a Hugging Face folder or `model.safetensors`.

    Args:
        dtype: of the Linear kernels; everything else is float32.

    Raises:
        UserError: the file is missing (with where to get it), damaged, or of another size.
    """
    url = f"huggingface.co/facebook/dinov3-{SIZES[size].name}-pretrain-lvd1689m (model.safetensors)"
    tensors = read_weights(path, "DINOv3", f"accept its licence and download {url}")
    return from_torch(tensors, SIZES[size], dtype, what=str(path))


def from_torch(
    tensors: Mapping[str, np.ndarray], size: Size, dtype: Any = np.float32, what: str = "the teacher's file"
) -> Params:
    """Return the tensors as our parameters; errors as of `mapping.to_ours`."""
    ignored = [name for name in tensors if name in IGNORED]
    return to_ours(table(size), tensors, dtype=vit.kernel_dtype(dtype), ignore=ignored, what=what)


# Keys have no bias; here they have one of zeros.
QUERY_AND_VALUE = Transform(
    "two vectors with zeros between",
    (1, 1),
    lambda arrays: [np.concatenate([arrays[0], np.zeros_like(arrays[0]), arrays[1]])],
    lambda arrays: np.split(arrays[0], 3)[::2],
)


def table(size: Size) -> list[Row]:
    """Return the rows of the published files."""
    many, block = {"count": size.depth}, "layer.{i}"
    qkv = [f"{block}.attention.{name}_proj" for name in "qkv"]
    rows = [
        Row("embeddings.cls_token", "class_token", FIRST),
        Row("embeddings.register_tokens", "register_tokens", DROP_FIRST),
        Row("embeddings.patch_embeddings.weight", "patch_embed.kernel", vit.convolution(PATCH)),
        Row("embeddings.patch_embeddings.bias", "patch_embed.bias", VECTOR),
        *norm_rows(f"{block}.norm1", "blocks.norm1", **many),
        Row(tuple(f"{name}.weight" for name in qkv), "blocks.attention.qkv.kernel", fused(3), **many),
        *linear_rows(f"{block}.attention.o_proj", "blocks.attention.out", **many),
        Row(f"{block}.layer_scale1.lambda1", "blocks.scale1", VECTOR, **many),
        *norm_rows(f"{block}.norm2", "blocks.norm2", **many),
        *linear_rows(f"{block}.mlp.down_proj", "blocks.mlp_out", **many),
        Row(f"{block}.layer_scale2.lambda1", "blocks.scale2", VECTOR, **many),
        *norm_rows("norm", "norm"),
    ]
    if size.qkv_bias:
        rows.append(Row((f"{qkv[0]}.bias", f"{qkv[2]}.bias"), "blocks.attention.qkv.bias", QUERY_AND_VALUE, **many))
    if size.gated_hidden:
        return rows + vit.joined_rows([f"{block}.mlp.{name}_proj" for name in ("gate", "up")], "blocks.mlp_in", **many)
    return [*rows, *linear_rows(f"{block}.mlp.up_proj", "blocks.mlp_in", **many)]

"""DINOv2, the frozen vision transformer whose patch features REPA aligns with, and its weights in two layouts.

Source: Oquab et al. 2023 (DINOv2); a ViT (Dosovitskiy et al. 2020) with LayerScale. Inference only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from deco_jax.convert.mapping import VECTOR, Row, Transform, fused, one_to_one, to_ours
from deco_jax.convert.torch_files import read_tensors
from deco_jax.errors import UserError
from deco_jax.models.layers import Dtype, LayerNorm, Linear, patchify, run_stack, stack
from deco_jax.models.network import FrozenNetwork, functional
from deco_jax.models.official_names import linear_rows
from deco_jax.resize import resize_bicubic
from deco_jax.run import storage
from deco_jax.shapes import Maps, Tokens

# The size's letter → width, depth, heads.
SIZES: dict[str, tuple[int, int, int]] = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
PATCH = 14
GRID = 37  # side of the position table: 518² images were the last ones it was trained on
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


# How its parameters are split, see `run.sharding`.
RULES = (
    (r"teacher/blocks/(attention/qkv|mlp_in)/kernel$", -2),
    (r"teacher/(blocks/(attention/out|mlp_out)/kernel|positions|patch_embed/kernel)$", -1),
)


class Attention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, width: int, num_heads: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out.from_heads(jax.nn.dot_product_attention(*self.qkv.to_heads(x, self.num_heads, 3)))


class Block(nnx.Module):
    """h += scale₁·Attention(LN(h)); h += scale₂·MLP(LN(h)) with the exact GELU."""

    def __init__(self, width: int, num_heads: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.mlp_in = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.mlp_out = Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.scale1, self.scale2 = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(width))

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [batch, tokens, width] → the same shape and dtype."""
        h = h + self.scale1[...].astype(h.dtype) * self.attention(self.norm1(h))
        hidden = jax.nn.gelu(self.mlp_in(self.norm2(h)), approximate=False)
        return h + self.scale2[...].astype(h.dtype) * self.mlp_out(hidden)


class DINOv2(nnx.Module):
    """Images to patch features.

    Args:
        width, depth, num_heads: of the transformer; `DINOv2.of_size` takes them from a letter.
        dtype: compute dtype; resizing, norms and softmax are float32.
    """

    def __init__(self, width: int, depth: int, num_heads: int, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.width, self.dtype = width, dtype
        normal = initializers.normal(0.02)
        self.patch_embed = Linear(3 * PATCH**2, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (width,)))
        # The class token's position first, then the grid's, row by row.
        self.positions = nnx.Param(normal(rngs.params(), (1 + GRID**2, width)))
        self.blocks = stack(lambda rngs: Block(width, num_heads, dtype=dtype, rngs=rngs), depth, rngs)
        self.norm = LayerNorm(width)

    @classmethod
    def of_size(cls, size: str, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> DINOv2:
        """ViT-S/14, ViT-B/14 or ViT-L/14 by the letter."""
        return cls(*sizes(size), dtype=dtype, rngs=rngs)

    @jax.named_scope("teacher")
    def __call__(self, images: Maps, patch_size: int = 16) -> Tokens:
        """Features of the patches that a student with patches of `patch_size` pixels has.

        The images are resized by 14 / patch_size, so that both have the same tokens.

        Args:
            images: [batch, height, width, 3], uint8 or float in [0, 1]; the sides are multiples of patch_size.

        Returns:
            float32 [batch, (height / patch_size) · (width / patch_size), width], row by row.
        """
        return self.features(preprocess(images, patch_size))[:, 1:]

    def features(self, images: jax.Array) -> jax.Array:
        """Normalised images, sides multiples of 14 → float32 [batch, 1 + tokens, width]: the last LayerNorm's
        output, the class token first."""
        batch, height, width, _ = images.shape
        rows, columns = height // PATCH, width // PATCH
        patches = patchify(images.astype(self.dtype), PATCH)
        h = self.patch_embed(patches.reshape(batch, rows * columns, -1))
        positions = self.positions[...].astype(jnp.float32)
        h = h + resize_positions(positions[1:], rows, columns).astype(self.dtype)
        first = (self.class_token[...].astype(jnp.float32) + positions[0]).astype(self.dtype)
        h = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, self.width)), h], axis=1)
        h = run_stack(self.blocks, h, lambda block, h: block(h), dtype=self.dtype)
        return self.norm(h.astype(jnp.float32))


def sizes(size: str) -> tuple[int, int, int]:
    """Width, depth and heads of a size's letter."""
    if size not in SIZES:
        raise UserError(f"unknown DINOv2 size {size!r}; use one of {', '.join(SIZES)}")
    return SIZES[size]


def teacher(size: str, path: str, dtype: str, patch_size: int) -> FrozenNetwork:
    """DINOv2 as a teacher: images [batch, height, width, 3], uint8 or in [0, 1], to float32 [batch, tokens, width].

    Args:
        size: its letter.
        path: of its weights.
        dtype: that its matrices are kept and multiplied in.
        patch_size: of the student, whose tokens' features these are.
    """
    kind = jnp.dtype(dtype)
    network = functional(lambda rngs: DINOv2.of_size(size, dtype=kind, rngs=rngs), kind)

    def kept(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, kind if path[-1].key == "kernel" else jnp.float32)

    return FrozenNetwork(
        lambda params, images: network.apply(params, images, patch_size),
        jax.tree_util.tree_map_with_path(kept, network.shapes),
        lambda: load_teacher(path, size, dtype=kind),
        functools.partial(flops, size, patch_size),
    )


def flops(size: str, patch_size: int, height: int, width: int) -> float:
    """Count the FLOPs of a forward pass on one image, which is read at 14/patch_size of its sides."""
    channels, depth, _ = sizes(size)
    patches = height * width // patch_size**2
    tokens = patches + 1
    # 4 channels² in the attention, 8 in the MLP of four times the width.
    block = tokens * 12 * channels**2 + 2 * tokens**2 * channels
    return 2.0 * (patches * 3 * PATCH**2 * channels + depth * block)


def preprocess(images: jax.Array, patch_size: int = 16) -> jax.Array:
    """uint8 or [0, 1] images [batch, height, width, 3] to the teacher's input.

    Returns:
        float32 [batch, height·14/patch_size, width·14/patch_size, 3] with ImageNet's mean and deviation removed.
    """
    _, height, width, _ = images.shape
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}×{width} images don't divide into patches of {patch_size} pixels; change one of them")
    x = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        x = x / 255
    x = (x - MEAN) / STD
    return resize_bicubic(x, height * PATCH // patch_size, width * PATCH // patch_size)


def resize_positions(table: jax.Array, rows: int, columns: int) -> jax.Array:
    """The position table [37², width] on another grid: [rows · columns, width].

    The scale has DINOv2's offset of 0.1 in it, so new samples are not quite centred.
    """
    side, width = round(len(table) ** 0.5), table.shape[1]
    if (rows, columns) == (side, side):
        return table
    scales = (1 / ((rows + 0.1) / side), 1 / ((columns + 0.1) / side))
    resized = resize_bicubic(table.reshape(1, side, side, width), rows, columns, scales=scales)
    return resized.reshape(rows * columns, width)


# ---------------------------------------------------------------------------------------- the official weights

META_LAYOUT, HF_LAYOUT = "meta", "huggingface"
META_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/dinov2_vit{0}14_pretrain.pth"
HF_NAMES = {"S": "facebook/dinov2-small", "B": "facebook/dinov2-base", "L": "facebook/dinov2-large"}
# A learned stand-in for hidden patches, used only while DINOv2 itself was trained.
IGNORED = ("mask_token", "embeddings.mask_token")

CONVOLUTION = one_to_one(
    "a convolution over patches",
    4,
    lambda w: w.transpose(2, 3, 1, 0).reshape(PATCH * PATCH * 3, len(w)),
    lambda k: k.reshape(PATCH, PATCH, 3, k.shape[1]).transpose(3, 2, 0, 1),
)
CLASS_TOKEN = one_to_one("[1, 1, width] to [width]", 3, lambda a: a.reshape(a.shape[2]), lambda a: a[None, None])
POSITIONS: Transform = one_to_one(
    "[1, positions, width] to [positions, width]", 3, lambda a: a.squeeze(0), lambda a: a[None]
)


def _norm(torch: str, ours: str, **blocks: Any) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"{ours}.scale", VECTOR, **blocks),
        Row(f"{torch}.bias", f"{ours}.bias", VECTOR, **blocks),
    ]


def table(depth: int, layout: str = META_LAYOUT) -> list[Row]:
    """The rows of a DINOv2 of `depth` blocks without register tokens, in Meta's or Hugging Face's layout."""
    many = {"count": depth}
    if layout == META_LAYOUT:
        block = "blocks.{i}"
        return [
            Row("cls_token", "class_token", CLASS_TOKEN),
            Row("pos_embed", "positions", POSITIONS),
            Row("patch_embed.proj.weight", "patch_embed.kernel", CONVOLUTION),
            Row("patch_embed.proj.bias", "patch_embed.bias", VECTOR),
            *_norm(f"{block}.norm1", "blocks.norm1", **many),
            *linear_rows(f"{block}.attn.qkv", "blocks.attention.qkv", **many),
            *linear_rows(f"{block}.attn.proj", "blocks.attention.out", **many),
            Row(f"{block}.ls1.gamma", "blocks.scale1", VECTOR, **many),
            *_norm(f"{block}.norm2", "blocks.norm2", **many),
            *linear_rows(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
            *linear_rows(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
            Row(f"{block}.ls2.gamma", "blocks.scale2", VECTOR, **many),
            *_norm("norm", "norm"),
        ]
    block = "encoder.layer.{i}"
    qkv = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
    return [
        Row("embeddings.cls_token", "class_token", CLASS_TOKEN),
        Row("embeddings.position_embeddings", "positions", POSITIONS),
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed.kernel", CONVOLUTION),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed.bias", VECTOR),
        *_norm(f"{block}.norm1", "blocks.norm1", **many),
        Row(tuple(f"{part}.weight" for part in qkv), "blocks.attention.qkv.kernel", fused(3), **many),
        Row(tuple(f"{part}.bias" for part in qkv), "blocks.attention.qkv.bias", fused(3, bias=True), **many),
        *linear_rows(f"{block}.attention.output.dense", "blocks.attention.out", **many),
        Row(f"{block}.layer_scale1.lambda1", "blocks.scale1", VECTOR, **many),
        *_norm(f"{block}.norm2", "blocks.norm2", **many),
        *linear_rows(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
        *linear_rows(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
        Row(f"{block}.layer_scale2.lambda1", "blocks.scale2", VECTOR, **many),
        *_norm("layernorm", "norm"),
    ]


def from_torch(
    tensors: Mapping[str, np.ndarray],
    *,
    width: int,
    depth: int,
    dtype: Any = np.float32,
    what: str = "the teacher's file",
) -> dict[str, Any]:
    """DINOv2 tensors of either layout as our parameters.

    Args:
        dtype: of the Linear kernels; everything else is float32.

    Raises:
        UserError: tensors are missing, left over, or of another size.
    """
    layout = HF_LAYOUT if "embeddings.cls_token" in tensors else META_LAYOUT
    positions = {META_LAYOUT: "pos_embed", HF_LAYOUT: "embeddings.position_embeddings"}[layout]
    if positions in tensors and tensors[positions].shape != (1, 1 + GRID**2, width):
        raise UserError(
            f"{what}: {positions} has the shape {list(tensors[positions].shape)}, expected {[1, 1 + GRID**2, width]}; "
            "choose the teacher's size that the file has"
        )
    return to_ours(
        table(depth, layout),
        tensors,
        dtype=lambda path: dtype if path.endswith(".kernel") else np.float32,
        ignore=IGNORED,
        what=what,
    )


def check_teacher(path: str | os.PathLike[str] | None, size: str) -> Path:
    """The path, if something is there.

    Raises:
        UserError: it isn't set or doesn't exist; the message says where the weights are.
    """
    sizes(size)
    where = f"download {META_URL.format(size.lower())} or huggingface.co/{HF_NAMES[size]} (model.safetensors)"
    if not path:
        raise UserError(f"REPA needs the weights of DINOv2 ViT-{size}/14, and no path to them is set; {where}")
    path = storage.local(path)
    if not path.exists():
        raise UserError(f"{path}: no DINOv2 weights there; {where}")
    return path


def load_teacher(path: str | os.PathLike[str] | None, size: str = "B", *, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of `DINOv2.of_size(size)` from a `.pth` or safetensors file or a folder.

    Args:
        path: `dinov2_vitb14_pretrain.pth`, or the Hugging Face repository's folder or `model.safetensors`.
        size: "S", "B" or "L".
        dtype: of the Linear kernels; everything else is float32.

    Raises:
        UserError: the file is missing (with where to get it), damaged, or of another size.
    """
    width, depth, _ = sizes(size)
    path = check_teacher(path, size)
    return from_torch(read_tensors(path), width=width, depth=depth, dtype=dtype, what=str(path))

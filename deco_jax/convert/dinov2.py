"""DINOv2 weights: Meta's `.pth` files and the Hugging Face layout → our parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deco_jax.convert.mapping import TRANSPOSE, VECTOR, Row, Transform, fused, one_to_one, to_ours
from deco_jax.convert.torch_files import read_tensors
from deco_jax.errors import UserError
from deco_jax.models.dinov2 import GRID, PATCH, sizes
from deco_jax.run import storage

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


def _linear(torch: str, ours: str, **blocks: Any) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"{ours}.kernel", TRANSPOSE, **blocks),
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
            *_linear(f"{block}.attn.qkv", "blocks.attention.qkv", **many),
            *_linear(f"{block}.attn.proj", "blocks.attention.out", **many),
            Row(f"{block}.ls1.gamma", "blocks.scale1", VECTOR, **many),
            *_norm(f"{block}.norm2", "blocks.norm2", **many),
            *_linear(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
            *_linear(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
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
        *_linear(f"{block}.attention.output.dense", "blocks.attention.out", **many),
        Row(f"{block}.layer_scale1.lambda1", "blocks.scale1", VECTOR, **many),
        *_norm(f"{block}.norm2", "blocks.norm2", **many),
        *_linear(f"{block}.mlp.fc1", "blocks.mlp_in", **many),
        *_linear(f"{block}.mlp.fc2", "blocks.mlp_out", **many),
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
    """Parameters of `models.dinov2.DINOv2.of_size(size)` from a `.pth` or safetensors file or a folder.

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

"""DINOv2, the frozen vision transformer whose patch features REPA aligns with, and its weights in two layouts.

Sources: Oquab et al. 2023 (DINOv2); Darcet et al. 2024 (registers); a ViT (Dosovitskiy et al. 2020) with LayerScale,
in size g with SwiGLU. Inference only.
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

from deco_jax.convert.mapping import VECTOR, Row, Transform, one_to_one, to_ours
from deco_jax.convert.torch_files import read_tensors
from deco_jax.errors import UserError
from deco_jax.models import vit
from deco_jax.models.layers import Dtype, LayerNorm, Linear, patchify, run_stack, stack
from deco_jax.models.network import FrozenNetwork, Params, View, functional
from deco_jax.models.official_names import linear_rows
from deco_jax.models.vit import FIRST, MEAN, PLAIN, STD, Block, BlockStyle, joined_rows, norm_rows
from deco_jax.resize import resize_bicubic
from deco_jax.run import fetch
from deco_jax.shapes import Maps

# The size's letter → width, depth, heads.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "g": (1536, 40, 24),
}
STYLES = {"g": BlockStyle(mlp_hidden=4096, gated=True)}
REGISTERS = 4  # of the models that have them
PATCH = 14
GRID = 37  # side of the position table: 518² images were the last ones it was trained on


class DINOv2(nnx.Module):
    """Images to patch features.

    Args:
        width, depth, num_heads: of the transformer; `DINOv2.of_size` takes them from a letter.
        style: of its blocks.
        registers: tokens that stand for nothing, between the class token and the image's.
        dtype: compute dtype; resizing, norms and softmax are float32.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        style: BlockStyle = PLAIN,
        registers: int = 0,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.width, self.dtype, self.registers = width, dtype, registers
        normal = initializers.normal(0.02)
        self.patch_embed = Linear(3 * PATCH**2, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (width,)))
        # The class token's position first, then the grid's, row by row.
        self.positions = nnx.Param(normal(rngs.params(), (1 + GRID**2, width)))
        if registers:
            self.register_tokens = nnx.Param(normal(rngs.params(), (registers, width)))
        self.blocks = stack(lambda rngs: Block(width, num_heads, style, dtype=dtype, rngs=rngs), depth, rngs)
        self.norm = LayerNorm(width)

    @classmethod
    def of_size(cls, size: str, *, registers: int = 0, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> DINOv2:
        """Make ViT-S/14, ViT-B/14, ViT-L/14 or ViT-g/14 by the letter."""
        style = STYLES.get(size, PLAIN)
        return cls(*sizes(size), style=style, registers=registers, dtype=dtype, rngs=rngs)

    @jax.named_scope("teacher")
    def __call__(self, images: Maps, patch_size: int = 16) -> View:
        """Return the features of the patches that a student with patches of `patch_size` pixels has.

        The images are resized by 14 / patch_size, so that both have the same tokens.

        Args:
            images: [batch, height, width, 3], uint8 or float in [0, 1]; the sides are multiples of patch_size.

        Returns:
            Those, and the class token's.
        """
        h = self.features(preprocess(images, patch_size))
        return View(h[:, 1 + self.registers :], h[:, 0])

    def features(self, images: jax.Array) -> jax.Array:
        """Normalised images, sides multiples of 14 → float32 [batch, 1 + registers + tokens, width]: the last
        LayerNorm's output, the class token first."""
        batch, height, width, _ = images.shape
        rows, columns = height // PATCH, width // PATCH
        patches = patchify(images.astype(self.dtype), PATCH)
        h = self.patch_embed(patches.reshape(batch, rows * columns, -1))
        positions = self.positions[...].astype(jnp.float32)
        h = h + resize_positions(positions[1:], rows, columns, antialiased=self.registers > 0).astype(self.dtype)
        first = [self.class_token[...].astype(jnp.float32) + positions[0]]
        if self.registers:
            first.append(self.register_tokens[...])
        h = vit.with_first(h, *first)
        h = run_stack(self.blocks, h, lambda block, h: block(h), dtype=self.dtype)
        return self.norm(h.astype(jnp.float32))


def sizes(size: str) -> tuple[int, int, int]:
    """Return width, depth and heads of a size's letter."""
    if size not in SIZES:
        raise UserError(f"unknown DINOv2 size {size!r}; use one of {', '.join(SIZES)}")
    return SIZES[size]


def teacher(size: str, path: str, dtype: str, patch_size: int, registers: int = 0) -> FrozenNetwork:
    """Return DINOv2 as a teacher: images [batch, height, width, 3], uint8 or in [0, 1], to a `View`.

    Args:
        size: its letter.
        path: of its weights.
        dtype: that its matrices are kept and multiplied in.
        patch_size: of the student, whose tokens' features these are.
        registers: of the model.
    """
    kind = jnp.dtype(dtype)
    network = functional(lambda rngs: DINOv2.of_size(size, registers=registers, dtype=kind, rngs=rngs), kind)

    def load(dtype: Any) -> Params:
        return load_teacher(path, size, registers=registers, dtype=dtype)

    return vit.frozen(network, kind, patch_size, load, functools.partial(flops, size, patch_size, registers))


def flops(size: str, patch_size: int, registers: int, height: int, width: int) -> float:
    """Count the FLOPs of a forward pass on one image, which is read at 14/patch_size of its sides."""
    channels, depth, _ = sizes(size)
    patches = height * width // patch_size**2
    return vit.flops(channels, depth, patches, 1 + registers, PATCH, STYLES.get(size, PLAIN))


def preprocess(images: jax.Array, patch_size: int = 16) -> jax.Array:
    """Bring uint8 or [0, 1] images [batch, height, width, 3] to the teacher's input.

    Returns:
        float32 [batch, height·14/patch_size, width·14/patch_size, 3] with ImageNet's mean and deviation removed.
    """
    _, height, width, _ = images.shape
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}×{width} images don't divide into patches of {patch_size} pixels; change one of them")
    x = (vit.unit_interval(images) - MEAN) / STD
    return resize_bicubic(x, height * PATCH // patch_size, width * PATCH // patch_size)


def resize_positions(table: jax.Array, rows: int, columns: int, *, antialiased: bool = False) -> jax.Array:
    """Resize the position table [37², width] on another grid: [rows · columns, width].

    The scale has DINOv2's offset of 0.1 in it, so new samples are not quite centred; with registers it hasn't, and the
    table is filtered as it shrinks (`antialiased`).
    """
    side, width = round(len(table) ** 0.5), table.shape[1]
    if (rows, columns) == (side, side):
        return table
    if antialiased:
        with jax.default_matmul_precision("highest"):
            resized = jax.image.resize(table.reshape(side, side, width), (rows, columns, width), "cubic")
        return resized.reshape(rows * columns, width)
    scales = (1 / ((rows + 0.1) / side), 1 / ((columns + 0.1) / side))
    resized = resize_bicubic(table.reshape(1, side, side, width), rows, columns, scales=scales)
    return resized.reshape(rows * columns, width)


# ---------------------------------------------------------------------------------------- the official weights

META_LAYOUT, HF_LAYOUT = "meta", "huggingface"
META_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/dinov2_vit{0}14{1}_pretrain.pth"
HF_NAMES = {
    "S": "facebook/dinov2{}-small",
    "B": "facebook/dinov2{}-base",
    "L": "facebook/dinov2{}-large",
    "g": "facebook/dinov2{}-giant",
}
# A learned stand-in for hidden patches, used only while DINOv2 itself was trained.
IGNORED = ("mask_token", "embeddings.mask_token")

CONVOLUTION = vit.convolution(PATCH)
POSITIONS: Transform = one_to_one(
    "[1, positions, width] to [positions, width]", 3, lambda a: a.squeeze(0), lambda a: a[None]
)


def table(depth: int, layout: str = META_LAYOUT, *, registers: int = 0, gated: bool = False) -> list[Row]:
    """Return the rows of a DINOv2 of `depth` blocks, in Meta's or Hugging Face's layout."""
    many = {"count": depth}
    prefix = "" if layout == META_LAYOUT else "embeddings."
    extra = [Row(f"{prefix}register_tokens", "register_tokens", POSITIONS)] if registers else []
    mlp = ("mlp.fc1", "mlp.fc2")
    if gated:
        mlp = ("mlp.w12", "mlp.w3") if layout == META_LAYOUT else ("mlp.weights_in", "mlp.weights_out")
    if layout == META_LAYOUT:
        block = "blocks.{i}"
        return [
            *extra,
            Row("cls_token", "class_token", FIRST),
            Row("pos_embed", "positions", POSITIONS),
            Row("patch_embed.proj.weight", "patch_embed.kernel", CONVOLUTION),
            Row("patch_embed.proj.bias", "patch_embed.bias", VECTOR),
            *norm_rows(f"{block}.norm1", "blocks.norm1", **many),
            *linear_rows(f"{block}.attn.qkv", "blocks.attention.qkv", **many),
            *linear_rows(f"{block}.attn.proj", "blocks.attention.out", **many),
            Row(f"{block}.ls1.gamma", "blocks.scale1", VECTOR, **many),
            *norm_rows(f"{block}.norm2", "blocks.norm2", **many),
            *linear_rows(f"{block}.{mlp[0]}", "blocks.mlp_in", **many),
            *linear_rows(f"{block}.{mlp[1]}", "blocks.mlp_out", **many),
            Row(f"{block}.ls2.gamma", "blocks.scale2", VECTOR, **many),
            *norm_rows("norm", "norm"),
        ]
    block = "encoder.layer.{i}"
    qkv = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
    return [
        *extra,
        Row("embeddings.cls_token", "class_token", FIRST),
        Row("embeddings.position_embeddings", "positions", POSITIONS),
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed.kernel", CONVOLUTION),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed.bias", VECTOR),
        *norm_rows(f"{block}.norm1", "blocks.norm1", **many),
        *joined_rows(qkv, "blocks.attention.qkv", **many),
        *linear_rows(f"{block}.attention.output.dense", "blocks.attention.out", **many),
        Row(f"{block}.layer_scale1.lambda1", "blocks.scale1", VECTOR, **many),
        *norm_rows(f"{block}.norm2", "blocks.norm2", **many),
        *linear_rows(f"{block}.{mlp[0]}", "blocks.mlp_in", **many),
        *linear_rows(f"{block}.{mlp[1]}", "blocks.mlp_out", **many),
        Row(f"{block}.layer_scale2.lambda1", "blocks.scale2", VECTOR, **many),
        *norm_rows("layernorm", "norm"),
    ]


def from_torch(
    tensors: Mapping[str, np.ndarray],
    *,
    width: int,
    depth: int,
    registers: int = 0,
    gated: bool = False,
    dtype: Any = np.float32,
    what: str = "the teacher's file",
) -> dict[str, Any]:
    """Return DINOv2 tensors of either layout as our parameters.

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
        table(depth, layout, registers=registers, gated=gated),
        tensors,
        dtype=vit.kernel_dtype(dtype),
        ignore=IGNORED,
        what=what,
    )


def check_teacher(path: str | os.PathLike[str] | None, size: str, registers: int = 0) -> Path:
    """Return the path, if something is there.

    Raises:
        UserError: it isn't set or doesn't exist; the message says where the weights are.
    """
    sizes(size)
    url = META_URL.format(size.lower(), f"_reg{registers}" if registers else "")
    name = HF_NAMES[size].format("-with-registers" if registers else "")
    where = f"download {url} or huggingface.co/{name} (model.safetensors)"
    if not path:
        raise UserError(f"REPA needs the weights of DINOv2 ViT-{size}/14, and no path to them is set; {where}")
    path = fetch.local(path)
    if not path.exists():
        raise UserError(f"{path}: no DINOv2 weights there; {where}")
    return path


def load_teacher(
    path: str | os.PathLike[str] | None, size: str = "B", *, registers: int = 0, dtype: Any = np.float32
) -> dict[str, Any]:
    """Read the parameters of `DINOv2.of_size(size)` from a `.pth` or safetensors file or a folder.

    Args:
        path: `dinov2_vitb14_pretrain.pth`, or the Hugging Face repository's folder or `model.safetensors`.
        size: "S", "B", "L" or "g".
        registers: of the model.
        dtype: of the Linear kernels; everything else is float32.

    Raises:
        UserError: the file is missing (with where to get it), damaged, or of another size.
    """
    width, depth, _ = sizes(size)
    path = check_teacher(path, size, registers)
    return from_torch(
        read_tensors(path),
        width=width,
        depth=depth,
        registers=registers,
        gated=STYLES.get(size, PLAIN).gated,
        dtype=dtype,
        what=str(path),
    )

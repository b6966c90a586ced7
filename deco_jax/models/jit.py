"""JiT, the plain transformer that predicts clean images, as its authors and PixelGen have it.

Sources: Li & He 2025 (JiT, "Back to basics"); PixelGen (arXiv 2602.02493), whose transformer it is too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deco_jax.convert.mapping import MATRIX, TRANSPOSE, VECTOR, Row, Transform, halves, one_to_one
from deco_jax.models import dit
from deco_jax.models.architecture import Architecture
from deco_jax.models.blocks import BlockStyle
from deco_jax.models.dit import DiT, FinalLayer
from deco_jax.models.layers import Linear, RMSNorm, TimestepEmbedding, xavier, zeros
from deco_jax.models.official_names import FIRST_OF_ONE, linear_rows
from deco_jax.models.trunk import RULES, TrunkSettings
from deco_jax.schema import at_least, setting
from deco_jax.shapes import GridAngles, GridPositions, Hidden, Tokens

PERIOD = 10_000.0


@dataclasses.dataclass(frozen=True)
class JiTSettings(TrunkSettings):
    """The settings of JiT."""

    bottleneck: int = setting(
        0, "Channels that a patch is reduced to before it becomes a token; 0: none.", at_least(0, 2**16)
    )


class JiT(DiT):
    """A transformer on patches with fixed positions, biases and, if asked, class tokens among the image's.

    Args:
        bottleneck: channels that a patch is reduced to on its way in; 0: one Linear.
        trunk: see `trunk.Trunk`; class-to-image only.
    """

    style = BlockStyle(use_bias=True, kernel_init=xavier, bias_init=zeros, modulation_init=zeros)

    def __init__(self, *, bottleneck: int = 0, rngs: nnx.Rngs, **trunk: Any) -> None:
        self.bottleneck = bottleneck
        super().__init__(**trunk, rngs=rngs)

    def make_head(self, rngs: nnx.Rngs) -> FinalLayer:
        return FinalLayer(self.width, self.patch_size, norm=RMSNorm(self.width), dtype=self.dtype, rngs=rngs)

    def make_embeddings(self, rngs: nnx.Rngs) -> None:
        options = {"kernel_init": xavier, "dtype": self.dtype, "rngs": rngs}
        inputs = 3 * self.patch_size**2
        if self.bottleneck:
            self.patch_reduce = Linear(inputs, self.bottleneck, use_bias=False, **options)
        self.patch_embed = Linear(self.bottleneck or inputs, self.width, bias_init=zeros, **options)
        self.time_embed = TimestepEmbedding(self.width, period=PERIOD, bias_init=zeros, dtype=self.dtype, rngs=rngs)

    def embed(self, patches: Tokens, rows: int, columns: int) -> Hidden:
        if self.bottleneck:
            patches = self.patch_reduce(patches)
        return self.patch_embed(patches) + jnp.asarray(wave_positions(rows, columns, self.width), self.dtype)

    def angles(self, rows: int, columns: int) -> GridAngles:
        return axis_angles(rows, columns, self.head_width)


def wave_positions(rows: int, columns: int, width: int) -> GridPositions:
    """Return the fixed positions of a grid's patches, float32 [rows · columns, width].

    Half of the channels tell the column, half the row; of each the sines come before the cosines, at the frequencies
    10000^(−k/(width/4)).
    """
    frequencies = PERIOD ** (-np.arange(width // 4) / (width / 4))
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (x, y)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def axis_angles(rows: int, columns: int, head_width: int) -> GridAngles:
    """Return the rotary angles of a grid's patches, float32 [rows · columns, head_width / 2].

    The first half of the pairs of channels turns by the row, the second by the column, both counted in patches, at the
    frequencies 10000^(−2k/(head_width/2)).
    """
    frequencies = PERIOD ** (-2 * np.arange(head_width // 4) / (head_width / 2))
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.concatenate([p.reshape(-1, 1) * frequencies for p in (y, x)], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------- the official weights

# What a file may hold besides weights: positions that follow from the sizes.
FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin", "feat_rope_incontext.freqs_cos",
         "feat_rope_incontext.freqs_sin")  # fmt: skip
POINTWISE = one_to_one("a 1×1 convolution", 4, lambda w: w[:, :, 0, 0].T, lambda k: k.T[:, :, None, None])
BIAS_HALVES = Transform(
    "two halves of a bias", (1,), lambda arrays: np.split(arrays[0], 2), lambda arrays: [np.concatenate(arrays)]
)


def convolution(patch: int) -> Transform:
    """[width, channel, row, column] to [(row, column, channel), width]."""
    return one_to_one(
        f"a convolution of {patch}×{patch} patches",
        4,
        lambda w: w.transpose(2, 3, 1, 0).reshape(3 * patch**2, -1),
        lambda k: k.reshape(patch, patch, 3, k.shape[1]).transpose(3, 2, 0, 1),
    )


def table(model: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the official checkpoints of JiT and PixelGen for a `config.model`."""
    patch, many = model["patch_size"], {"count": model["depth"]}
    rows = [
        *linear_rows("t_embedder.mlp.0", "time_embed.hidden"),
        *linear_rows("t_embedder.mlp.2", "time_embed.out"),
        Row("y_embedder.embedding_table.weight", "label_embed.embedding", MATRIX),
        Row("final_layer.norm_final.weight", "output.norm.scale", VECTOR),
        Row("final_layer.linear.weight", "output.linear.kernel", TRANSPOSE),
        Row("final_layer.linear.bias", "output.linear.bias", VECTOR),
        *linear_rows("final_layer.adaLN_modulation.1", "output.modulation"),
    ]
    if model["context_tokens"]:
        rows.append(Row("in_context_posemb", "context_positions", FIRST_OF_ONE))
    first = "patch_reduce" if model["bottleneck"] else "patch_embed"
    rows.append(Row("x_embedder.proj1.weight", f"{first}.kernel", convolution(patch)))
    if model["bottleneck"]:
        rows += [
            Row("x_embedder.proj2.weight", "patch_embed.kernel", POINTWISE),
            Row("x_embedder.proj2.bias", "patch_embed.bias", VECTOR),
        ]
    else:
        rows.append(Row("x_embedder.proj1.bias", "patch_embed.bias", VECTOR))
    block = "blocks.{i}"
    for name in ("norm1", "norm2"):
        rows.append(Row(f"{block}.{name}.weight", f"blocks.{name}.scale", VECTOR, **many))
    for name in ("q_norm", "k_norm"):
        rows.append(Row(f"{block}.attn.{name}.weight", f"blocks.attention.{name}.scale", VECTOR, **many))
    rows += linear_rows(f"{block}.attn.qkv", "blocks.attention.qkv", **many)
    rows += linear_rows(f"{block}.attn.proj", "blocks.attention.out", **many)
    rows += linear_rows(f"{block}.mlp.w3", "blocks.mlp.down", **many)
    rows += linear_rows(f"{block}.adaLN_modulation.1", "blocks.modulation", **many)
    gate, up = "blocks.mlp.gate", "blocks.mlp.up"
    rows.append(Row(f"{block}.mlp.w12.weight", (f"{gate}.kernel", f"{up}.kernel"), halves(), **many))
    rows.append(Row(f"{block}.mlp.w12.bias", (f"{gate}.bias", f"{up}.bias"), BIAS_HALVES, **many))
    return rows


def flops(model: Mapping[str, Any], height: int, width_px: int) -> dict[str, float]:
    """Count the multiply-adds of a forward pass on one image, by part."""
    parts, patch, reduced = dit.flops(model, height, width_px), model["patch_size"], model["bottleneck"]
    if reduced:
        tokens, inputs = height * width_px // patch**2, 3 * patch**2
        parts["embeddings"] += tokens * ((inputs + model["width"]) * reduced - inputs * model["width"])
    return parts


def fixed(model: Mapping[str, Any], height: int, width: int) -> dict[str, np.ndarray]:
    """Return the positions, which the official files hold as well: {"pos_embed": [1, tokens, width]}."""
    patch = model["patch_size"]
    return {"pos_embed": wave_positions(height // patch, width // patch, model["width"])[None]}


ARCHITECTURE = Architecture(JiT, JiTSettings, flops, RULES, table, fixed=fixed, ignored=FIXED)

"""Rows that the tables of official names share: the trunk's, of Linear layers, and of Linear layers of patches.

The official code holds images as [batch, 3, height, width] and flattens a patch channel first
(index c·P² + row·P + column); ours are [batch, height, width, 3] and a patch is (row, column, channel).
Everything else differs by a transposition only. Source: the parameter names of the published DeCo checkpoints
(arXiv 2511.19365).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deco_jax.convert.mapping import DROP_FIRST, MATRIX, TRANSPOSE, VECTOR, Row, Transform, halves, one_to_one

FIRST_OF_ONE = one_to_one("[1, tokens, width] to [tokens, width]", 3, lambda a: a.squeeze(0), lambda a: a[None])


def trunk_rows(model: Mapping[str, Any], embedder: str) -> list[Row]:
    """Return the rows of embeddings and blocks.

    Args:
        model: `depth` and `patch_size`; `text_width` or `text_depth` above 0 for text to image.
        embedder: the official name of the patches' Linear.
    """
    text_depth = model.get("text_depth", 0)
    text = bool(text_depth or model.get("text_width", 0))
    rows = [
        Row(f"{embedder}.weight", "patch_embed.kernel", patch_in(model["patch_size"])),
        Row(f"{embedder}.bias", "patch_embed.bias", VECTOR),
        *linear_rows("t_embedder.mlp.0", "time_embed.hidden"),
        *linear_rows("t_embedder.mlp.2", "time_embed.out"),
        *_blocks("blocks", "blocks", model["depth"], fused_mlp=text, text_keys=text),
    ]
    if model.get("context_tokens", 0):  # of no official model but JiT, whose name it is
        rows.append(Row("in_context_posemb", "context_positions", FIRST_OF_ONE))
    if not text:
        return [*rows, Row("y_embedder.embedding_table.weight", "label_embed.embedding", MATRIX)]
    rows += linear_rows("y_embedder.proj", "text_embed.proj")
    rows.append(Row("y_embedder.norm.weight", "text_embed.norm.scale", VECTOR))
    rows.append(Row("y_pos_embedding", "text_positions", DROP_FIRST))
    if text_depth:
        rows += _blocks("text_refine_blocks", "text_blocks", text_depth, fused_mlp=True, text_keys=False)
    return rows


def _blocks(torch: str, ours: str, count: int, *, fused_mlp: bool, text_keys: bool) -> list[Row]:
    """Return the rows of transformer blocks; gate and up are two matrices in class-to-image, one in text-to-image."""
    torch, many = f"{torch}.{{i}}", {"count": count}
    qkv = "qkv_x" if text_keys else "qkv"
    rows = [
        Row(f"{torch}.norm1.weight", f"{ours}.norm1.scale", VECTOR, **many),
        Row(f"{torch}.attn.{qkv}.weight", f"{ours}.attention.qkv.kernel", TRANSPOSE, **many),
        Row(f"{torch}.attn.q_norm.weight", f"{ours}.attention.q_norm.scale", VECTOR, **many),
        Row(f"{torch}.attn.k_norm.weight", f"{ours}.attention.k_norm.scale", VECTOR, **many),
        *linear_rows(f"{torch}.attn.proj", f"{ours}.attention.out", **many),
        Row(f"{torch}.norm2.weight", f"{ours}.norm2.scale", VECTOR, **many),
        *linear_rows(f"{torch}.adaLN_modulation.0", f"{ours}.modulation", **many),
    ]
    if text_keys:
        rows.append(Row(f"{torch}.attn.kv_y.weight", f"{ours}.attention.text_kv.kernel", TRANSPOSE, **many))
    gate, up, down = (f"{ours}.mlp.{name}.kernel" for name in ("gate", "up", "down"))
    if fused_mlp:
        rows.append(Row(f"{torch}.mlp.w12.weight", (gate, up), halves(), **many))
        rows.append(Row(f"{torch}.mlp.w3.weight", down, TRANSPOSE, **many))
    else:
        rows.append(Row(f"{torch}.mlp.w1.weight", gate, TRANSPOSE, **many))
        rows.append(Row(f"{torch}.mlp.w3.weight", up, TRANSPOSE, **many))
        rows.append(Row(f"{torch}.mlp.w2.weight", down, TRANSPOSE, **many))
    return rows


def linear_rows(torch: str, ours: str, **blocks: Any) -> list[Row]:
    """Return the rows of a Linear's matrix and bias."""
    return [
        Row(f"{torch}.weight", f"{ours}.kernel", TRANSPOSE, **blocks),
        Row(f"{torch}.bias", f"{ours}.bias", VECTOR, **blocks),
    ]


def patch_in(patch: int) -> Transform:
    """[width, (channel, row, column)] to [(row, column, channel), width]."""
    return one_to_one(
        f"a Linear from {patch}×{patch} patches",
        2,
        lambda w: w.reshape(len(w), 3, patch, patch).transpose(2, 3, 1, 0).reshape(3 * patch**2, -1),
        lambda k: k.reshape(patch, patch, 3, k.shape[1]).transpose(3, 2, 0, 1).reshape(-1, 3 * patch**2),
    )


def patch_out(patch: int) -> Transform:
    """[(channel, row, column), width] to [width, (row, column, channel)]."""
    return one_to_one(
        f"a Linear to {patch}×{patch} patches",
        2,
        lambda w: w.reshape(3, patch, patch, w.shape[1]).transpose(3, 1, 2, 0).reshape(-1, 3 * patch**2),
        lambda k: k.reshape(len(k), patch, patch, 3).transpose(3, 1, 2, 0).reshape(3 * patch**2, -1),
    )


def patch_out_bias(patch: int) -> Transform:
    """[(channel, row, column)] to [(row, column, channel)]."""
    return one_to_one(
        f"the bias of a Linear to {patch}×{patch} patches",
        1,
        lambda b: b.reshape(3, patch, patch).transpose(1, 2, 0).ravel(),
        lambda b: b.reshape(patch, patch, 3).transpose(2, 0, 1).ravel(),
    )

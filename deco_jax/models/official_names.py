"""Rows that the tables of official names share: Linear layers, and Linear layers of patches.

The official code holds images as [batch, 3, height, width] and flattens a patch channel first
(index c·P² + row·P + column); ours are [batch, height, width, 3] and a patch is (row, column, channel).
Everything else differs by a transposition only.
"""

from __future__ import annotations

from typing import Any

from deco_jax.convert.mapping import TRANSPOSE, VECTOR, Row, Transform, one_to_one


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

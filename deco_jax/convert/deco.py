"""Converts a denoiser and the REPA projector: the official checkpoints' tensors ↔ our parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from deco_jax.convert.mapping import TRANSPOSE, VECTOR, Row, to_ours
from deco_jax.convert.mapping import to_torch as table_to_torch
from deco_jax.convert.mapping import unread as table_unread
from deco_jax.errors import UserError
from deco_jax.models import class_token
from deco_jax.models.network import architecture
from deco_jax.models.official_names import linear_rows

PROJECTOR: list[Row] = [
    Row(f"0.{index}.{torch}", f"{name}.{ours}", transform)
    for index, name in ((0, "first"), (2, "second"), (4, "third"))
    for torch, ours, transform in (("weight", "kernel", TRANSPOSE), ("bias", "bias", VECTOR))
]


def table(model: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a denoiser, from its file in models/.

    Args:
        model: the config's `model` section.

    Raises:
        UserError: no such model.
    """
    rows = architecture(model["name"]).table(model)
    if model.get("class_token"):
        rows = [*rows, *class_token.rows()]
    return [*rows, *_mean_velocity(rows)] if model.get("mean_velocity") else rows


def _mean_velocity(rows: list[Row]) -> list[Row]:
    """Return the rows of what MeanFlow adds, under our own names: a second head, and the embedding of jumps."""
    heads = [
        dataclasses.replace(row, torch=f"velocity_head.{row.torch}", ours=f"velocity_{row.ours}")
        for row in rows
        if isinstance(row.ours, str) and row.ours.startswith(("output.", "decoder."))
    ]
    return [
        *heads,
        *linear_rows("jump_embedder.mlp.0", "jump_embed.hidden"),
        *linear_rows("jump_embedder.mlp.2", "jump_embed.out"),
    ]


def from_torch(
    model: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any] | None = None,
    dtype: Any = None,
    what: str = "the checkpoint",
) -> dict[str, Any]:
    """Convert a denoiser's official tensors (names without `denoiser.`) to our parameters; see `mapping.to_ours`.

    Args:
        dtype: of all parameters; None keeps the file's.
    """
    ignore = architecture(model["name"]).ignored
    return to_ours(table(model), tensors, like=like, dtype=dtype and (lambda _: dtype), ignore=ignore, what=what)


def unread(
    model: Any, tensors: Mapping[str, np.ndarray], *, like: Mapping[str, Any], dtype: Any, what: str = "the checkpoint"
) -> dict[str, Any]:
    """Do the same as `from_torch`, with arrays that are only read when they are needed; see `mapping.unread`."""
    ignore = architecture(model["name"]).ignored
    return table_unread(table(model), tensors, like=like, dtype=dtype, ignore=ignore, what=what)


def to_torch(model: Any, params: Mapping[str, Any], *, consume: bool = False) -> dict[str, np.ndarray]:
    """Convert a denoiser's parameters to the official names and layouts; the inverse of `from_torch`.

    Args:
        consume: see `mapping.to_torch`.
    """
    return table_to_torch(table(model), params, consume=consume)


def fixed(model: Any, sides: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the tensors of an official file that follow from the model's and the image's sizes."""
    return architecture(model["name"]).fixed(model, *sides)


def check_fixed(model: Any, sides: tuple[int, int], tensors: Mapping[str, np.ndarray], what: str) -> None:
    """Raise UserError if such tensors in a file belong to another image size."""
    for name, expected in fixed(model, sides).items():
        if name in tensors:
            found = np.asarray(tensors[name], np.float32)
            if found.shape != expected.shape or not np.allclose(found, expected, atol=1e-2):
                raise UserError(
                    f"{what}: its {name} {found.shape} doesn't fit {sides[0]}x{sides[1]} pixels {expected.shape}; "
                    "set config.data.image_size to the size that it was trained on"
                )


def projector_from_torch(
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any] | None = None,
    dtype: Any = None,
    what: str = "the checkpoint",
) -> dict[str, Any]:
    """Convert the REPA projector's official tensors (names without `diffusion_trainer.proj.`) to our parameters."""
    return to_ours(PROJECTOR, tensors, like=like, dtype=dtype and (lambda _: dtype), what=what)


def projector_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert our projector's parameters to the official names; the inverse of `projector_from_torch`."""
    return table_to_torch(PROJECTOR, params)

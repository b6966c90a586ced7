"""Class labels as the condition of a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deco_jax.data.pipeline import EncodeCaption

Batch = dict[str, jax.Array]


class Classes:
    """Labels 0..num_classes − 1; num_classes means "no class".

    Args:
        names: of the classes, in the order of their labels; None if they aren't known.
    """

    encode_caption: EncodeCaption | None = None

    def __init__(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        self.num_classes, self.names = num_classes, names
        self.inputs: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((), jnp.int32)}
        self.shapes: dict[str, Any] = {}

    def load(self) -> dict[str, Any]:
        return {}

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        return batch["label"]

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        return jnp.asarray(self.num_classes, jnp.int32)

"""What a denoiser is conditioned on: classes or texts, with one interface for training, sampling and measuring.

Inside jit, `context(frozen, batch)` and `null(frozen)` return the model's `context`: labels, or text features. `frozen`
has the arrays that aren't trained (the text encoder's weights, the null features). They are an argument of the compiled
step, so none of them becomes a constant of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import ml_collections
from jax.sharding import Mesh

from deco_jax.conditioning import encoders
from deco_jax.conditioning.classes import Classes
from deco_jax.conditioning.texts import NO_ENCODER, Texts, open_features
from deco_jax.data.pipeline import EncodeCaption
from deco_jax.data.sources import Source, check_classes
from deco_jax.errors import UserError

Batch = dict[str, jax.Array]


class Condition(Protocol):
    """Classes or texts, as they enter a training step."""

    # What a batch holds besides images: shape and type per sample, by name.
    inputs: dict[str, tuple[tuple[int, ...], Any]]
    # (index of the sample, caption) → arrays for the batch, for data workers; None: nothing is encoded.
    encode_caption: EncodeCaption | None
    # Of `frozen`, with shardings.
    shapes: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """Load `frozen` onto the mesh."""
        ...

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        """Return labels int32 [batch], or features [batch, length, text_width]."""
        ...

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        """Return the null condition, int32 [] or [length, text_width]."""
        ...


def open_condition(
    config: ml_collections.ConfigDict, mesh: Mesh, source: Source | None, class_names: Sequence[str] | None = None
) -> Condition:
    """Open the condition that config.model asks for.

    Args:
        source: of the data; None if only given prompts (or classes) are drawn.
        class_names: in the order of the labels; by default those of `source`.

    Raises:
        UserError: the data lacks what the model is conditioned on, or the encoder's files or features are missing.
    """
    if source is not None:
        check_classes(source, config.model.num_classes)
        class_names = class_names or source.class_names
    if not config.model.text_width:
        return Classes(config.model.num_classes, class_names)
    features = open_features(config, source) if config.text.features and source is not None else None
    if features is not None and source is not None:
        features.check(source)
    # If features are stored, the encoder is only needed for prompts.
    known = features is None or config.text.path or config.text.encoder == "bytes"
    if not known and config.sample.negative_prompt:
        raise UserError(NO_ENCODER)
    return Texts(config, mesh, source, encoders.open_encoder(config) if known else None, features)


def abstract_condition(config: ml_collections.ConfigDict, mesh: Mesh) -> Condition:
    """Make the condition for its shapes only; no file needs to exist."""
    if not config.model.text_width:
        return Classes(config.model.num_classes)
    return Texts(config, mesh, None, encoders.abstract_encoder(config), bool(config.text.features))

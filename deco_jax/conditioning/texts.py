"""Captions as the condition of a denoiser: encoded by a frozen network in the step, or read from stored features."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning import encoders
from deco_jax.data.features import Features
from deco_jax.data.pipeline import EncodeCaption
from deco_jax.data.sources import Source
from deco_jax.errors import UserError
from deco_jax.run import distributed, sharding

Batch = dict[str, jax.Array]
NO_ENCODER = (
    "a prompt needs the text encoder, but config.text.path is empty; set it, or leave config.sample.prompts and "
    "config.sample.negative_prompt empty to draw the data's captions"
)


def open_features(config: ml_collections.ConfigDict, source: Source) -> Features:
    """Open what --mode=encode wrote, or began, in config.text.features; UserError if it belongs to something else."""
    return Features(os.path.expanduser(config.text.features), features_key(config, source))


def features_key(config: ml_collections.ConfigDict, source: Source) -> dict[str, Any]:
    """Return what stored features depend on besides the captions; without the encoder if no path to one is set."""
    key: dict[str, Any] = {
        "captions": len(source) * source.num_captions,
        "length": config.model.text_length,
        "width": config.model.text_width,
        "prefix": config.text.prefix,
    }
    if config.text.path or config.text.encoder == "bytes":
        key["encoder"] = encoders.open_encoder(config).fingerprint
    return key


class Texts:
    """Features of captions: encoded by a frozen network in the step, or read from where --mode=encode stored them.

    Args:
        source: of captions; None: there are only given prompts.
        encoder: None if features are stored and no encoder is given.
        features: what --mode=encode wrote, or true for its shapes only; None: captions are encoded in the step.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        source: Source | None,
        encoder: encoders.Encoder | None,
        features: Features | bool | None,
    ) -> None:
        length, width = config.model.text_length, config.model.text_width
        self.source, self.features, self.prefix = source, features, config.text.prefix
        self._mesh, self._encoder = mesh, encoder
        shapes: dict[str, Any] = {"null": jax.ShapeDtypeStruct((length, width), jnp.bfloat16)}
        self.inputs: dict[str, tuple[tuple[int, ...], Any]] = {"text": ((length, width), jnp.uint16)}
        self.encode_caption: EncodeCaption | None = None
        if isinstance(features, Features):
            self.encode_caption = features
        elif encoder is not None and not features:
            self.inputs = {"tokens": ((length,), jnp.int32), "mask": ((length,), jnp.bool_)}
            self.encode_caption = TokenizeCaption(encoder.tokenizer, config.text.prefix)
            shapes["encoder"] = encoder.network.shapes
        self.shapes = sharding.placed_shapes(mesh, shapes)

    def load(self) -> dict[str, Any]:
        weights = {"encoder": self.load_encoder()} if "encoder" in self.shapes else {}
        if isinstance(self.features, Features):
            null = self.features.null.view(ml_dtypes.bfloat16)
        else:
            null = self.encode(weights["encoder"], [""])[0]
        return {**weights, "null": jax.device_put(null, self.shapes["null"].sharding)}

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        if "text" in batch:
            return jax.lax.bitcast_convert_type(batch["text"], jnp.bfloat16)
        assert self._encoder is not None
        return self._encoder.network.apply(frozen["encoder"], batch["tokens"], batch["mask"])

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        return frozen["null"]

    # ------------------------------------------------------------------ outside the step

    def load_encoder(self) -> Any:
        """Load the encoder's weights onto the mesh."""
        if self._encoder is None:
            raise UserError(NO_ENCODER)
        with distributed.stage("reading the text encoder"):
            where = sharding.placed_shapes(self._mesh, {"encoder": self._encoder.network.shapes})["encoder"]
            return jax.device_put(self._encoder.network.load(), jax.tree.map(lambda leaf: leaf.sharding, where))

    def encode(self, weights: Any, captions: Sequence[str]) -> np.ndarray:
        """Encode captions to features, bfloat16 [captions, length, text_width], on every host."""
        assert self._encoder is not None
        count = len(captions)
        # Empty captions pad the batch to a multiple of the number of devices.
        filled = [*captions, *[""] * (-count % self._mesh.size)]
        tokenized = [self._encoder.tokenizer(caption) for caption in filled]
        batch = {name: np.stack([one[name] for one in tokenized]) for name in ("tokens", "mask")}
        return np.asarray(self._encode(weights, **sharding.place_everywhere(self._mesh, batch)))[:count]

    @functools.cached_property
    def _encode(self) -> Callable[..., jax.Array]:
        assert self._encoder is not None
        apply, mesh = self._encoder.network.apply, self._mesh

        def encode(weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            arguments = (sharding.specs(mesh, {"encoder": weights})["encoder"], sharding.BATCH, sharding.BATCH)
            return sharding.each_device(apply, mesh, arguments, sharding.BATCH)(weights, tokens, mask)

        return jax.jit(encode, out_shardings=sharding.replicated(mesh))


class TokenizeCaption:
    """A tokenizer as data workers call it."""

    def __init__(self, tokenizer: encoders.Tokenizer, prefix: str) -> None:
        self._tokenizer, self._prefix = tokenizer, prefix

    def __call__(self, index: int, caption: str) -> dict[str, np.ndarray]:
        return self._tokenizer(encoders.prefixed(caption, self._prefix))

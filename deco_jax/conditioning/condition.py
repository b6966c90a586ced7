"""What a denoiser is conditioned on: classes or texts, one interface for training, sampling and measuring.

Inside jit, `context(frozen, batch)` and `null(frozen)` are what the model takes as `context`: labels, or text
features. `frozen` are arrays that never train (the text encoder's weights, the null features); they travel as an
argument of the compiled step, so that none of them is a constant of the program.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning import text
from deco_jax.data.features import Features, read_caption
from deco_jax.data.pipeline import EncodeCaption
from deco_jax.data.sources import Source, check_classes
from deco_jax.errors import UserError
from deco_jax.run import distributed, sharding

Batch = dict[str, jax.Array]
NO_ENCODER = (
    "a prompt needs the text encoder, and config.text.path is empty; set it, or leave config.sample.prompts and "
    "config.sample.negative_prompt empty to draw the data's captions"
)


@dataclasses.dataclass(frozen=True)
class Requests:
    """Images to draw, by index.

    context: indices [n] → labels int32 [n], or features bfloat16 [n, length, text_width]
    null: what stands for no condition: int32 [], or [length, text_width]
    names: for each image its caption; None: classes in their order
    """

    count: int
    context: Callable[[np.ndarray], np.ndarray]
    null: np.ndarray
    names: Sequence[str] | None = None

    def spread(self, most: int) -> Requests:
        """At most `most` of them, evenly spread; with their number their noise changes, not their conditions."""
        if self.count <= most:
            return self
        chosen, context = np.arange(most, dtype=np.int64) * self.count // most, self.context
        names = None if self.names is None else [self.names[i] for i in chosen.tolist()]
        return Requests(most, lambda index: context(chosen[index]), self.null, names)

    def kept(self, batch_size: int) -> Requests:
        """The same with all contexts computed now, `batch_size` at a time, so that no encoder is needed later."""
        index = [np.arange(first, first + batch_size) for first in range(0, self.count, batch_size)]
        contexts = np.concatenate([self.context(np.minimum(i, self.count - 1)) for i in index])
        return dataclasses.replace(self, context=contexts.__getitem__)


class Condition(Protocol):
    """Classes or texts."""

    # What a batch holds besides images, a sample's shape and type by name.
    inputs: dict[str, tuple[tuple[int, ...], Any]]
    # (index of the sample, caption) → arrays for the batch, for data workers; None: nothing is encoded.
    encode_caption: EncodeCaption | None
    # Of `frozen`, with shardings.
    shapes: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """`frozen`, on the mesh."""
        ...

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        """Labels int32 [batch], or features [batch, length, text_width]."""
        ...

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        """int32 [], or [length, text_width]."""
        ...

    def requests(self, count: int, frozen: dict[str, Any] | None = None) -> Requests:
        """`count` images, spread evenly over the classes, or over the data's captions.

        Args:
            frozen: `load`'s, where it is there already.
        """
        ...

    def names(self, count: int) -> Sequence[str] | None:
        """The captions of `requests(count)`; None of classes."""
        ...


def open_condition(config: ml_collections.ConfigDict, mesh: Mesh, source: Source | None) -> Condition:
    """The condition that config.model asks for.

    Args:
        source: of the data; None where only given prompts (or classes) are drawn.

    Raises:
        UserError: the data has not what the model is conditioned on, or the encoder's files or features are missing.
    """
    if source is not None:
        check_classes(source, config.model.num_classes)
    if not config.model.text_width:
        return Classes(config.model.num_classes)
    features = open_features(config, source) if config.text.features and source is not None else None
    if features is not None and source is not None:
        features.check(source)
    # With its features kept, the encoder is needed for prompts alone.
    known = features is None or config.text.path or config.text.encoder == "bytes"
    if not known and config.sample.negative_prompt:
        raise UserError(NO_ENCODER)
    return Texts(config, mesh, source, text.open_encoder(config) if known else None, features)


def open_features(config: ml_collections.ConfigDict, source: Source) -> Features:
    """What --mode=encode left, or has begun, in config.text.features. UserError if it is of something else."""
    return Features(os.path.expanduser(config.text.features), features_key(config, source))


def features_key(config: ml_collections.ConfigDict, source: Source) -> dict[str, Any]:
    """What stored features depend on besides the captions; without the encoder where no path to one is set."""
    key: dict[str, Any] = {
        "captions": len(source),
        "length": config.model.text_length,
        "width": config.model.text_width,
        "prefix": config.text.prefix,
    }
    if config.text.path or config.text.encoder == "bytes":
        key["encoder"] = text.open_encoder(config).fingerprint
    return key


def abstract_condition(config: ml_collections.ConfigDict, mesh: Mesh) -> Condition:
    """The same for its shapes alone: no file needs to be there."""
    if not config.model.text_width:
        return Classes(config.model.num_classes)
    return Texts(config, mesh, None, text.abstract_encoder(config), bool(config.text.features))


# ---------------------------------------------------------------------------------------- classes


class Classes:
    """Labels 0..num_classes − 1; num_classes means "no class"."""

    encode_caption: EncodeCaption | None = None

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.inputs: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((), jnp.int32)}
        self.shapes: dict[str, Any] = {}

    def load(self) -> dict[str, Any]:
        return {}

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        return batch["label"]

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        return jnp.asarray(self.num_classes, jnp.int32)

    def requests(self, count: int, frozen: dict[str, Any] | None = None) -> Requests:
        """In class order, as many of each class as of any other (to within one)."""
        labels = (np.arange(count, dtype=np.int64) * self.num_classes // count).astype(np.int32)
        return Requests(count, labels.__getitem__, np.asarray(self.num_classes, np.int32))

    def names(self, count: int) -> None:
        return None


# ---------------------------------------------------------------------------------------- texts


class Texts:
    """Features of captions: encoded by a frozen network in the step, or read from where --mode=encode kept them.

    Args:
        source: of captions; None: there are only given prompts.
        encoder: None where features are stored and no encoder is named.
        features: what --mode=encode left, or true for its shapes alone; None: captions are encoded in the step.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        source: Source | None,
        encoder: text.Encoder | None,
        features: Features | bool | None,
    ) -> None:
        length, width = self._shape = (config.model.text_length, config.model.text_width)
        self._mesh, self._source, self._encoder, self._features = mesh, source, encoder, features
        self._prefix = config.text.prefix
        self._negative = config.sample.negative_prompt.strip()
        shapes: dict[str, Any] = {"null": jax.ShapeDtypeStruct(self._shape, jnp.bfloat16)}
        self.inputs: dict[str, tuple[tuple[int, ...], Any]] = {"text": ((length, width), jnp.uint16)}
        self.encode_caption: EncodeCaption | None = None
        if isinstance(features, Features):
            self.encode_caption = features
        elif encoder is not None and not features:
            self.inputs = {"tokens": ((length,), jnp.int32), "mask": ((length,), jnp.bool_)}
            self.encode_caption = TokenizeCaption(encoder.tokenizer, config.text.prefix)
            shapes["encoder"] = encoder.shapes
        self.shapes = sharding.placed_shapes(mesh, shapes)

    def load(self) -> dict[str, Any]:
        weights = {"encoder": self.load_encoder()} if "encoder" in self.shapes else {}
        if isinstance(self._features, Features):
            null = self._features.null.view(ml_dtypes.bfloat16)
        else:
            null = self.encode(weights["encoder"], [""])[0]
        return {**weights, "null": jax.device_put(null, self.shapes["null"].sharding)}

    def context(self, frozen: dict[str, Any], batch: Batch) -> jax.Array:
        if "text" in batch:
            return jax.lax.bitcast_convert_type(batch["text"], jnp.bfloat16)
        assert self._encoder is not None
        return self._encoder.apply(frozen["encoder"], batch["tokens"], batch["mask"])

    def null(self, frozen: dict[str, Any]) -> jax.Array:
        return frozen["null"]

    # ------------------------------------------------------------------ outside the step

    def load_encoder(self) -> Any:
        """The encoder's weights, on the mesh."""
        if self._encoder is None:
            raise UserError(NO_ENCODER)
        with distributed.stage("reading the text encoder"):
            where = sharding.placed_shapes(self._mesh, {"encoder": self._encoder.shapes})["encoder"]
            return jax.device_put(self._encoder.load(), jax.tree.map(lambda leaf: leaf.sharding, where))

    def encode(self, weights: Any, captions: Sequence[str]) -> np.ndarray:
        """Captions to features, bfloat16 [captions, length, text_width], on every host."""
        assert self._encoder is not None
        count = len(captions)
        # Empty captions fill the batch up to a multiple of the devices.
        filled = [*captions, *[""] * (-count % self._mesh.size)]
        tokenized = [self._encoder.tokenizer(caption) for caption in filled]
        batch = {name: np.stack([one[name] for one in tokenized]) for name in ("tokens", "mask")}
        return np.asarray(self._encode(weights, **sharding.place_everywhere(self._mesh, batch)))[:count]

    @functools.cached_property
    def _encode(self) -> Callable[..., jax.Array]:
        assert self._encoder is not None
        apply, mesh = self._encoder.apply, self._mesh

        def encode(weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            arguments = (sharding.specs(mesh, {"encoder": weights})["encoder"], sharding.BATCH, sharding.BATCH)
            return sharding.each_device(apply, mesh, arguments, sharding.BATCH)(weights, tokens, mask)

        return jax.jit(encode, out_shardings=sharding.replicated(mesh))

    def requests(self, count: int, frozen: dict[str, Any] | None = None) -> Requests:
        """`count` images of the data's captions, spread evenly over the data.

        Args:
            frozen: `load`'s, where it is there already.
        """
        names, features = self.names(count), self._features
        if not isinstance(features, Features):
            # As they are trained on, and as the stored features are.
            prompts = CaptionsOf(names.source, names.indices, self._prefix)
            return dataclasses.replace(self.prompted(prompts, frozen), names=names)

        def context(index: np.ndarray) -> np.ndarray:
            return np.stack([features[int(i)] for i in names.indices[index]]).view(ml_dtypes.bfloat16)

        null = self._null(None, frozen) if self._negative else features.null.view(ml_dtypes.bfloat16)
        return Requests(count, context, null, names)

    def names(self, count: int) -> CaptionsOf:
        assert self._source is not None
        return CaptionsOf(self._source, np.arange(count, dtype=np.int64) * len(self._source) // count)

    def prompted(self, prompts: Sequence[str], frozen: dict[str, Any] | None = None) -> Requests:
        """An image of each prompt."""
        weights = frozen["encoder"] if frozen and "encoder" in frozen else self.load_encoder()

        def context(index: np.ndarray) -> np.ndarray:
            return self.encode(weights, [prompts[int(i)] for i in index])

        return Requests(len(prompts), context, self._null(weights, frozen), prompts)

    def _null(self, weights: Any, frozen: dict[str, Any] | None) -> np.ndarray:
        """Features of the negative prompt."""
        if frozen and not self._negative:
            return np.asarray(frozen["null"])
        return self.encode(self.load_encoder() if weights is None else weights, [self._negative])[0]


class TokenizeCaption:
    """A tokenizer as data workers call it."""

    def __init__(self, tokenizer: text.Tokenizer, prefix: str) -> None:
        self._tokenizer, self._prefix = tokenizer, prefix

    def __call__(self, index: int, caption: str) -> dict[str, np.ndarray]:
        return self._tokenizer(text.prefixed(caption, self._prefix))


class CaptionsOf(Sequence[str]):
    """The captions of some of a source's samples, read when they are asked for.

    Args:
        prefix: before those that are trained on with it, as `text.prefixed` says.
    """

    def __init__(self, source: Source, indices: np.ndarray, prefix: str = "") -> None:
        self.source, self.indices, self._prefix = source, indices, prefix

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return text.prefixed(read_caption(self.source, int(self.indices[i])), self._prefix)

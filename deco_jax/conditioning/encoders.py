"""Captions to what a text-to-image model reads: tokens in the data workers, features on the device.

    caption ─ tokenizer ─ tokens, mask ─ frozen encoder ─ features bfloat16 [batch, length, width]

Two encoders: "qwen3" (Qwen3's last hidden state, from a Hugging Face folder), and "bytes", which knows no language and
needs no file: each of the caption's UTF-8 bytes one-hot, so that the model's first Linear is a table of embeddings
that learns with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from deco_jax.config import BYTE_WIDTH
from deco_jax.data.features import caption_hash
from deco_jax.errors import UserError
from deco_jax.models import qwen3
from deco_jax.models.network import FrozenNetwork
from deco_jax.run import fetch

PADDING_TOKEN = "<|endoftext|>"
BYTE_PADDING = BYTE_WIDTH - 1
SHORT_CAPTION = 30  # words; from here on captions get no prefix
# One caption → {"tokens": int32 [length], "mask": bool [length]}
Tokenizer = Callable[[str], dict[str, np.ndarray]]


class Encoder(NamedTuple):
    """A frozen text encoder and what goes before it.

    tokenizer: one caption to tokens and mask
    network: (weights, tokens, mask) → bfloat16 [batch, length, width]; its FLOPs are of one caption of so many tokens
    fingerprint: equal for equal features
    """

    tokenizer: Tokenizer
    network: FrozenNetwork
    fingerprint: str


def prefixed(caption: str, prefix: str) -> str:
    """The caption as it is trained on: half of those under SHORT_CAPTION words have `prefix` before them.

    Which half depends on the caption alone, so that features encoded once are those of every epoch.
    """
    if not prefix or len(caption.split()) >= SHORT_CAPTION or int(caption_hash(caption)) % 2:
        return caption
    return prefix + caption


def open_encoder(config: ml_collections.ConfigDict) -> Encoder:
    """The encoder of config.text, its files checked but its weights not yet read.

    Raises:
        UserError: files are missing (with where to get them) or damaged.
    """
    length, width, path = (
        config.model.text_length,
        config.model.text_width,
        os.fspath(fetch.local(os.path.expanduser(config.text.path))) if config.text.path else "",
    )
    if config.text.encoder == "bytes":
        identity = json.dumps(["bytes", length, width])
        network = FrozenNetwork(functools.partial(byte_features, width=width), {}, dict, lambda length: 0.0)
        return Encoder(ByteTokenizer(length), network, _digest(identity))
    sizes = qwen3.check_encoder(path)
    if sizes.width != width:
        logging.log_first_n(
            logging.WARNING,
            "%s has %d channels and config.model.text_width is %d: its features are %s",
            1,
            path,
            sizes.width,
            width,
            "cut" if sizes.width > width else "filled up with zeros",
        )
    tokenizer = FileTokenizer(os.path.join(path, "tokenizer.json"), length)
    tokenizer("")
    # "frequencies": features that were kept before these were rounded are of another encoder.
    arithmetic = [config.text.dtype, *(["frequencies"] if config.text.dtype == "bfloat16" else [])]
    identity = json.dumps(["qwen3", length, width, *arithmetic, _files(Path(path))])
    return Encoder(tokenizer, qwen3.text_encoder(sizes, path, config.text.dtype, width), _digest(identity))


def abstract_encoder(config: ml_collections.ConfigDict) -> Encoder:
    """The encoder for its shapes alone: that of config.text.path, of which only config.json
    is read, or if it is empty Qwen3-1.7B."""
    if config.text.encoder == "bytes":
        return open_encoder(config)
    path = os.path.expanduser(config.text.path)
    sizes = qwen3.check_encoder(path) if path else qwen3.Sizes()
    return Encoder(_no_files, qwen3.text_encoder(sizes, path, config.text.dtype, config.model.text_width), "")


def _no_files(*_: Any) -> Any:
    raise TypeError("only the shapes are used")


def byte_features(params: Any, tokens: jax.Array, mask: jax.Array, *, width: int) -> jax.Array:
    """One-hot bfloat16 [batch, length, width]; channel BYTE_PADDING is padding."""
    del params, mask
    return jax.nn.one_hot(tokens, width, dtype=jnp.bfloat16)


# ---------------------------------------------------------------------------------------- tokenizers


def _padded(tokens: list[int], length: int, padding: int) -> dict[str, np.ndarray]:
    """Cut or padded on the right to `length`; the mask is true where there is text."""
    tokens = tokens[:length]
    filled = np.full(length, padding, np.int32)
    filled[: len(tokens)] = tokens
    return {"tokens": filled, "mask": np.arange(length) < len(tokens)}


class ByteTokenizer:
    """UTF-8 bytes, no words."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        return _padded(list(caption.encode("utf-8", "replace")), self.length, BYTE_PADDING)


class FileTokenizer:
    """A Hugging Face `tokenizer.json`: no chat template, nothing before or after the caption.

    Pickled to worker processes as its path. Raises UserError where the file or the package is missing.
    """

    def __init__(self, path: str, length: int) -> None:
        self.path, self.length = path, length

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("reading captions for Qwen3 needs tokenizers; run: pip install tokenizers") from error
        if not os.path.isfile(self.path):
            raise UserError(f"{self.path}: no such file, and the text encoder's tokenizer is in it; {qwen3.WHERE}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the package raises plain Exceptions
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"{self.path}: no readable tokenizer ({reason}); {qwen3.WHERE}") from error
        if tokenizer.token_to_id(PADDING_TOKEN) is None:
            raise UserError(f"{self.path}: has no {PADDING_TOKEN}, which Qwen3's captions are padded with")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the file itself.
        return {"path": self.path, "length": self.length}

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        tokenizer = self._tokenizer
        tokens = tokenizer.encode(caption, add_special_tokens=False).ids
        return _padded(tokens, self.length, tokenizer.token_to_id(PADDING_TOKEN))


# ---------------------------------------------------------------------------------------- identity


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[list[Any]]:
    """What an encoder's folder holds: small files whole, of weights the size and 64 KiB at 64 places."""
    found: list[list[Any]] = []
    for path in sorted([folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors")]):
        size, content = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            whole = size <= 2**22 or path.suffix == ".json"
            for start in [0] if whole else np.linspace(0, size - 2**16, 64).astype(int).tolist():
                file.seek(start)
                content.update(file.read() if whole else file.read(2**16))
        found.append([path.name, size, content.hexdigest()])
    return found

"""Turns captions into the input of a text-to-image model: tokens in the data workers, features on the device.

    caption ─ tokenizer ─ tokens, mask ─ frozen encoder ─ features bfloat16 [batch, length, width]

There are two encoders: "qwen3" (Qwen3's last hidden state, from a Hugging Face folder), and "bytes", which knows no
language and needs no file. It encodes each UTF-8 byte of the caption as one-hot, so the model's first Linear becomes a
trained embedding table.
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
from deco_jax.errors import UserError, reason
from deco_jax.models import qwen3
from deco_jax.models.network import FrozenNetwork
from deco_jax.run import fetch

PADDING_TOKEN = "<|endoftext|>"
BYTE_PADDING = BYTE_WIDTH - 1
SHORT_CAPTION = 30  # words; from here on captions get no prefix
# One caption → {"tokens": int32 [length], "mask": bool [length]}
Tokenizer = Callable[[str], dict[str, np.ndarray]]


class Encoder(NamedTuple):
    """A frozen text encoder and its tokenizer.

    tokenizer: turns one caption into tokens and mask
    network: (weights, tokens, mask) → bfloat16 [batch, length, width]; its FLOPs are those of one caption
    fingerprint: equal for equal features
    """

    tokenizer: Tokenizer
    network: FrozenNetwork
    fingerprint: str


def prefixed(caption: str, prefix: str) -> str:
    """Return the caption used in training: half of the captions under SHORT_CAPTION words get `prefix`.

    Which half only depends on the caption, so that features that are encoded once are valid in every epoch.
    """
    if not prefix or len(caption.split()) >= SHORT_CAPTION or int(caption_hash(caption)) % 2:
        return caption
    return prefix + caption


def open_encoder(config: ml_collections.ConfigDict) -> Encoder:
    """Open the encoder of config.text: check its files, but don't read its weights yet.

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
            "cut" if sizes.width > width else "padded with zeros",
        )
    tokenizer = FileTokenizer(os.path.join(path, "tokenizer.json"), length)
    tokenizer("")
    # "frequencies": features stored before these were rounded belong to another encoder.
    arithmetic = [config.text.dtype, *(["frequencies"] if config.text.dtype == "bfloat16" else [])]
    identity = json.dumps(["qwen3", length, width, *arithmetic, _files(Path(path))])
    return Encoder(tokenizer, qwen3.text_encoder(sizes, path, config.text.dtype, width), _digest(identity))


def abstract_encoder(config: ml_collections.ConfigDict) -> Encoder:
    """Make the encoder for its shapes only: that of config.text.path, reading only config.json, or else Qwen3-1.7B."""
    if config.text.encoder == "bytes":
        return open_encoder(config)
    path = os.path.expanduser(config.text.path)
    sizes = qwen3.check_encoder(path) if path else qwen3.Sizes()
    return Encoder(_no_files, qwen3.text_encoder(sizes, path, config.text.dtype, config.model.text_width), "")


def _no_files(*_: Any) -> Any:
    raise TypeError("only the shapes are used")


def byte_features(params: Any, tokens: jax.Array, mask: jax.Array, *, width: int) -> jax.Array:
    """Encode bytes as one-hot bfloat16 [batch, length, width]; channel BYTE_PADDING is padding."""
    del params, mask
    return jax.nn.one_hot(tokens, width, dtype=jnp.bfloat16)


# ---------------------------------------------------------------------------------------- tokenizers


def _padded(tokens: list[int], length: int, padding: int) -> dict[str, np.ndarray]:
    """Cut or pad tokens on the right to `length`; the mask is true where there is text."""
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

    It is pickled to worker processes as its path. Raises UserError if the file or the package is missing.
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
            raise UserError(f"{self.path}: no such file; it should hold the text encoder's tokenizer; {qwen3.WHERE}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the package raises plain Exceptions
            raise UserError(f"{self.path}: not a readable tokenizer ({reason(error)}); {qwen3.WHERE}") from error
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
    """Fingerprint an encoder's folder: small files in full, weights by their size and 64 KiB at 64 places."""
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

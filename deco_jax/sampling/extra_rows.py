"""A class token as rows below an image (REG), so that everything that integrates images integrates both.

The rest of the last row has velocity zero, so its noise never changes.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def rows_of(channels: int, width: int) -> int:
    """Return the number of rows that hold this many channels; 0 for none."""
    return -(-channels // (3 * width))


def pack(images: Array, token: Array) -> Array:
    """Join [batch, height, width, 3] and [batch, channels] into [batch, height + rows, width, 3]."""
    batch, _, width, _ = images.shape
    rows = rows_of(token.shape[1], width)
    filled = jnp.pad(token.astype(images.dtype), ((0, 0), (0, rows * width * 3 - token.shape[1])))
    return jnp.concatenate([images, filled.reshape(batch, rows, width, 3)], axis=1)


def unpack(x: Array, channels: int) -> tuple[Array, Array]:
    """Undo `pack`."""
    height = x.shape[1] - rows_of(channels, x.shape[2])
    return x[:, :height], x[:, height:].reshape(len(x), -1)[:, :channels]

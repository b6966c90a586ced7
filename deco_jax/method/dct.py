"""The orthonormal block DCT, JPEG's YCbCr, and the zigzag order, shared by the frequency loss and the spectrum."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from deco_jax.shapes import Maps, Tiles

# ITU-R BT.601 as JPEG (JFIF) uses it, without the offset of 128: rows Y, Cb, Cr; columns R, G, B.
RGB_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@functools.cache
def _dct_matrix64(n: int) -> np.ndarray:
    frequency, position = np.arange(n)[:, None], np.arange(n)[None, :]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * n))
    matrix[0] /= np.sqrt(2)
    return matrix


def dct_matrix(n: int = 8) -> np.ndarray:
    """Return the orthonormal DCT-II as a float32 [n, n] matrix, [frequency, position]: `dct_matrix(n) @ signal`."""
    return _dct_matrix64(n).astype(np.float32)


def zigzag(n: int = 8) -> np.ndarray:
    """Return JPEG's zigzag order: int [n * n] indices into a flattened [vertical, horizontal] block, lowest first."""
    vertical, horizontal = np.divmod(np.arange(n * n), n)
    diagonal = vertical + horizontal
    # Odd diagonals run down (vertical grows), even ones up.
    return np.lexsort((np.where(diagonal % 2, vertical, horizontal), diagonal))


def block_dct(images: Maps, block: int = 8, colour: np.ndarray | None = None) -> Tiles:
    """Compute the orthonormal two-dimensional DCT-II of each block × block tile.

    Args:
        images: [batch, height, width, channels], any range. Sides that aren't multiples of `block` are reflect-padded
            at the bottom and on the right.
        block: side of a tile, in pixels.
        colour: [channels_out, channels], applied to each pixel first (e.g. `RGB_TO_YCBCR`).

    Returns:
        float32 [batch, ceil(height / block), ceil(width / block), block, block, channels_out]; the two block axes are
        the vertical and the horizontal frequency.
    """
    height, width, channels = images.shape[1:]
    images = images.astype(jnp.float32)
    if height % block or width % block:
        images = jnp.pad(images, ((0, 0), (0, -height % block), (0, -width % block), (0, 0)), mode="reflect")
    batch, height, width, _ = images.shape
    exact = lax.Precision.HIGHEST
    if colour is None:
        tiles = images.reshape(batch, height // block, block, width // block, block, channels)
        tiles = jnp.einsum("bhiwjc,lj->bhiwlc", tiles, jnp.asarray(dct_matrix(block)), precision=exact)
    else:
        # The transform is limited by memory bandwidth, so no axis is moved before it: a tile's row of pixels with their
        # channels is already contiguous, and one [block * channels] matrix does its horizontal DCT and its colours
        # together. This is three to four times faster than one product over whole tiles.
        across = np.einsum("lj,dc->jcld", _dct_matrix64(block), np.asarray(colour, np.float64))
        across = across.reshape(block * channels, -1)
        tiles = images.reshape(batch, height // block, block, width // block, block * channels)
        tiles = jnp.matmul(tiles, jnp.asarray(across, jnp.float32), precision=exact)
    tiles = tiles.reshape(batch, height // block, block, width // block, -1)
    tiles = jnp.einsum("bhiwq,ki->bhkwq", tiles, jnp.asarray(dct_matrix(block)), precision=exact)
    tiles = tiles.reshape(batch, height // block, block, width // block, block, -1)
    return jnp.transpose(tiles, (0, 1, 3, 2, 4, 5))

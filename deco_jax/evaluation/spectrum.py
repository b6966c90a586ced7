"""The DCT spectrum of the paper's Fig. 4: how much energy a map carries at each frequency."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.method.dct import block_dct, zigzag

BLOCK = 8


def block_energy(maps: jax.Array, block: int = BLOCK) -> jax.Array:
    """Mean squared coefficient of the orthonormal DCT-II of each block × block tile.

    Args:
        maps: [batch, height, width, channels], any range. Sides that `block` does not divide are reflect-padded at the
            bottom and on the right.
        block: side of a tile.

    Returns:
        float32 [batch, block, block], [vertical, horizontal] frequency; the mean is over tiles and channels.
    """
    return jnp.mean(jnp.square(block_dct(maps, block)), axis=(1, 2, 5))


def normalised_spectrum(energy: np.ndarray) -> np.ndarray:
    """log(1 + energy) over its maximum, in zigzag order: [block, block] → float64 [block · block], lowest first.

    A map without any energy stays zero.
    """
    logarithms = np.log1p(np.asarray(energy, np.float64)).reshape(-1)[zigzag(len(energy))]
    return logarithms / (logarithms.max() or 1.0)

"""Bicubic resizing as PyTorch's `interpolate` does it.

Two things differ from `jax.image.resize`: the cubic's parameter is a = −0.75 (not −0.5), and shrinking takes
the same four neighbours (no antialiasing). Neighbours beyond the border repeat the border.
Source: Keys 1981; `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.shapes import Maps

A = np.float32(-0.75)


def bicubic_matrix(size: int, new_size: int, scale: float | None = None) -> np.ndarray:
    """The weights that take `size` samples of a line to `new_size`.

    Args:
        size, new_size: numbers of samples.
        scale: the distance of two new samples in old ones; size / new_size unless given.

    Returns:
        float32 [new_size, size]; each row has at most four weights, which sum to 1.
    """
    # float32 as in the reference: at these coordinates a float64 one differs in the fourth digit of a weight.
    step = np.float32(size / new_size if scale is None else scale)
    source = step * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    left = np.floor(source)
    t = source - left

    def near(x: np.ndarray) -> np.ndarray:  # |x| ≤ 1
        return ((A + 2) * x - (A + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    matrix = np.zeros((new_size, size), np.float32)
    for offset in range(4):
        column = np.clip(left.astype(np.int64) + offset - 1, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), column), weights[:, offset])
    return matrix


def resize_bicubic(
    images: Maps, height: int, width: int, *, scales: tuple[float | None, float | None] = (None, None)
) -> jax.Array:
    """[batch, old height, old width, channels] → float32 [batch, height, width, channels].

    Two dense products instead of gathers: fast on matrix units, and exact in float32 there too.

    Args:
        scales: vertical and horizontal `scale` of `bicubic_matrix`.
    """
    rows = bicubic_matrix(images.shape[1], height, scales[0])
    columns = bicubic_matrix(images.shape[2], width, scales[1])
    images = images.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("bhwc,yh->bywc", images, rows, precision=exact)
    return jnp.einsum("bywc,xw->byxc", images, columns, precision=exact)

"""Bicubic resizing as PyTorch's `interpolate` does it.

It differs from `jax.image.resize` in two ways: the cubic's parameter is a = −0.75 (not −0.5), and shrinking uses
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
    """Return the weights that resample a line from `size` to `new_size` samples.

    Args:
        size, new_size: numbers of samples.
        scale: the distance between two new samples, measured in old ones; size / new_size by default.

    Returns:
        float32 [new_size, size]; each row has at most four weights, which sum to 1.
    """
    # float32 as in the reference; with float64 coordinates, weights differ in the fourth digit.
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
    """Resize [batch, old height, old width, channels] → float32 [batch, height, width, channels].

    Two dense products replace gathers: they are fast on matrix units, and exact in float32 there, too.

    Args:
        scales: vertical and horizontal `scale` of `bicubic_matrix`.
    """
    rows = bicubic_matrix(images.shape[1], height, scales[0])
    columns = bicubic_matrix(images.shape[2], width, scales[1])
    images = images.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("bhwc,yh->bywc", images, rows, precision=exact)
    return jnp.einsum("bywc,xw->byxc", images, columns, precision=exact)

"""The block DCT against SciPy's and against the reference's values."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.fft

from deco_jax.method import dct
from tests.helpers import golden, nhwc, relative_error

pytestmark = pytest.mark.fast


def by_scipy(images: np.ndarray, block: int) -> np.ndarray:
    """[batch, H, W, C] to [batch, H / block, W / block, block, block, C], one tile at a time, in float64."""
    batch, height, width, channels = images.shape
    out = np.zeros((batch, height // block, width // block, block, block, channels))
    for i in range(height // block):
        for j in range(width // block):
            tile = images[:, i * block : (i + 1) * block, j * block : (j + 1) * block].astype(np.float64)
            out[:, i, j] = scipy.fft.dctn(tile, axes=(1, 2), norm="ortho")
    return out


def channels_first(coefficients) -> np.ndarray:
    """To the reference's [batch, C, H / 8, W / 8, 8, 8]."""
    return np.moveaxis(np.asarray(coefficients), -1, 1)


@pytest.mark.parametrize("block,shape", [(8, (2, 16, 40, 3)), (4, (1, 12, 8, 5)), (16, (1, 16, 32, 1))])
def test_block_dct_is_scipys(block, shape):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert relative_error(dct.block_dct(images, block), by_scipy(images, block)) < 1e-6


def test_block_axes_are_vertical_then_horizontal():
    rows = np.cos(np.pi * (2 * np.arange(8) + 1) * 3 / 16)[None, :, None, None] * np.ones((1, 8, 8, 1))
    energy = np.asarray(dct.block_dct(rows.astype(np.float32)))[0, 0, 0, :, :, 0] ** 2
    assert np.unravel_index(energy.argmax(), energy.shape) == (3, 0)


@pytest.mark.parametrize("height,width", [(13, 18), (9, 8), (7, 5), (4, 20)])
def test_odd_sides_are_reflect_padded(height, width):
    images = np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0)), mode="reflect")
    assert relative_error(dct.block_dct(images), by_scipy(padded, 8)) < 1e-6


def test_golden():
    values = golden("losses")
    assert relative_error(dct.dct_matrix(), values["dct_matrix"]) < 2e-6
    folded = dct.block_dct(nhwc(values["image"]), colour=dct.RGB_TO_YCBCR)
    assert relative_error(channels_first(folded), values["image_ycbcr_dct"]) < 2e-6
    odd = dct.block_dct(nhwc(values["odd_image"]))
    assert relative_error(channels_first(odd), values["odd_image_dct"]) < 2e-6


def test_the_matrix_is_orthonormal():
    matrix = dct.dct_matrix(8).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(8), atol=1e-7)
    assert matrix.shape == (8, 8)
    assert dct.dct_matrix(8).dtype == np.float32


def test_products_are_full_float32_whatever_the_default():
    with jax.default_matmul_precision("bfloat16"):
        transform = jax.make_jaxpr(lambda x: dct.block_dct(x, colour=dct.RGB_TO_YCBCR))
        program = str(transform(np.zeros((1, 8, 8, 3), np.float32)))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


def test_ycbcr_of_grey_and_of_primaries():
    ycbcr = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1]]) @ dct.RGB_TO_YCBCR.T
    np.testing.assert_allclose(ycbcr, [[1, 0, 0], [0.299, -0.168736, 0.5], [0.114, 0.5, -0.081312]], atol=1e-6)


def test_zigzag_is_jpegs():
    # ITU-T T.81, figure 5 (written as the position in the scan of each coefficient).
    figure = [
        [0, 1, 5, 6, 14, 15, 27, 28],
        [2, 4, 7, 13, 16, 26, 29, 42],
        [3, 8, 12, 17, 25, 30, 41, 43],
        [9, 11, 18, 24, 31, 40, 44, 53],
        [10, 19, 23, 32, 39, 45, 52, 54],
        [20, 22, 33, 38, 46, 51, 55, 60],
        [21, 34, 37, 47, 50, 56, 59, 61],
        [35, 36, 48, 49, 57, 58, 62, 63],
    ]
    np.testing.assert_array_equal(np.ravel(figure)[dct.zigzag()], np.arange(64))

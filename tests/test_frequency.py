"""The frequency-aware loss: JPEG weights by hand, the loss against a float64 computation and the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from deco_jax.errors import UserError
from deco_jax.method.losses.frequency import CHROMINANCE_TABLE, LUMINANCE_TABLE, frequency_loss, jpeg_weights
from tests.helpers import golden, nhwc, relative_error

pytestmark = pytest.mark.fast


def by_definition(error: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The loss in float64, a tile at a time, with YCbCr written out."""
    pad = [(0, 0), (0, -error.shape[1] % 8), (0, -error.shape[2] % 8), (0, 0)]
    r, g, b = np.moveaxis(np.pad(error.astype(np.float64), pad, mode="reflect"), -1, 0)
    planes = [
        0.299 * r + 0.587 * g + 0.114 * b,
        -0.168736 * r - 0.331264 * g + 0.5 * b,
        0.5 * r - 0.418688 * g - 0.081312 * b,
    ]
    total = np.zeros(len(error))
    for plane, weight in zip(planes, weights.astype(np.float64), strict=True):
        for i in range(0, plane.shape[1], 8):
            for j in range(0, plane.shape[2], 8):
                tile = scipy.fft.dctn(plane[:, i : i + 8, j : j + 8], axes=(1, 2), norm="ortho")
                total += (weight * tile**2).sum(axis=(1, 2))
    return total / (3 * r[0].size)


def test_tables_of_annex_k():
    # The printed tables' sums and a few entries off the diagonal, to catch a slip or a transposition.
    assert LUMINANCE_TABLE.sum() == 3688
    assert [LUMINANCE_TABLE[at] for at in ((0, 1), (1, 0), (5, 2), (2, 5))] == [11, 12, 55, 57]
    assert (CHROMINANCE_TABLE == CHROMINANCE_TABLE.T).all()
    assert (CHROMINANCE_TABLE == 99).sum() == 64 - 13
    assert list(CHROMINANCE_TABLE[0, :5]) == [17, 18, 24, 47, 99]


def test_weights_by_hand():
    # Quality 50 leaves the tables as they are, so the weights stand in their inverse proportion.
    at_50 = jpeg_weights(50)
    assert at_50[0, 0, 0] / at_50[0, 7, 7] == pytest.approx(99 / 16, rel=1e-6)
    assert at_50[0, 0, 1] / at_50[0, 1, 0] == pytest.approx(12 / 11, rel=1e-6)
    assert at_50[1, 0, 0] / at_50[1, 7, 7] == pytest.approx(99 / 17, rel=1e-6)
    # Quality 85: s = 30; 16 becomes floor(5.3) = 5, 11 floor(3.8) = 3, 99 floor(30.2) = 30, 17 floor(5.6) = 5.
    at_85 = jpeg_weights(85)
    assert at_85[0, 0, 0] / at_85[0, 0, 1] == pytest.approx(3 / 5, rel=1e-6)
    assert at_85[0, 0, 0] / at_85[0, 7, 7] == pytest.approx(30 / 5, rel=1e-6)
    assert at_85[2, 0, 0] / at_85[2, 7, 7] == pytest.approx(30 / 5, rel=1e-6)
    # Quality 100 quantises nothing.
    np.testing.assert_array_equal(jpeg_weights(100), np.ones((3, 8, 8)))
    # Quality 10: s = 500; 99 · 5 is cut at 255, 16 becomes 80.
    at_10 = jpeg_weights(10)
    assert at_10[0, 0, 0] / at_10[0, 7, 7] == pytest.approx(255 / 80, rel=1e-6)


@pytest.mark.parametrize("quality", [1, 10, 50, 85, 99.5])
def test_weights_have_mean_one_in_each_channel(quality):
    np.testing.assert_allclose(jpeg_weights(quality).astype(np.float64).mean(axis=(1, 2)), 1, rtol=1e-6)


@pytest.mark.parametrize("quality", [0, 101, -5, float("nan")])
def test_a_quality_out_of_range_is_refused(quality):
    with pytest.raises(UserError, match="from 1 to 100"):
        jpeg_weights(quality)


@pytest.mark.parametrize("quality", [10, 50, 85, 100])
def test_golden_weights(quality):
    assert relative_error(jpeg_weights(quality), golden("losses")[f"weight/q{quality}"]) < 2e-6


def test_golden_loss():
    values = golden("losses")
    error = nhwc(values["v_pred"]) - nhwc(values["v_true"])
    assert relative_error(frequency_loss(error, jpeg_weights(85)).mean(), values["freq_loss/q85"]) < 2e-6


@pytest.mark.parametrize("height,width", [(16, 24), (13, 18), (5, 8)])
def test_loss_by_definition(height, width):
    error = np.random.default_rng(0).normal(size=(3, height, width, 3)).astype(np.float32)
    loss = jax.jit(frequency_loss)(error, jpeg_weights(85))
    assert loss.shape == (3,)
    assert loss.dtype == jnp.float32
    assert relative_error(loss, by_definition(error, jpeg_weights(85))) < 1e-6


def test_gradient_by_definition():
    error = np.random.default_rng(1).normal(size=(1, 9, 8, 3)).astype(np.float32)
    direction = np.random.default_rng(2).normal(size=error.shape).astype(np.float32)
    weights = jpeg_weights(50)
    gradient = jax.grad(lambda e: frequency_loss(e, weights).sum())(error)
    # The loss is quadratic, so a central difference is exact.
    expected = (by_definition(error + direction, weights) - by_definition(error - direction, weights)) / 2
    assert float(np.vdot(gradient, direction)) == pytest.approx(expected[0], rel=1e-5)


def test_half_precision_errors_are_measured_in_float32():
    error = np.random.default_rng(3).normal(size=(2, 8, 8, 3)).astype(jnp.bfloat16)
    loss = frequency_loss(jnp.asarray(error), jpeg_weights(85))
    assert loss.dtype == jnp.float32
    assert relative_error(loss, by_definition(error.astype(np.float32), jpeg_weights(85))) < 1e-6

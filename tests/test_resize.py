"""resize.py against PyTorch's own bicubic, where PyTorch is installed, and against what must hold anyway."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.resize import bicubic_matrix, resize_bicubic
from tests.helpers import relative_error

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("sizes", [(16, 14), (14, 37), (9, 9), (5, 31), (256, 224)])
def test_a_constant_stays_and_a_line_stays_inside(sizes):
    matrix = bicubic_matrix(*sizes)
    assert matrix.shape == sizes[::-1]
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-6)
    assert np.all((matrix != 0).sum(1) <= 4)


def test_weights_at_the_middle_between_samples():
    """The cubic at distances 3/2, 1/2, 1/2, 3/2 with a = -3/4: -3/32, 19/32, 19/32, -3/32."""
    np.testing.assert_allclose(bicubic_matrix(8, 4)[1], np.array([0, -3, 19, 19, -3, 0, 0, 0]) / 32)


def test_borders_are_repeated():
    np.testing.assert_allclose(bicubic_matrix(4, 2)[0], np.array([-3 + 19, 19, -3, 0]) / 32)


@pytest.mark.parametrize("height, width", [(14, 21), (24, 8), (31, 40)])
def test_equals_pytorch(height, width):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(images), (height, width), mode="bicubic").numpy()
    actual = resize_bicubic(jnp.asarray(images.transpose(0, 2, 3, 1)), height, width)
    assert relative_error(actual, expected.transpose(0, 2, 3, 1)) < 2e-6


def test_equals_pytorch_with_a_scale():
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1, 5, 37, 37)).astype(np.float32)
    factors = (16.1 / 37, 24.1 / 37)
    expected = torch.nn.functional.interpolate(torch.from_numpy(table), scale_factor=factors, mode="bicubic").numpy()
    actual = resize_bicubic(jnp.asarray(table.transpose(0, 2, 3, 1)), 16, 24, scales=(1 / factors[0], 1 / factors[1]))
    assert relative_error(actual, expected.transpose(0, 2, 3, 1)) < 2e-6

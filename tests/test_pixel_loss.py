"""The pixel flow-matching loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method.losses.pixel import flow_matching_loss
from tests.helpers import relative_error

pytestmark = pytest.mark.fast


def test_mean_square_per_example():
    error = np.random.default_rng(0).normal(size=(3, 5, 7, 3)).astype(np.float32)
    loss = jax.jit(flow_matching_loss)(error)
    assert loss.shape == (3,)
    assert relative_error(loss, (error.astype(np.float64) ** 2).mean(axis=(1, 2, 3))) < 1e-6


def test_float32_whatever_comes_in():
    error = jnp.full((2, 64, 64, 3), 1.0078125, jnp.bfloat16)
    loss = flow_matching_loss(error)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1.0078125**2, rtol=1e-6)

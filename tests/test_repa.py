"""The alignment loss against PyTorch's definition of the cosine similarity, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method.losses.repa import alignment_loss
from tests.helpers import relative_error

pytestmark = pytest.mark.fast


def by_definition(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = [np.maximum(np.linalg.norm(x, axis=-1), 1e-8) for x in (a, b)]
    return (1 - (a * b).sum(-1) / (norms[0] * norms[1])).mean(-1)


def test_one_minus_cosine_per_example():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 16, 20)).astype(np.float32)
    loss = jax.jit(alignment_loss)(a, b)
    assert loss.shape == (3,)
    assert relative_error(loss, by_definition(a, b)) < 1e-6


def test_parallel_opposite_and_zero_tokens():
    a = np.random.default_rng(1).normal(size=(1, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(alignment_loss(a, 3 * a), 0, atol=1e-6)
    np.testing.assert_allclose(alignment_loss(a, -a), 2, atol=1e-6)
    np.testing.assert_allclose(alignment_loss(a, 0 * a), 1)


def test_gradient_stays_finite_at_zero():
    gradient = jax.grad(lambda a: alignment_loss(a, jnp.ones((1, 2, 4))).sum())(jnp.zeros((1, 2, 4)))
    assert np.isfinite(gradient).all()


def test_half_precision_is_compared_in_float32():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 1, 16, 256)).astype(jnp.bfloat16)
    loss = alignment_loss(jnp.asarray(a), jnp.asarray(b))
    assert loss.dtype == jnp.float32
    assert relative_error(loss, by_definition(a.astype(np.float32), b.astype(np.float32))) < 1e-6


def test_token_counts_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        alignment_loss(jnp.ones((1, 4, 8)), jnp.ones((1, 1, 8)))

"""KID and FD-DINOv2 against their definitions."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import scipy.linalg

from deco_jax.evaluation import fd_dinov2
from deco_jax.evaluation.kid import kernel_distances, squared_mmd
from deco_jax.models import dinov2

pytestmark = pytest.mark.fast


def test_squared_mmd_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (7, 5)), rng.normal(0.3, 1.2, (6, 5))

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    def within(points):
        pairs = [kernel(a, b) for a, b in itertools.permutations(points, 2)]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in x for b in y]
    expected = within(x) + within(y) - 2 * sum(across) / len(across)
    assert squared_mmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_subsets_are_unbiased_and_repeatable():
    """Two halves of one distribution are 0 apart on average, which FID's estimate is not; others are not."""
    rng = np.random.default_rng(1)
    same = kernel_distances(rng.normal(0, 1, (400, 3)), rng.normal(0, 1, (400, 3)), 200, 50)
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(200) + 0.05
    assert same.min() < 0  # it isn't a square
    x, y = rng.normal(0, 1, (300, 3)), rng.normal(1, 1, (300, 3))
    found = kernel_distances(x, y, 20, 100)
    np.testing.assert_array_equal(found, kernel_distances(x, y, 20, 100))
    assert len(set(found)) == 20
    assert found.mean() == pytest.approx(squared_mmd(x, y), rel=0.1)
    assert kernel_distances(x[:6], y, 1, 100).shape == (1,)  # subsets of what there is


def test_frechet_distance_of_rows():
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1, (60, 4)) @ rng.normal(0, 1, (4, 4)), rng.normal(0.5, 2, (50, 4))
    c, d = np.cov(x.T), np.cov(y.T)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert fd_dinov2.frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_class_tokens_do_not_depend_on_the_image_size_alone(monkeypatch):
    """Of images at 224² the token is the transformer's; larger ones are resized to that first."""
    monkeypatch.setitem(dinov2.SIZES, "S", (24, 2, 2))
    apply, shapes = fd_dinov2.class_tokens("S", "float32")
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    small = rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    tokens = np.asarray(apply(params, small))
    assert tokens.shape == (2, 24)
    # LayerNorm's output: what is left after its scale and bias has mean 0 and variance 1.
    plain = (tokens - params["norm"]["bias"]) / params["norm"]["scale"]
    np.testing.assert_allclose(plain.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(plain.var(1), 1, atol=1e-3)
    flat = np.broadcast_to(np.arange(2, dtype=np.uint8)[:, None, None, None] * 100, (2, 224, 224, 3))
    large = np.broadcast_to(flat[:, :1, :1], (2, 300, 256, 3))
    np.testing.assert_allclose(np.asarray(apply(params, large)), np.asarray(apply(params, flat)), atol=1e-4)

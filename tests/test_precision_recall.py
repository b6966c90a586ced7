"""evaluation/precision_recall.py against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest

from deco_jax.errors import UserError
from deco_jax.evaluation.precision_recall import _Points, precision_recall
from tests.helpers import golden, relative_error

pytestmark = pytest.mark.fast


def neighbour_radii(features, k=3, row_block=2048, column_block=8192, mesh=None):
    """The radii of the balls that make a manifold: float32 [n]."""
    centre = np.asarray(np.mean(features, axis=0, dtype=np.float64), np.float32)
    return np.sqrt(_Points(features, centre, row_block, column_block, mesh).squared_radii(k))


def distances(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.stack([np.sqrt(((row - b) ** 2).sum(1)) for row in a])


def radii(points, k):
    """Self, at distance 0, is the first of the sorted; so the k-th neighbour has index k."""
    return np.sort(distances(points, points), axis=1)[:, k]


def brute_force(reference, samples, k=3):
    d = distances(samples, reference)
    return (d <= radii(reference, k)).any(1).mean(), (d <= radii(samples, k)[:, None]).any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_random_points(k, offset):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(130, 12)) + offset, rng.normal(0.5, 0.8, size=(75, 12)) + offset
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = brute_force(a, b, k)
    assert min(expected) > 0.05
    assert max(expected) < 1
    for rows, columns in ((2048, 8192), (32, 50), (130, 75)):
        assert precision_recall(a, b, k, rows, columns) == pytest.approx(expected, abs=1e-12)
        assert relative_error(neighbour_radii(a, k, rows, columns), radii(a, k)) < 1e-5


def test_real_features():
    a, b = golden("inception_features")["train"], golden("inception_features")["test"]
    expected = brute_force(a, b)
    assert min(expected) > 0.05
    assert precision_recall(a, b) == pytest.approx(expected, abs=1e-12)
    assert relative_error(neighbour_radii(a), radii(a, 3)) < 1e-6


def test_a_set_against_itself_and_a_far_one():
    a = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)


def test_the_rim_is_inside():
    """On a line: reference 0, 1, 2, 3 has k = 1 radii of 1, so 4 lies on a rim and 4.5 doesn't."""
    reference = np.array([[0.0], [1], [2], [3]], np.float32)
    samples = np.array([[4.0], [4.5], [-1], [1.5]], np.float32)
    assert precision_recall(reference, samples, k=1) == brute_force(reference, samples, k=1)
    assert precision_recall(reference, samples, k=1)[0] == 0.75


def test_collapsed_samples():
    """All samples equal, at one reference point: their balls have radius exactly 0 and hold that one point."""
    reference = np.random.default_rng(0).normal(3, 1, size=(50, 64)).astype(np.float32)
    samples = np.repeat(reference[7:8], 20, axis=0)
    assert np.array_equal(neighbour_radii(samples), np.zeros(20))
    assert precision_recall(reference, samples) == (1.0, 1 / 50)


@pytest.mark.parametrize("gap", [1e-4, 3e-3, 0.1])
def test_tight_clusters(gap):
    """Points that lie `gap` apart in clusters 50 apart: a squared distance is 1e-12 to 1e-6 of the squared norms."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (3, 1, 64))
    reference = (centres + rng.normal(0, gap / 8, (3, 40, 64))).reshape(-1, 64).astype(np.float32)
    beside = (centres + gap + rng.normal(0, gap / 8, (3, 30, 64))).reshape(-1, 64).astype(np.float32)
    assert precision_recall(reference, beside) == brute_force(reference, beside) == (0.0, 0.0)
    among = (centres + rng.normal(0, gap / 9, (3, 30, 64))).reshape(-1, 64).astype(np.float32)
    among[:5] = reference[:5]
    expected = brute_force(reference, among)
    assert 0.05 < min(expected) < 1
    assert precision_recall(reference, among, row_block=32, column_block=50) == pytest.approx(expected, abs=0.01)
    assert relative_error(neighbour_radii(reference), radii(reference, 3)) < 1e-5


def test_too_few_or_other_features():
    a = np.zeros((3, 8), np.float32)
    with pytest.raises(UserError, match="3 images are too few for neighbours of rank 3; use at least 4"):
        precision_recall(a, np.zeros((9, 8), np.float32))
    with pytest.raises(UserError, match="can't be compared"):
        precision_recall(a, np.zeros((9, 7), np.float32))

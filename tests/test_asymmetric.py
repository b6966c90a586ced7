"""Asymmetric prediction against its published arithmetic, in float64."""

import jax
import numpy as np
import pytest

from deco_jax.method import asymmetric
from tests.helpers import golden

PATCH = 4


def values(name: str) -> np.ndarray:
    return golden("beyond")[f"asymflow/{name}"]


def images(vectors: np.ndarray) -> np.ndarray:
    """Each vector of 48 is one patch of an image."""
    return vectors.reshape(-1, PATCH, PATCH, 3)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def basis() -> np.ndarray:
    return asymmetric.top_eigenvectors(values("gram"), 8)


def test_gram_matrix_and_projection():
    gram = asymmetric.gram_matrix(np.split(images(values("patches")), 4), PATCH)
    np.testing.assert_allclose(gram, values("gram"), atol=1e-8)
    np.testing.assert_allclose(basis() @ basis().T, values("P"), atol=1e-12)


def test_target_and_velocity():
    x, noise, t = images(values("x")), images(values("noise")), values("t")
    target = asymmetric.asymmetric_target(x, noise, basis(), PATCH)
    np.testing.assert_allclose(target.reshape(-1, 48), values("target"), atol=1e-12)
    velocity = asymmetric.asymmetric_velocity(target, images(values("x_t")), t, basis(), PATCH, 1e-6)
    np.testing.assert_allclose(velocity.reshape(-1, 48), values("velocity"), atol=1e-11)


@pytest.mark.parametrize("rank", [0, 48])
def test_the_extremes_are_x_and_v_prediction(rank):
    x, noise, t = images(values("x")), images(values("noise")), values("t").reshape(-1, 1, 1, 1)
    edge = asymmetric.top_eigenvectors(values("gram"), rank)
    target = asymmetric.asymmetric_target(x, noise, edge, PATCH)
    np.testing.assert_allclose(target, noise - x if rank else -x, atol=1e-12)
    velocity = asymmetric.asymmetric_velocity(target, t * x + (1 - t) * noise, values("t"), edge, PATCH, 1e-6)
    np.testing.assert_allclose(velocity, x - noise, atol=1e-10)

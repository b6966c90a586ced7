"""Asymmetric prediction against its published arithmetic, in float64."""

import jax
import numpy as np
import pytest

from deco_jax.method.energy import EnergyPath
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import asymmetric
from tests.helpers import golden, relative_error

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


def prediction(rank: int, path=None) -> asymmetric.AsymmetricPrediction:
    made = asymmetric.AsymmetricPrediction(path or LinearPath(), rank, PATCH)
    return made.given({"basis": asymmetric.top_eigenvectors(values("gram"), rank)})


def test_published_velocity():
    x, noise, t, P = values("x"), values("noise"), values("t"), values("P")
    np.testing.assert_allclose(noise @ P - x, values("target"), atol=1e-12)  # what the golden outputs are
    made = prediction(8)
    velocity = made.velocity(images(values("target")), images(values("x_t")), t)
    np.testing.assert_allclose(velocity.reshape(-1, 48), values("velocity"), atol=1e-11)
    image = made.image(images(values("target")), images(values("x_t")), t)
    np.testing.assert_allclose(image.reshape(-1, 48), x, atol=1e-11)
    np.testing.assert_allclose(made.weight(np.array([0.0, 0.95, 0.99, 1.0])), [1, 1, 0.2, 0], atol=1e-12)


def test_sampling_has_its_own_floor():
    made, output = prediction(8), images(values("target"))
    state = images(values("x_t"))
    # At t = 1 by hand: outside the subspace divided by 0.04, inside −y as ever.
    P, y = values("P"), values("target")
    by_hand = -(y @ P) - ((values("x_t") + y) @ (np.eye(48) - P)) / 0.04
    velocity = made.in_sampling().velocity(output, state, np.ones(5))
    np.testing.assert_allclose(velocity.reshape(-1, 48), by_hand, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 48])
def test_the_extremes_are_x_and_v_prediction(rank):
    """Nothing is measured for them."""
    made = asymmetric.AsymmetricPrediction(LinearPath(), rank, PATCH)
    assert not made.measured
    x, noise, t = images(values("x")), images(values("noise")), values("t")
    point = LinearPath().point(x, noise, t)
    output = noise - x if rank else -x
    np.testing.assert_allclose(made.velocity(output, point.state, t), x - noise, atol=1e-9)


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = np.cumsum(draw.normal(size=(4, 8, 12, 3)), axis=2).astype(np.float32) / 4
    return x, draw.normal(size=x.shape).astype(np.float32), np.array([0.1, 0.5, 0.9, 0.97], np.float32)


@pytest.mark.parametrize("rank", [0, 8, 48])
def test_on_the_energy_path(rank):
    """The output of a perfect network, −v within the subspace and −x outside, is the path's velocity again."""
    path, made = EnergyPath(), prediction(rank, EnergyPath())
    x, noise, t = pictures()
    point = path.point(x, noise, t)
    basis = asymmetric.top_eigenvectors(values("gram"), rank)

    def inside(a):
        return asymmetric.project(np.asarray(a, np.float64), basis, PATCH)

    output = -(inside(point.velocity) + x - inside(x))
    velocity = np.asarray(made.velocity(output, point.state, t))
    if rank == 48:
        assert relative_error(velocity, point.velocity) < 1e-6
    elif rank == 0:
        assert relative_error(velocity, path.velocity_of(x, point.state, t, 1e-6)) < 1e-6
    else:
        # Outside, e(x̂) of an image whose part inside is where the straight line leads, not x itself.
        image = made.image_target(x, point, t)
        expected = np.asarray(path.velocity_of(image, point.state, t, 1e-6))
        expected = expected - inside(expected) + inside(point.velocity)
        assert relative_error(velocity, expected) < 1e-6
        late = relative_error(velocity[2:], point.velocity[2:])
        assert late < relative_error(velocity[1], point.velocity[1])
    assert relative_error(made.image(output, point.state, t), made.image_target(x, point, t)) < 1e-6


def test_the_straight_path_s_image_target_is_the_image():
    x, noise, t = pictures()
    point = LinearPath().point(x, noise, t)
    assert relative_error(prediction(8).image_target(x, point, t), x) < 1e-6


def test_a_prediction_without_its_basis_computes_nothing():
    made = asymmetric.AsymmetricPrediction(LinearPath(), 8, PATCH)
    with pytest.raises(ValueError, match="basis"):
        made.velocity(*pictures())

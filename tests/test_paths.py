"""The flow's path, prediction types and training times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import VPrediction, XPrediction, make_prediction
from deco_jax.method.times import LogitNormal, shift_time
from tests.helpers import golden, relative_error

pytestmark = pytest.mark.fast

path = LinearPath()


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 6, 5, 3)).astype(np.float32)


def test_the_path_runs_from_noise_to_data():
    x, noise = images(0), images(1)
    np.testing.assert_array_equal(path.point(x, noise, np.zeros(4, np.float32)).state, noise)
    np.testing.assert_array_equal(path.point(x, noise, np.ones(4, np.float32)).state, x)
    t = np.array([0.1, 0.3, 0.6, 0.9], np.float32)
    expected = np.stack([t[i] * x[i] + (1 - t[i]) * noise[i] for i in range(4)])
    assert relative_error(path.point(x, noise, t).state, expected) < 1e-6


def test_the_velocity_is_the_paths_derivative():
    x, noise = images(0), images(1)
    t = jnp.full((4,), 0.4)
    _, derivative = jax.jvp(lambda t: path.point(x, noise, t).state, (t,), (jnp.ones(4),))
    assert relative_error(path.point(x, noise, t).velocity, derivative) < 1e-6


def test_x_prediction_is_converted_with_jits_floor():
    x, noise = images(0), images(1)
    t = np.array([0.0, 0.5, 0.94, 0.99], np.float32)
    point, prediction = path.point(x, noise, t), XPrediction(path)
    v = prediction.velocity(x, point.state, t)
    assert relative_error(v[:3], (x - noise)[:3]) < 1e-5
    # Above t = 0.95 the divisor stays 0.05.
    np.testing.assert_allclose(v[3], (x[3] - point.state[3]) / 0.05, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(prediction.target(x, point, t), v)
    assert prediction.image(x, point.state, t) is x
    # The samplers pass one time for all.
    np.testing.assert_allclose(
        prediction.velocity(x, point.state, jnp.float32(0.5)), (x - point.state) / 0.5, rtol=1e-6
    )


def test_v_prediction_is_the_velocity_already():
    x, noise, t = images(0), images(1), np.array([0.0, 0.5, 0.9, 1.0], np.float32)
    point, prediction = path.point(x, noise, t), VPrediction(path)
    assert prediction.velocity(noise, point.state, t) is noise
    np.testing.assert_array_equal(prediction.target(x, point, t), x - noise)
    # From any point on a straight line its velocity leads to its end.
    assert relative_error(prediction.image(x - noise, point.state, t), x) < 1e-6


def test_an_unknown_prediction_is_refused():
    config = quickstart.get_config("smoke")
    config.model.prediction = "epsilon"
    with pytest.raises(UserError, match="choose one of v, x"):
        make_prediction(config)


@pytest.mark.parametrize("shift", [2, 4])
def test_golden_time_shift(shift):
    assert relative_error(shift_time(np.linspace(0, 1, 11), shift), golden("losses")[f"timeshift/{shift}"]) < 2e-6


@pytest.mark.parametrize("shift,mean,std", [(1.0, 0.0, 1.0), (2.0, 0.0, 1.0), (1.0, -0.8, 0.8)])
def test_training_times_are_logit_normal(shift, mean, std):
    t = np.asarray(LogitNormal(mean, std, shift)(jax.random.key(0), 4000), np.float64)
    assert t.shape == (4000,)
    # Shifting by s adds −log s to the logit.
    logit = np.log(t / (1 - t)) + np.log(shift)
    assert scipy.stats.kstest((logit - mean) / std, "norm").pvalue > 0.01


def test_training_times_are_float32():
    assert LogitNormal()(jax.random.key(0), 3).dtype == jnp.float32

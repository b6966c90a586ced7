"""The perceptual losses in the objective: which images they compare, which examples count, how they are averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method import objective
from deco_jax.method.averages import Decay
from deco_jax.method.energy import EnergyPath
from deco_jax.method.losses.perceptual import LPIPSLoss
from deco_jax.method.objective import Method
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import VPrediction, XPrediction
from deco_jax.method.step import Draws, Observed
from deco_jax.method.times import LogitNormal
from deco_jax.models.network import FrozenNetwork, Network

TIMES = np.array([0.1, 0.3, 0.6, 0.9], np.float32)
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (4, 8, 8, 3), np.uint8)
NOISE = RANDOM.normal(size=(4, 8, 8, 3)).astype(np.float32)
OUTPUT = RANDOM.normal(size=(4, 8, 8, 3)).astype(np.float32)

# Stands in for VGG16: the mean absolute difference, which tells each pair of images apart.
DISTANCE = FrozenNetwork(lambda params, a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3)), {}, dict, lambda size: 0.0)
DENOISER = Network(lambda key: {}, lambda params, x, t, context, layer, keys: (jnp.asarray(OUTPUT), {}), {})


def loss_of(path, prediction) -> float:
    method = Method(path, prediction, LogitNormal(0, 1, 1), (LPIPSLoss(DISTANCE),), {"ema": Decay(0.9)}, 0.0)
    counts = {"lpips": objective.counted(jnp.asarray(TIMES), 0.3)}
    draws = Draws(NOISE, jnp.asarray(TIMES), jnp.zeros(4, bool), None, counts)
    observed = Observed(jnp.zeros(4, jnp.int32), jnp.asarray(0))
    loss, terms = method.objective(
        {"denoiser": {}}, PIXELS, draws, observed, {"lpips": {}}, networks={"denoiser": DENOISER}
    )
    np.testing.assert_allclose(loss, 0.1 * terms["lpips"], rtol=1e-6)
    return float(terms["lpips"])


@pytest.mark.parametrize("predicts", ["v", "x"])
def test_the_predicted_image_beside_the_true_one(predicts):
    """By hand in float64: the mean over the three examples from t = 0.3 on."""
    path = LinearPath()
    x, t = PIXELS / 127.5 - 1.0, TIMES.astype(np.float64)[:, None, None, None]
    image = OUTPUT if predicts == "x" else t * x + (1 - t) * NOISE + (1 - t) * OUTPUT
    by_hand = np.abs(image - x).mean(axis=(1, 2, 3))[1:].mean()
    made = XPrediction(path) if predicts == "x" else VPrediction(path)
    np.testing.assert_allclose(loss_of(path, made), by_hand, rtol=1e-5)


def test_a_perfect_velocity_has_no_loss_on_the_energy_path(monkeypatch):
    path = EnergyPath()
    x = jnp.asarray(PIXELS, jnp.float32) / 127.5 - 1
    monkeypatch.setitem(globals(), "OUTPUT", path.point(x, NOISE, jnp.asarray(TIMES)).velocity)
    assert loss_of(path, VPrediction(path)) < 1e-5


def test_counts_have_the_mean_one_unless_none_counts():
    counts = objective.counted(jnp.asarray(TIMES), 0.3)
    np.testing.assert_allclose(counts, [0, 4 / 3, 4 / 3, 4 / 3], rtol=1e-6)
    assert not np.any(objective.counted(jnp.asarray(TIMES), 0.95))


def test_draws_bring_the_counts_of_the_whole_batch():
    method = Method(
        LinearPath(), VPrediction(LinearPath()), LogitNormal(0, 1, 1), (LPIPSLoss(DISTANCE),), {"ema": Decay(0.9)}, 0.0
    )
    draws = method.draw(jax.random.key(0), (16, 8, 8, 3))
    np.testing.assert_array_equal(draws.counts["lpips"] > 0, draws.times >= 0.3)
    np.testing.assert_allclose(np.mean(draws.counts["lpips"]), 1, rtol=1e-6)

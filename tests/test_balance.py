"""The balance of the perceptual losses, against whole backward passes in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method import balance
from deco_jax.method.averages import Decay
from deco_jax.method.balance import Balance
from deco_jax.method.losses.perceptual import LPIPSLoss
from deco_jax.method.losses.pixel import PixelLoss
from deco_jax.method.objective import Method
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import XPrediction
from deco_jax.method.step import Draws, Observed
from deco_jax.method.times import LogitNormal
from deco_jax.models.network import FrozenNetwork, Network

DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (4, 2, 2, 3), np.uint8)
TIMES = np.array([0.1, 0.4, 0.6, 0.9])
PARAMS = {"first": DRAW.normal(size=(12, 5)), "output": {"linear": {"kernel": DRAW.normal(size=(5, 12))}}}
PATH = "output/linear/kernel"


def apply(params, x, t, context, layer=None, keys=None):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["first"])
    return (hidden @ params["output"]["linear"]["kernel"]).reshape(x.shape), {}


DENOISER = Network(lambda key: PARAMS, apply, {})
# Stands in for VGG16.
DISTANCE = FrozenNetwork(lambda params, a, b: jnp.mean(jnp.abs(a - b) ** 1.5, axis=(1, 2, 3)), {}, dict, lambda size: 0)
METHOD = Method(
    LinearPath(),
    XPrediction(LinearPath()),
    LogitNormal(),
    (PixelLoss(), LPIPSLoss(DISTANCE, 0.3)),
    {"ema": Decay(0.9)},
    0.0,
    balance=Balance(start=4, every=2),
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def arguments():
    draws = Draws(
        jnp.asarray(np.random.default_rng(1).normal(size=PIXELS.shape)), jnp.asarray(TIMES), jnp.zeros(4, bool)
    )
    return PIXELS, draws, Observed(jnp.zeros(4, jnp.int32), jnp.asarray(0)), {"lpips": {}}


def whole_gradients() -> dict[str, np.ndarray]:
    """A backward pass of each group through everything, of which only the kernel's entry is looked at."""

    def weighted(params, name):
        groups = METHOD.groups({"denoiser": params}, *arguments(), networks={"denoiser": DENOISER})
        return groups[name == "perceptual"]

    return {name: jax.grad(weighted)(PARAMS, name)["output"]["linear"]["kernel"] for name in ("flow", "perceptual")}


def test_gradients_are_those_of_two_whole_backward_passes():
    groups = functools.partial(METHOD.groups, networks={"denoiser": DENOISER})
    found = balance.output_gradients(lambda params: groups(params, *arguments()), {"denoiser": PARAMS}, PATH)
    for name, expected in whole_gradients().items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-10)


def test_nothing_before_the_output_layer_is_differentiated():
    """Three products: the two of the forward pass, and the kernel's gradient, once for each group."""
    groups = functools.partial(METHOD.groups, networks={"denoiser": DENOISER})

    def both(params):
        return balance.output_gradients(lambda params: groups(params, *arguments()), params, PATH)

    text = jax.jit(both).lower({"denoiser": PARAMS}).compile().as_text()
    whole = jax.jit(jax.grad(lambda params: sum(groups(params, *arguments()))))
    assert text.count(" dot(") <= 4 < whole.lower({"denoiser": PARAMS}).compile().as_text().count(" dot(") + 1


def test_the_factor_by_hand():
    gradients = whole_gradients()
    flow, perceptual = (np.sqrt(np.sum(np.square(np.asarray(gradients[name])))) for name in ("flow", "perceptual"))
    rule, factor, expected = METHOD.balance, jnp.ones(()), 1.0
    for step in range(1, 9):
        due = rule.due(jnp.asarray(step))
        assert bool(due) == (step in (4, 6, 8))
        factor = rule.after(factor, due, gradients)
        if step in (4, 6, 8):
            expected = 0.8 * expected + 0.2 * min(flow / (perceptual + 1e-4), 100)
        np.testing.assert_allclose(factor, expected, rtol=1e-12)
    tiny = {**gradients, "perceptual": 0 * gradients["perceptual"], "flow": 1e3 * gradients["flow"]}
    np.testing.assert_allclose(rule.after(jnp.ones(()), True, tiny), 0.8 + 0.2 * 100)
    broken = {**gradients, "flow": jnp.nan * gradients["flow"]}
    assert rule.after(jnp.asarray(3.0), True, broken) == 3


def test_the_factor_weights_the_balanced_losses_alone():
    networks, measured = {"denoiser": DENOISER}, {"balance": jnp.asarray(2.5)}
    loss, terms = METHOD.objective({"denoiser": PARAMS}, *arguments(), measured, networks=networks)
    expected = terms["pixel"] + 2.5 * 0.3 * terms["lpips"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # the pixel loss is float32

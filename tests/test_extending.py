"""What docs/extending.md promises: a loss with networks of its own trains without a change to the package."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from deco_jax.method.losses.loss import Loss
from deco_jax.method.objective import make_method
from deco_jax.method.step import Observed
from deco_jax.models import network as network_lib
from deco_jax.models.network import FrozenNetwork, functional
from deco_jax.models.projector import Projector


@dataclasses.dataclass(frozen=True)
class ToyLoss(Loss):
    """Hidden states, projected, against a frozen network's view of the images; and x̂'s brightness against it."""

    projector: network_lib.Network
    view: FrozenNetwork
    name = "toy"
    weight: float = 0.3
    layer = 1
    features = ("view",)

    @property
    def trained(self):
        return {"toy_projector": self.projector}

    @property
    def frozen(self):
        return {"view": self.view}

    def __call__(self, step):
        mean = jnp.mean(step.trained("toy_projector", step.hidden["aligned"]), axis=(1, 2))
        seen = step.frozen("view", step.image)
        return jnp.square(mean - step.features["view"]) + jnp.square(seen - step.features["view"])


def test_a_loss_of_one_s_own():
    """Its value against NumPy, and gradients into its network and, through x̂ and the hidden states, the denoiser."""
    config = quickstart.get_config("smoke")
    projector = functional(lambda rngs: Projector(config.model.width, 1, dtype=jnp.float32, rngs=rngs))
    view = FrozenNetwork(
        lambda params, x: params["gain"] * jnp.mean(jnp.asarray(x, jnp.float32), axis=(1, 2, 3)),
        {"gain": jax.ShapeDtypeStruct((), jnp.float32)},
        lambda: {"gain": np.float32(2.0)},
        lambda height, width: 2.0,
    )
    method = make_method(config)
    method = dataclasses.replace(method, losses=(*method.losses, ToyLoss(projector, view)))
    assert method.layer == 1
    networks = {"denoiser": network_lib.build(config.model.to_dict())} | method.trained
    assert networks.keys() == {"denoiser", "toy_projector"}
    draw = np.random.default_rng(0)
    # Away from the start, where the output is zero.
    params = {
        name: jax.tree.map(lambda leaf: np.float32(draw.normal(0, 0.1, leaf.shape)), network.shapes)
        for name, network in networks.items()
    }
    frozen = {name: network.load() for name, network in method.frozen.items()}
    pixels = draw.integers(0, 2, (4, 16, 16, 3), dtype=np.uint8)
    draws = method.draw(jax.random.key(0), pixels.shape)
    observed = Observed(jnp.arange(4), jnp.int32(10), method.observe(frozen, pixels))

    objective = functools.partial(method.objective, networks=networks)
    (loss, terms), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, pixels, draws, observed, frozen
    )
    t = np.asarray(draws.times)[:, None, None, None]
    x = pixels / 127.5 - 1
    state = (t * x + (1 - t) * np.asarray(draws.noise)).astype(np.float32)
    context = jnp.where(draws.dropped, 10, jnp.arange(4))
    output, hidden = networks["denoiser"].apply(params["denoiser"], state, draws.times, context, 1)
    image = state + (1 - t) * np.asarray(output)
    target = 2.0 * pixels.mean(axis=(1, 2, 3))
    projected = np.asarray(projector.apply(params["toy_projector"], hidden["aligned"])).mean(axis=(1, 2))
    expected = (projected - target) ** 2 + (2.0 * image.mean(axis=(1, 2, 3)) - target) ** 2
    np.testing.assert_allclose(terms["toy"], expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, terms["pixel"] + terms["frequency"] + 0.3 * terms["toy"], rtol=1e-5)
    for name in networks:
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[name])) > 1e-5, name

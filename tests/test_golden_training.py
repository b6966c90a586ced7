"""The objective, its gradients and five training steps, as the reference measured them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from deco_jax.convert import deco
from deco_jax.method import optimizer as optimizer_lib
from deco_jax.method.averages import update_average
from deco_jax.method.losses.frequency import FrequencyLoss
from deco_jax.method.losses.pixel import PixelLoss
from deco_jax.method.losses.repa import AlignmentLoss
from deco_jax.method.objective import Method
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import VPrediction, XPrediction
from deco_jax.method.step import Draws, Observed
from deco_jax.method.times import LogitNormal
from deco_jax.models import network
from deco_jax.models.projector import Projector
from deco_jax.run.sharding import compiling_for
from tests.helpers import golden, golden_params, nhwc, relative_error
from tests.test_deco import MODELS


def setup(model: str, frequency_weight: float = 1.0, **changes):
    """The model, the reference's parameters, and the objective with float images instead of uint8 ones."""
    settings = ml_collections.ConfigDict(MODELS[model] | changes)
    networks = {
        "denoiser": network.build(settings.to_dict()),
        "projector": network.functional(lambda rngs: Projector(48, 20, dtype=jnp.float32, rngs=rngs)),
    }
    prefix = "step/proj/"
    projector = {k.removeprefix(prefix): v for k, v in golden("losses").items() if k.startswith(prefix)}
    params = {
        "denoiser": deco.from_torch(settings, golden_params(model)),
        "projector": deco.projector_from_torch(projector),
    }
    teacher = network.FrozenNetwork(lambda params, images: params, {}, dict, lambda height, width: 0.0)
    alignment = AlignmentLoss(teacher, networks["projector"], layer=2, weight=0.5)
    frequency = FrequencyLoss(frequency_weight, 85)
    path = LinearPath()
    method = Method(
        path=path,
        prediction=XPrediction(path) if model == "baseline_dit" else VPrediction(path),
        times=LogitNormal(),
        losses=(PixelLoss(), frequency, alignment) if frequency_weight else (PixelLoss(), alignment),
        averages={},
        label_dropout=0.0,
    )
    return settings, jax.tree.map(jnp.asarray, params), functools.partial(method.objective, networks=networks)


def step_inputs(noise: np.ndarray, times: np.ndarray):
    values = golden("losses")
    tokens = jnp.asarray(values["step/features"])
    features = {"teacher": network.View(tokens, tokens.mean(axis=1))}
    observed = Observed(jnp.asarray(values["step/y"], jnp.int32), jnp.int32(10), features)
    draws = Draws(jnp.asarray(nhwc(noise)), jnp.asarray(times), jnp.zeros(len(times), bool))
    return jnp.asarray(nhwc(values["step/x"])), draws, observed


@pytest.fixture(autouse=True)
def float_images(monkeypatch):
    """The reference's images are floats already."""
    monkeypatch.setattr("deco_jax.images.to_float", lambda images: images)


def test_the_whole_objective_and_each_part():
    values = golden("losses")
    _, params, objective = setup("deco_c2i")
    loss, parts = jax.jit(objective)(params, *step_inputs(values["step/noise"], values["step/t"]))
    assert relative_error(parts["pixel"], values["step/fm_loss"]) < 2e-6
    assert relative_error(parts["frequency"], values["step/fm_loss_freq"]) < 2e-6
    assert relative_error(parts["alignment"], values["step/cos_loss"]) < 2e-6
    assert relative_error(loss, values["step/loss"]) < 2e-6


def test_jit_s_objective():
    """x-prediction on the baseline's weights, no frequency loss."""
    values, more = golden("losses"), golden("more")
    _, params, objective = setup("baseline_dit", frequency_weight=0.0)
    loss, parts = jax.jit(objective)(params, *step_inputs(values["step/noise"], more["jit_step/t"]))
    assert relative_error(parts["pixel"], more["jit_step/fm_loss"]) < 2e-6
    assert relative_error(parts["alignment"], more["jit_step/cos_loss"]) < 2e-6
    assert relative_error(loss, more["jit_step/loss"]) < 2e-6


@pytest.mark.parametrize(("platform", "remat"), [("cpu", "none"), ("tpu", "none"), ("tpu", "attention")])
def test_gradients(platform, remat):
    more = golden("more")
    model, params, objective = setup("deco_c2i", attention="auto", remat=remat)
    inputs = step_inputs(more["train/noise"][0], more["train/t"][0])
    with compiling_for(platform):
        grads, _ = jax.jit(jax.grad(objective, has_aux=True))(params, *inputs)
    ours = deco.to_torch(model, jax.tree.map(np.asarray, grads["denoiser"]))
    expected = {k.removeprefix("grad/"): v for k, v in more.items() if k.startswith("grad/")}
    assert len(expected) == 8
    for name, gradient in expected.items():
        assert relative_error(ours[name], gradient) < 1e-5, name


def test_five_training_steps():
    """AdamW, the gradient norm over denoiser and projector, and the denoiser's EMA."""
    more = golden("more")
    model, params, objective = setup("deco_c2i")
    settings = ml_collections.ConfigDict(
        {
            "learning_rate": 1e-3,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "warmup_steps": 0,
        }
    )
    adam = optimizer_lib.make_optimizer(settings)
    opt_state, ema = adam.init(params), params["denoiser"]

    @jax.jit
    def step(params, opt_state, ema, pixels, draws, observed):
        (loss, parts), grads = jax.value_and_grad(objective, has_aux=True)(params, pixels, draws, observed)
        updates, opt_state = adam.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = update_average(ema, params["denoiser"], 0.9)
        row = jnp.stack([parts["pixel"], parts["frequency"], parts["alignment"], loss, optax.tree.norm(grads)])
        return params, opt_state, ema, row

    rows = []
    for i in range(5):
        inputs = step_inputs(more["train/noise"][i], more["train/t"][i])
        params, opt_state, ema, row = step(params, opt_state, ema, *inputs)
        rows.append(row)
    for column in range(5):
        expected = more["train/fm_freq_cos_loss_gradnorm"][:, column]
        assert relative_error(np.stack(rows)[:, column], expected) < 1e-5, column
    for tree, key in ((params["denoiser"], "final"), (ema, "ema")):
        ours = deco.to_torch(model, jax.tree.map(np.asarray, tree))["dec_net.cond_embed.weight"]
        assert relative_error(ours, more[f"train/{key}/dec_net.cond_embed.weight"]) < 1e-4, key

"""REG: a class token that is noised, denoised and drawn along with the image; and all of alignment on eight devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10, reg256
from deco_jax import config as config_lib
from deco_jax import flops
from deco_jax.errors import UserError
from deco_jax.method.averages import Decay
from deco_jax.method.losses.reg import ClassTokenLoss
from deco_jax.method.objective import Method
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import VPrediction, XPrediction
from deco_jax.method.step import Observed
from deco_jax.method.times import LogitNormal
from deco_jax.models import network as network_lib
from deco_jax.models.network import FrozenNetwork, Network, View
from deco_jax.run import sharding
from deco_jax.sampling import generate
from deco_jax.sampling.extra_rows import pack, rows_of, unpack
from deco_jax.sampling.guidance import Guidance
from deco_jax.sampling.settings import Sampling
from tests.helpers import ROOT, fake_devices, lpips_files, relative_error
from tests.test_alignment_runs import train_and_resume

RANDOM = np.random.default_rng(0)


def test_rows_below_the_image():
    images, token = RANDOM.normal(size=(2, 4, 5, 3)), RANDOM.normal(size=(2, 17))
    assert [rows_of(channels, 5) for channels in (0, 1, 15, 16)] == [0, 1, 1, 2]
    packed = pack(jnp.asarray(images, jnp.float32), jnp.asarray(token, jnp.float32))
    assert packed.shape == (2, 6, 5, 3)
    for ours, theirs in zip(unpack(packed, 17), (images, token), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))


def test_the_image_s_noise_is_the_same_with_and_without():
    index = jnp.arange(3)
    plain, more = (generate.noise_of(5, index, (4, 6), rows) for rows in (0, 2))
    for stream in (0, 3):
        np.testing.assert_array_equal(more(stream)[:, :4], plain(stream))
    assert not np.array_equal(more(0)[:, 4:], more(3)[:, 4:])


@pytest.mark.parametrize("prediction", [VPrediction, XPrediction])
def test_the_token_s_loss(prediction):
    """By hand: what the network is given, and the error of the velocity that it answers with."""
    tokens = RANDOM.normal(size=(4, 6)).astype(np.float32)
    teacher = FrozenNetwork(lambda params, images: View(jnp.zeros((4, 1, 6)), jnp.asarray(tokens)), {}, dict, float)

    def denoiser(params, x, t, context, layer, keys, class_token):
        return jnp.zeros_like(x), {"token_velocity": 3 * class_token}

    loss = ClassTokenLoss(teacher, 6)
    path = LinearPath()
    method = Method(path, prediction(path), LogitNormal(0, 1, 1), (loss,), {"ema": Decay(0.9)}, 0.0)
    pixels = RANDOM.integers(0, 256, (4, 8, 8, 3), np.uint8)
    draws = method.draw(jax.random.key(0), pixels.shape)
    observed = Observed(jnp.zeros(4, jnp.int32), jnp.asarray(0), method.observe({"teacher": {}}, pixels))
    total, terms = method.objective(
        {"denoiser": {}}, pixels, draws, observed, {}, networks={"denoiser": Network(dict, denoiser, {})}
    )
    t, noise = np.asarray(draws.times, np.float64)[:, None], np.asarray(draws.token_noise, np.float64)
    by_hand = np.mean((3 * (t * tokens + (1 - t) * noise) - (tokens - noise)) ** 2)
    np.testing.assert_allclose(terms["class_token"], by_hand, rtol=1e-5)
    np.testing.assert_allclose(total, 0.03 * by_hand, rtol=1e-5)


def test_image_and_token_are_drawn_together():
    """Two Euler steps of velocities that hang on each other, guided; in float64 by hand."""

    def apply(params, x, t, context, class_token):
        strength = jnp.asarray(context, jnp.float32)[:, None]
        velocity = x * jnp.mean(class_token, axis=1)[:, None, None, None]
        return velocity, {"token_velocity": strength * class_token - jnp.mean(x, axis=(1, 2, 3))[:, None]}

    denoiser = generate.Denoiser(Network(dict, apply, {}), VPrediction(LinearPath()), token=5)
    generator = generate.Generator(denoiser, sharding.make_mesh(1, 1, jax.devices()[:1]))
    sampling = Sampling((4, 4), 2, guidance=Guidance(2.0, (0.1, 1.0)), seed=3)
    batch = {"index": jnp.arange(2), "context": jnp.asarray([1, 2], jnp.int32)}
    states = list(generator.states({}, batch, np.int32(0), sampling))
    start = np.asarray(generate.noise_of(3, jnp.arange(2), (4, 4), 1)(0), np.float64)
    x, token = start[:, :4], start[:, 4:].reshape(2, -1)[:, :5]
    assert relative_error(states[0], x) < 1e-6
    for step, guided in enumerate((False, True)):
        scale = 2.0 if guided else 1.0  # of the label, as the label 0 of no class adds nothing
        v = x * token.mean(1)[:, None, None, None]
        dtoken = scale * np.array([[1.0], [2.0]]) * token - x.mean((1, 2, 3))[:, None]
        x, token = x + 0.5 * v, token + 0.5 * dtoken
        assert relative_error(states[step + 1], x) < 1e-5
    with pytest.raises(UserError, match="denoises a class token along with the image"):
        list(generator.states({}, {**batch, "start": states[0]}, np.int32(0), sampling))


@pytest.mark.parametrize("name", ["deco", "dit", "jit", "pixnerd"])
def test_every_model_takes_a_class_token(name):
    """It moves its own image and no other; the image's tokens are as many as before."""
    config = cifar10.get_config("deco-smoke")
    config_lib.set_model(config, name, class_token=6)
    network = network_lib.build(config.model.to_dict())
    params = jax.tree.map(lambda leaf: jnp.asarray(RANDOM.normal(0, 0.1, leaf.shape), jnp.float32), network.shapes)
    images, times = jnp.asarray(RANDOM.normal(size=(2, 16, 24, 3)), jnp.float32), jnp.asarray([0.2, 0.7])
    apply = jax.jit(lambda token: network.apply(params, images, times, jnp.zeros(2, jnp.int32), 1, class_token=token))
    token = jnp.asarray(RANDOM.normal(size=(2, 6)), jnp.float32)
    output, hidden = apply(token)
    assert output.shape == images.shape
    assert hidden["token_velocity"].shape == (2, 6)
    assert hidden["aligned"].shape == hidden["low_frequency"].shape == (2, 24, config.model.width)
    other, _ = apply(token.at[0].add(1.0))
    assert not np.array_equal(other[0], output[0])
    np.testing.assert_array_equal(other[1], output[1])
    with pytest.raises(ValueError, match="denoises a class token too"):
        network.apply(params, images, times, jnp.zeros(2, jnp.int32))


def test_flops_of_one_token_more():
    config = reg256.get_config("XL")
    without = config.copy_and_resolve_references()
    without.model.class_token = 0
    width, depth, hidden = 1152, 28, int(2 * 4 * 1152 / 3)
    more = depth * (4 * width**2 + 3 * width * hidden + 2 * (257**2 - 256**2) * width) + 2 * width * 768 + 2 * width**2
    counted = [flops.forward_total(c.model, c.data.image_size) for c in (config, without)]
    assert counted[0] - counted[1] == pytest.approx(2 * more)


def test_settings_that_belong_together():
    config = reg256.get_config("L")
    config_lib.check(config)
    config.model.class_token = 1024
    with pytest.raises(UserError, match="class_token=1024 doesn't match the teacher's width; set it to 768"):
        config_lib.check(config)
    config.model.class_token = 0
    with pytest.raises(UserError, match="set both or neither"):
        config_lib.check(config)


# In an interpreter of its own, as the number of devices is fixed when JAX starts.
PROGRAM = """
import json, pathlib, sys
import jax, numpy as np
from configs import cifar10
from deco_jax.method import training
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.run import sharding
from deco_jax.run.state import create_state

jax.config.update("jax_default_matmul_precision", "highest")
config = cifar10.get_config("dit_repa-smoke")
config.model.depth, config.model.class_token, config.data.image_size = 2, 128, (16, 16)
config.optimizer.warmup_steps = 0
loss, config.teacher.size = config.loss, "2"
loss.class_token_weight, loss.repa_projector, loss.repa_mask, loss.repa_target = 0.03, "transformer", 0.25, "spatial"
loss.repa_until_step, loss.repa_schedule = 100, "cosine"
draw = np.random.default_rng(0)
weights = jax.tree.map(lambda leaf: draw.normal(0, 0.05, leaf.shape).astype(np.float32),
                       make_method(config).frozen["teacher"].shapes)
pixels = draw.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
result = {}
for data, fsdp in ((1, 1), (2, 4)):
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    networks, observe, shapes = training.abstract_networks(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    state = create_state(0, networks, optimizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes["teacher"])
    frozen = shapes | {"teacher": jax.device_put(weights, placed)}
    batch = sharding.place_batch(mesh, {"image": pixels, "label": np.arange(8, dtype=np.int32)})
    step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen).compile()
    rows = []
    for _ in range(4):
        state, metrics = step(state, batch, frozen)
        rows.append([float(metrics[name]) for name in ("loss", "alignment", "class_token", "gradient_norm")])
    result[data * fsdp] = rows
pathlib.Path(sys.argv[1]).write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "result.json"],
        cwd=ROOT,
        timeout=500,
        env={**os.environ, **fake_devices(8)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    np.testing.assert_allclose(result["8"], result["1"], rtol=2e-5)
    assert len({tuple(row) for row in result["1"]}) == 4


@pytest.mark.slow
def test_the_config_s_smoke(tmp_path):
    """Trains, samples and resumes."""
    setting = next(s for s in lpips_files(tmp_path) if s.startswith("--config.lpips.vgg="))
    found = train_and_resume("reg256.py:smoke", tmp_path / "run", setting.replace("lpips.vgg", "teacher.path"))
    assert all(row["class_token"] > 0 and row["alignment"] > 0 for row in found.values())

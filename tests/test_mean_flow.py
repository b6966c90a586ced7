"""MeanFlow: its identity on a field whose mean velocity is known, its step on a real network, its runs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import meanflow256, meanflow_cifar10
from deco_jax import config as config_lib
from deco_jax.api.inputs import Inputs
from deco_jax.convert import deco
from deco_jax.errors import UserError
from deco_jax.method.losses import mean_flow
from deco_jax.method.losses.mean_flow import MeanFlow, adaptive, along_path, guided_velocity, instantaneous
from deco_jax.method.objective import make_method
from deco_jax.method.step import Observed
from deco_jax.method.times import LogitNormal
from deco_jax.models import network as network_lib
from deco_jax.sampling import samplers
from deco_jax.sampling.guidance import Guidance, ZeroStar
from deco_jax.sampling.jumps import TrainedGuidance, make_mean_velocity
from deco_jax.sampling.settings import Sampling
from tests.helpers import fake_devices, relative_error
from tests.runs import NO_SAMPLES, rows, succeed

RATE = 0.7


def growth(length):
    """(e^(a·h) − 1)/h, the mean velocity of dx/dt = a·x over h at x = 1; a at h = 0."""
    safe = jnp.where(length == 0, 1.0, length)
    return jnp.where(length == 0, RATE, jnp.expm1(RATE * safe) / safe)


def mean_of_linear_field(state, times, jump):
    """Of dx/dt = a·x + t, whose solution over h is x·e^(a·h) + ∫ e^(a(h − s))(t + s) ds."""
    h = jump[:, 0]
    safe = jnp.where(h == 0, 1.0, h)
    grown = jnp.expm1(RATE * safe)
    driven = times * grown / RATE + (grown - RATE * safe) / RATE**2
    rest = jnp.where(h == 0, times, driven / safe)
    return growth(h)[:, None, None, None] * state + rest[:, None, None, None]


def test_the_identity_on_a_linear_field():
    """From the mean velocity that integration by hand gives, the instantaneous one follows to the last digits."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        state, times = jnp.asarray(rng.normal(size=(4, 2, 2, 3))), jnp.asarray([0.0, 0.2, 0.5, 0.9])
        jump = jnp.stack([jnp.asarray([1.0, 0.5, 0.0, 0.1]), *jnp.ones((3, 4))], axis=1)
        velocity = RATE * state + times[:, None, None, None]
        derivative = along_path(mean_of_linear_field, state, times, jump, velocity)
        length = jump[:, :1, None, None]
        u = mean_of_linear_field(state, times, jump)
        np.testing.assert_allclose(u - length * derivative, velocity, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(instantaneous(u, derivative, jump[:, 0]), velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_sampler_is_exact_where_the_mean_velocity_is(steps):
    x = np.random.default_rng(1).normal(size=(3, 2, 2, 3)).astype(np.float32)
    table = samplers.make_table("mean_flow", samplers.timesteps(steps, 2.0))
    carry = samplers.start(jnp.asarray(x), table.advance.shape[1])

    def denoiser(params, x, t, condition, jump):
        np.testing.assert_array_equal(condition, 5)
        return mean_of_linear_field(x, t, jump)

    velocity = make_mean_velocity(denoiser, Guidance(2.0, (0.1, 0.9)), None, np.int32(5))
    made = samplers.rows(table, np.zeros(steps, bool))
    end = samplers.integrate(velocity, carry, made, (0, steps), lambda step: jnp.zeros_like(x), spans=True)
    grown = np.exp(RATE)
    expected = grown * x + (grown - 1 - RATE) / RATE**2  # integrated by hand from 0 to 1
    np.testing.assert_allclose(end.point, expected, rtol=1e-5, atol=1e-5)


def test_what_the_network_is_told_while_drawing():
    told = []

    def denoiser(params, x, t, condition, jump):
        told.append((np.asarray(t), np.asarray(jump)))
        return x

    velocity = make_mean_velocity(denoiser, TrainedGuidance(3.0, (0.25, 0.75)), None, None)
    velocity(jnp.zeros((2, 1, 1, 3)), jnp.float32(0.5), False, jnp.float32(0.5))
    np.testing.assert_array_equal(told[0][0], [0.5, 0.5])
    np.testing.assert_array_equal(told[0][1], [[0.5, 3.0, 0.25, 0.75]] * 2)
    assert not TrainedGuidance(3.0, (0.0, 1.0)).steps(samplers.timesteps(4)).any()  # no step costs two passes


def test_guided_velocities():
    """By hand; and a network that learns them has the guided velocity (its own is the fixed point)."""
    one = np.ones((3, 1, 1, 3), np.float32)
    scale, inside = np.array([1.0, 4.0, 4.0], np.float32), np.array([True, True, False])
    found = guided_velocity(2 * one, 5 * one, 1 * one, scale, inside)
    np.testing.assert_allclose(np.asarray(found)[:, 0, 0, 0], [2, 2 + 0.75 * 4, 2])
    true, free, own = 2.0, 1.0, 0.0
    for _ in range(200):
        own = float(guided_velocity(true * one, own * one, free * one, scale, inside)[1, 0, 0, 0])
    assert own == pytest.approx(free + 4 * (true - free), rel=1e-4)


def test_adaptive_weights():
    error = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 2, 3)), jnp.float32)
    squares = np.sum(np.square(np.asarray(error, np.float64)), axis=(1, 2, 3))
    np.testing.assert_allclose(adaptive(error, 1.0, 0.01), squares / (squares + 0.01), rtol=1e-6)
    np.testing.assert_allclose(adaptive(error, 0.0, 0.01), squares, rtol=1e-6)
    slope = jax.grad(lambda e: jnp.sum(adaptive(e, 1.0, 0.01)))(error)
    np.testing.assert_allclose(slope, 2 * np.asarray(error) / (squares + 0.01)[:, None, None, None], rtol=1e-5)


def test_draws():
    times, count = LogitNormal(-0.8, 0.8), 20_000
    start, jump = map(np.asarray, MeanFlow(0.5, 8.0).draw(jax.random.key(0), times, count))
    still = jump[:, 0] == 0
    assert still.mean() == 0.5
    assert still[:100].sum() == 50  # on every device alike
    assert (jump[:, 0] >= 0).all()
    firsts = {bool(MeanFlow(0.5, 8.0).draw(jax.random.key(i), times, 8)[1][0, 0] == 0) for i in range(8)}
    assert firsts == {True, False}  # not always the same of two sources that alternate
    ends = start[~still] + jump[~still, 0]
    both = np.log(np.concatenate([start[~still], ends]) / (1 - np.concatenate([start[~still], ends])))
    assert both.mean() == pytest.approx(-0.8, abs=0.02)
    assert both.std() == pytest.approx(0.8, abs=0.02)
    assert np.log(jump[:, 1]).mean() == pytest.approx(np.log(8) / 2, abs=0.02)
    for column, low, high in ((1, 1, 8), (2, 0, 0.5), (3, 0.5, 1)):
        assert low <= jump[:, column].min() < jump[:, column].max() <= high
    for equal in (0.0, 0.25, 1.0):
        _, jump = MeanFlow(equal, 1.0).draw(jax.random.key(1), times, 8)
        assert np.mean(np.asarray(jump)[:, 0] == 0) == equal
        np.testing.assert_array_equal(jump[:, 1], 1)


# ---------------------------------------------------------------------------------------- on a real network


def prepared(variant, path="linear", **loss):
    """A config's method and networks, random weights that let no branch be zero, and a batch."""
    config = meanflow256.get_config(variant)
    config.model.depth, config.model.remat, config.model.dropout = 4, "full", 0.0
    config.path.name = path
    config.loss.update(loss)
    networks = {"denoiser": network_lib.build(config.model.to_dict())}
    rng = np.random.default_rng(3)

    def weights(path, leaf):
        return np.asarray((path[-1].key == "scale") + 0.1 * rng.standard_normal(leaf.shape), np.float32)

    params = {"denoiser": jax.tree_util.tree_map_with_path(weights, networks["denoiser"].shapes)}
    pixels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    observed = Observed(jnp.asarray([1, 2, 3, 4]), jnp.asarray(10))
    return config, make_method(config), networks, params, pixels, observed


@pytest.fixture(scope="module", params=[("jit-smoke", "linear"), ("deco-smoke", "linear"), ("jit-smoke", "energy")])
def step(request):
    """A step of MeanFlow, whose parts are computed in one program, and the parts by name."""
    _, method, networks, params, pixels, observed = prepared(*request.param)
    draws = method.draw(jax.random.key(4), pixels.shape)
    draws = draws._replace(dropped=jnp.zeros(4, bool), times=jnp.asarray([0.2, 0.3, 0.4, 0.6], jnp.float32))
    jump = [[0.5, 3.0, 0.1, 0.9], [0.0, 3.0, 0.1, 0.9], [0.3, 1.0, 0.1, 0.9], [0.2, 4.0, 0.1, 0.5]]
    draws = draws._replace(jump=jnp.asarray(jump, jnp.float32))

    def parts(params):
        step = mean_flow.MeanStep(
            params, pixels, draws, observed, path=method.path, prediction=method.prediction, networks=networks,
            frozen={}, layer=None,
        )  # fmt: skip
        names = ("velocity", "derivative", "target", "error", "head_error", "own_velocities", "point")
        return {name: getattr(step, name) for name in names}

    def u(params, state, times, jump):
        output, _ = networks["denoiser"].apply(params["denoiser"], state, times, observed.context, jump=jump)
        return method.prediction.velocity(output, state, times)

    with jax.default_matmul_precision("highest"):
        return jax.jit(parts)(params), jax.jit(u), params, draws


def test_derivative_by_central_differences(step, request):
    """Through embeddings, the scanned and rematerialised blocks, the head and the conversion of x̂ to a velocity.

    On the energy-guided path differences are coarser: its τ is a multiple of 2⁻¹⁷.
    """
    tolerance = 1e-2 if "energy" in request.node.callspec.params["step"] else 2e-3
    found, u, params, draws = step
    direction, eps = found["own_velocities"][0], 2e-3
    ahead = jnp.zeros_like(draws.jump).at[:, 0].set(-1.0)

    def at(e):
        state = found["point"].state + e * direction
        return np.asarray(u(params, state, draws.times + e, draws.jump + e * ahead), np.float64)

    differences = (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)
    assert relative_error(found["derivative"], differences) < tolerance


def test_error_and_target_by_hand(step):
    values, _, _, draws = step
    own = [np.asarray(v, np.float64) for v in values["own_velocities"]]
    names = ("velocity", "derivative", "target", "error")
    found = {name: np.asarray(values[name], np.float64) for name in names}
    length, scale = np.asarray(draws.jump[:, 0], np.float64), np.asarray(draws.jump[:, 1], np.float64)
    inside = np.array([1, 1, 1, 0])  # times .2, .3, .4 in (.1, .9]; .6 not in (.1, .5]
    share = (inside * (1 - 1 / scale))[:, None, None, None]
    target = np.asarray(values["point"].velocity) + share * (own[0] - own[1])
    assert np.abs(own[0] - own[1]).max() > 1e-3
    assert relative_error(found["target"], target) < 1e-5
    by_hand = found["velocity"] - length[:, None, None, None] * found["derivative"] - target
    assert relative_error(found["error"], by_hand) < 1e-5


def test_without_jumps_it_is_flow_matching():
    """r = s and no guidance: the loss is the mean square that a plain model with these weights has, times its values,
    and so is the gradient."""
    _, method, networks, params, pixels, observed = prepared(
        "deco-smoke", mean_flow_equal=1.0, mean_flow_guidance=1.0, mean_flow_power=0.0
    )
    draws = method.draw(jax.random.key(5), pixels.shape)
    assert not np.any(draws.jump[:, 0])
    # The guidance's numbers are told to the network all the same; here they are those of none.
    draws = draws._replace(jump=jnp.tile(jnp.asarray([0.0, 1.0, 0.0, 1.0], jnp.float32), (4, 1)))
    plain = meanflow256.get_config("deco-smoke")
    plain.loss.mean_flow = False
    ordinary = dataclasses.replace(make_method(plain), label_dropout=method.label_dropout)

    def terms(of, draws):
        def loss(params):
            _, found = of.objective(params, pixels, draws, observed, networks=networks)
            return found["mean_velocity" if of is method else "pixel"]

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = terms(method, draws)
    expected, plain_gradient = terms(ordinary, draws._replace(jump=None))
    count = pixels[0].size
    assert float(value) == pytest.approx(count * float(expected), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(
            a, count * np.asarray(b), rtol=1e-4, atol=1e-3 * count * float(np.abs(b).max()) + 1e-9
        )


@pytest.mark.parametrize("model", ["deco", "dit", "jit", "pixnerd"])
def test_weights_have_names_in_files(model):
    config = config_lib.default_config(model)
    config.model.width, config.model.depth, config.model.num_heads, config.model.mean_velocity = 32, 2, 2, True
    shapes = network_lib.build(config.model.to_dict()).shapes
    params = jax.tree.map(lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), shapes)
    assert {"jump_embed"} < params.keys()
    back = deco.from_torch(config.model, deco.to_torch(config.model, params), like=shapes)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_what_does_not_go_together():
    config = meanflow_cifar10.get_config("dit-smoke")
    config_lib.check(config)
    for changes, says in (
        ({"loss.mean_flow": False}, "set both or neither"),
        ({"model.mean_velocity": False}, "set both or neither"),
        ({"model.attention": "cudnn", "model.dtype": "bfloat16"}, "no forward-mode derivative"),
        ({"sample.guidance_rescale": 0.7}, "guidance_rescale has no effect on a model that learnt guidance"),
        ({"sample.guidance_average": "ema"}, "guidance_average has no effect"),
        ({"sample.guidance": 99.0}, "outside of what this model learns, 1 to 8"),
        ({"sample.guidance_interval": (-1.0, 1.0)}, "begin at 0"),
        ({"sample.guidance_interval": (0.6, 0.9)}, "begin at 0.5 or earlier"),
        ({"sample.guidance_interval": (0.1, 0.3)}, "end at 0.5 or later"),
        ({"sample.negative_prompt": "blurry"}, "negative_prompt has no effect"),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            config_lib.check(changed)
    inputs = Inputs(config, None, None, None, Sampling.of)
    assert inputs.sampling(guidance=2.0).guidance.scale == 2.0
    with pytest.raises(UserError, match=r"learnt its guidance .*; give guidance as a number"):
        inputs.sampling(guidance=ZeroStar(20.0))
    config.model.mean_velocity = config.loss.mean_flow = False
    with pytest.raises(UserError, match=r"sampler=mean_flow is for models with config.model.mean_velocity"):
        config_lib.check(config)


@pytest.mark.slow
def test_resumed_on_eight_devices_as_on_one(tmp_path):
    """Trained from a plain run's checkpoint, four steps on one device; and two and two on eight of a 4 × 2 mesh."""
    plain = [
        "--config=configs/imagenet256.py:smoke",
        f"--workdir={tmp_path / 'plain'}",
        "--config.loss.frequency_weight=0",
    ]
    succeed(*plain, NO_SAMPLES, "--config.train.num_steps=2")
    command = ["--config=configs/meanflow256.py:deco-smoke", f"--config.init_from={tmp_path / 'plain'}"]
    said = succeed(*command, NO_SAMPLES, f"--workdir={tmp_path / 'one'}").stdout
    assert "learnt the velocity; what MeanFlow adds to it starts from scratch" in said
    eight = [*command, NO_SAMPLES, f"--workdir={tmp_path / 'eight'}", "--config.mesh.data=4", "--config.mesh.fsdp=2"]
    succeed(*eight, "--config.train.num_steps=2", env=fake_devices(8))
    assert "resumed at step 2" in succeed(*eight, env=fake_devices(8)).stdout
    one, split = rows(tmp_path / "one"), rows(tmp_path / "eight")
    for number in (1, 2, 3, 4):
        for name in ("loss", "mean_velocity", "velocity_head", "gradient_norm"):
            assert split[number][name] == pytest.approx(one[number][name], rel=1e-3), (number, name)

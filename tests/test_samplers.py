"""Samplers against exact solutions, their orders of convergence, their costs, and the reference's trajectories."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from deco_jax.convert.deco import from_torch
from deco_jax.errors import UserError
from deco_jax.method.paths import LinearPath
from deco_jax.method.predictions import VPrediction, XPrediction
from deco_jax.method.times import shift_time
from deco_jax.models import network
from deco_jax.sampling import samplers
from deco_jax.sampling.guidance import Guidance, make_velocity
from tests.helpers import golden, golden_params, nhwc, relative_error

pytestmark = pytest.mark.fast

ODE_SAMPLERS = [name for name in samplers.SAMPLERS if name != "sde"]
ORDERS = {"euler": 1, "heun": 2, "heun_reuse": 2, "adams1": 1, "adams2": 2, "adams3": 2, "adams4": 2, "mean_flow": 1}


def sample(velocity, noise, *, sampler, times, guided, step_noise=None, return_trajectory=False):
    """The images, and if asked all states [steps + 1, ...], noise first, by the loop that draws them."""
    table = samplers.make_table(sampler, times)
    rows = samplers.rows(table, np.asarray(guided)[table.step])
    carry = samplers.start(noise, table.advance.shape[1])

    @jax.jit
    def advance(carry, first, last):  # one program for all steps; unrolled, 200 of them compile for minutes
        return samplers.integrate(
            velocity, carry, rows, (first, last), step_noise or (lambda step: jnp.zeros_like(noise))
        )

    states = [carry.state]
    for first, last in samplers.evaluations_of_steps(table):
        carry = advance(carry, first, last)
        states.append(carry.state)
    states[-1] = carry.point
    return (carry.point, jnp.stack(states)) if return_trajectory else carry.point


def num_evaluations(sampler: str, guided: np.ndarray) -> int:
    """Of a sampler whose steps are guided like that; a guided evaluation counts two."""
    table = samplers.make_table(sampler, samplers.timesteps(len(guided)))
    return int(np.sum(1 + guided[table.step]))


def unguided(times: np.ndarray) -> np.ndarray:
    return np.zeros(len(times) - 1, bool)


def integrate_in_numpy(velocity, x: float, table: samplers.Table, previous=()) -> float:
    """The table's meaning, spelled out in float64, for convergence that float32 would hide."""
    state = point = x
    velocities = list(previous)
    for row in range(len(table.time)):
        velocities = [velocity(point, table.time[row]), *velocities][: table.advance.shape[1]]
        state = table.keep[row] * state + sum(c * v for c, v in zip(table.advance[row], velocities, strict=False))
        point = state + sum(c * v for c, v in zip(table.predict[row], velocities, strict=False))
    return point


def from_full_history(table: samplers.Table, order: int) -> samplers.Table:
    """Without the first steps, which have fewer velocities."""
    columns = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return samplers.Table(**{name: column[order - 1 :] for name, column in columns.items()})


def growing(x, t):
    """x' = 2t·x, solved by exp(t²). All derivatives are positive, so errors of different steps don't cancel."""
    return 2 * t * x


def exact(t):
    return np.exp(t**2)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_a_constant_velocity_is_integrated_exactly(name, num_steps):
    times = samplers.timesteps(num_steps, 2.5)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    slope = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    images, trajectory = sample(
        lambda x, t, guided: slope, noise, sampler=name, times=times, guided=unguided(times), return_trajectory=True
    )
    assert images.dtype == jnp.float32
    expected = np.asarray(noise) + times[:, None, None, None, None] * np.asarray(slope)
    assert relative_error(trajectory, expected) < 1e-6
    np.testing.assert_array_equal(images, trajectory[-1])
    np.testing.assert_array_equal(noise, trajectory[0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_order_of_convergence(name, shift):
    errors = []
    for num_steps in (160, 320):
        table = samplers.make_table(name, samplers.timesteps(num_steps, shift))
        errors.append(abs(integrate_in_numpy(growing, 1.0, table) - exact(1.0)))
    # Adams 3 and 4 begin with lower orders, which bounds them here; Heun's last step is Euler's, of local order 2.
    assert np.log2(errors[0] / errors[1]) > ORDERS[name] - 0.2, errors
    if ORDERS[name] == 1:
        assert np.log2(errors[0] / errors[1]) < 1.2, errors


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_adams_from_an_exact_history(order, shift):
    errors = []
    for num_steps in (80, 160):
        grid = samplers.timesteps(num_steps, shift)
        past, table = grid[: order - 1], from_full_history(samplers.adams(grid, order), order)
        previous = [growing(exact(t), t) for t in past[::-1]]
        errors.append(abs(integrate_in_numpy(growing, exact(grid[order - 1]), table, previous) - exact(1.0)))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.3, errors


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_is_exact_for_polynomials_below_its_order(order):
    grid = np.array([0.0, 0.05, 0.2, 0.3, 0.55, 0.7, 1.0])
    previous = [order * t ** (order - 1) for t in grid[: order - 1][::-1]]
    table = from_full_history(samplers.adams(grid, order), order)
    end = integrate_in_numpy(lambda x, t: order * t ** (order - 1), grid[order - 1] ** order, table, previous)
    assert end == pytest.approx(1.0, abs=1e-12)


def test_classical_adams_bashforth_coefficients():
    advance = samplers.adams(samplers.timesteps(6), 4).advance * 6
    np.testing.assert_allclose(advance[0], [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(advance[1], [3 / 2, -1 / 2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(advance[2], [23 / 12, -16 / 12, 5 / 12, 0], atol=1e-12)
    np.testing.assert_allclose(advance[3:], [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * 3, atol=1e-12)


@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_the_loop_on_the_device_does_what_the_table_says(name):
    times = samplers.timesteps(9, 2.0)
    images = sample(
        lambda x, t, guided: growing(x, t), jnp.ones((1, 1, 1, 3)), sampler=name, times=times, guided=unguided(times)
    )
    expected = integrate_in_numpy(growing, 1.0, samplers.make_table(name, times))
    np.testing.assert_allclose(images, expected, rtol=1e-6)


def by_hand(name: str, velocity, x, times, guided):
    """Euler's and Heun's methods as loops, float64; guided by the start of the step."""
    states = [x]
    carried = None
    for i, (t, dt) in enumerate(zip(times[:-1], np.diff(times), strict=True)):
        v = velocity(x, t, guided[i]) if carried is None else carried
        if name == "euler" or i == len(times) - 2:
            x = x + dt * v
        else:
            corrected = velocity(x + dt * v, times[i + 1], guided[i])
            x = x + dt * (v + corrected) / 2
            carried = corrected if name == "heun_reuse" else None
        states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["euler", "heun", "heun_reuse"])
def test_against_plain_loops_with_guidance(name, num_steps):
    times = samplers.timesteps(num_steps, 2.0)
    guided = Guidance(3.0, (0.2, 0.7)).steps(times)
    noise = np.random.default_rng(0).normal(size=(2, 2, 2, 3))

    def velocity(x, t, guided, math=np):
        return (2.0 if guided else 1.0) * math.sin(3 * x + t)

    _, trajectory = sample(
        functools.partial(velocity, math=jnp),
        jnp.asarray(noise, jnp.float32),
        sampler=name,
        times=times,
        guided=guided,
        return_trajectory=True,
    )
    assert relative_error(trajectory, by_hand(name, velocity, noise, times, guided)) < 1e-5


INTERVALS = {"none": (2.0, 3.0), "some": (0.3, 1.0), "all": (-1.0, 1.0)}


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_network_runs_as_often_as_said(name, interval):
    """Counts the images that really pass through the network."""
    times = samplers.timesteps(8)
    guided = Guidance(2.0, INTERVALS[interval]).steps(times)
    seen = []

    def network_fn(x, t, label):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return x * t[:, None, None, None]

    velocity = make_velocity(
        lambda params, *inputs: network_fn(*inputs), Guidance(2.0), None, (jnp.zeros(3), jnp.ones(3))
    )
    ones, zeros = jnp.ones((3, 2, 2, 3)), jnp.zeros((3, 2, 2, 3))
    jax.block_until_ready(sample(velocity, ones, sampler=name, times=times, guided=guided, step_noise=lambda i: zeros))
    jax.effects_barrier()
    evaluations = {"heun": 15}.get(name, 8)
    assert len(seen) == evaluations
    assert sum(map(len, seen)) / 3 == num_evaluations(name, guided)
    if interval == "none":
        assert num_evaluations(name, guided) == evaluations
    if interval == "all":
        assert num_evaluations(name, guided) == 2 * evaluations


def test_evaluations_of_the_papers_sampling():
    times = samplers.timesteps(100)
    guided = Guidance(3.2, (0.1, 1.0)).steps(times)
    assert num_evaluations("euler", guided) == 11 + 2 * 89
    assert num_evaluations("heun", guided) == 2 * 11 + 2 * (2 * 89 - 1)


def test_sde_keeps_the_marginals():
    """Data N(0.7, 0.5²): the velocity is known, and x_t ~ N(0.7 t, (0.5 t)² + (1 − t)²) at every time."""
    mean, deviation, count = 0.7, 0.5, 60_000
    times = samplers.timesteps(200)

    def velocity(x, t, guided):
        # E[x − ε | x_t], data and noise being jointly normal with x_t.
        variance = (deviation * t) ** 2 + (1 - t) ** 2
        return mean + (deviation**2 * t - (1 - t)) / variance * (x - mean * t)

    def step_noise(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (count,))

    _, trajectory = sample(
        velocity,
        jax.random.normal(jax.random.key(0), (count,)),
        sampler="sde",
        times=times,
        guided=unguided(times),
        step_noise=step_noise,
        return_trajectory=True,
    )
    for i in (50, 100, 150, 200):
        t = times[i]
        spread = np.hypot(deviation * t, 1 - t)
        # Four standard errors, and the discretisation's own error, of the order of one step.
        assert abs(trajectory[i].mean() - mean * t) < 4 * spread / np.sqrt(count) + 0.003
        assert abs(trajectory[i].std() / spread - 1) < 4 / np.sqrt(2 * count) + 0.01
    # It really is stochastic: halfway, what is left of the noise is less than the ODE would keep.
    assert abs(np.corrcoef(trajectory[0], trajectory[150])[0, 1]) < 0.5


def test_sde_step_by_hand():
    """Three steps of the formula with the score written out, at float64."""
    times = samplers.timesteps(3, 2.0)
    rng = np.random.default_rng(0)
    noise, steps = rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(2, 2, 2, 2, 3))

    def velocity(x, t, math=np):
        return x * math.cos(t) - 1

    x = noise
    for i in range(2):
        t, dt = times[i], times[i + 1] - times[i]
        v = velocity(x, t)
        score, w = (t * v - x) / (1 - t), 1 - t
        x = x + v * dt + score * w * dt + np.sqrt(2 * w * dt) * steps[i]
    x = x + velocity(x, times[2]) * (1 - times[2])
    images = sample(
        lambda x, t, guided: velocity(x, t, jnp),
        jnp.asarray(noise, jnp.float32),
        sampler="sde",
        times=times,
        guided=unguided(times),
        step_noise=lambda i: jnp.asarray(steps, jnp.float32)[i],
    )
    assert relative_error(images, x) < 1e-6


def test_an_unknown_sampler_is_refused_with_the_names():
    times = samplers.timesteps(3)
    with pytest.raises(UserError, match="euler, heun, heun_reuse, adams1, adams2, adams3, adams4, sde"):
        sample(lambda x, t, g: x, jnp.ones((1, 1)), sampler="ddim", times=times, guided=unguided(times))
    with pytest.raises(UserError, match="'dpm'"):
        num_evaluations("dpm", unguided(times))


def test_flags_and_table_must_agree():
    with pytest.raises(ValueError, match="3 evaluations"):
        samplers.rows(samplers.make_table("euler", samplers.timesteps(3)), np.ones(4, bool))


def test_timesteps():
    for num_steps in (1, 50, 100, 250):
        times = samplers.timesteps(num_steps)
        assert times.dtype == np.float64
        np.testing.assert_array_equal(times, [i / num_steps for i in range(num_steps + 1)])
    np.testing.assert_allclose(samplers.timesteps(8, 3.0), shift_time(np.linspace(0, 1, 9), 3.0), rtol=1e-15)


@pytest.mark.parametrize("num_steps,shift", [(0, 1.0), (-3, 1.0), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_impossible_timesteps_are_refused(num_steps, shift):
    with pytest.raises(UserError, match="at least 1 step"):
        samplers.timesteps(num_steps, shift)


# The reference's trajectories: file, name there, our sampler, steps, shift, guidance, interval.
TRAJECTORIES = [
    ("samplers", "euler", "euler", 8, 1.0, 3.2, (0.1, 1.0)),
    ("samplers", "euler_shift3", "euler", 8, 3.0, 2.0, (0.0, 1.0)),
    ("samplers", "heun", "heun", 6, 1.0, 3.2, (0.1, 1.0)),
    ("samplers", "adam2", "adams2", 8, 3.0, 4.0, (0.0, 1.0)),
    ("samplers", "adam4", "adams4", 8, 1.0, 1.5, (0.0, 1.0)),
    ("more", "heun_reuse", "heun_reuse", 6, 1.0, 3.2, (0.1, 1.0)),
    ("more", "sde_mean", "sde", 8, 1.0, 2.0, (0.1, 1.0)),
    ("more", "sde", "sde", 8, 1.0, 2.0, (0.1, 1.0)),
    ("more", "jit_euler", "euler", 40, 1.0, 3.2, (0.1, 1.0)),
]
NETWORK = {"width": 48, "depth": 3, "num_heads": 4, "patch_size": 4, "num_classes": 10, "dtype": "float32"}
NETWORKS = {
    "deco_c2i": NETWORK | {"name": "deco", "decoder_width": 16, "decoder_depth": 2},
    "baseline_dit": NETWORK | {"name": "dit"},
}


@pytest.mark.parametrize("file,key,sampler,num_steps,shift,guidance,interval", TRAJECTORIES)
def test_golden_trajectories(file, key, sampler, num_steps, shift, guidance, interval):
    values, start = golden(file), golden("samplers")
    weights, kind = ("baseline_dit", XPrediction) if key == "jit_euler" else ("deco_c2i", VPrediction)
    prediction = kind(LinearPath())
    params = from_torch(ml_collections.ConfigDict(NETWORKS[weights]), golden_params(weights))
    net = network.build(NETWORKS[weights])
    times = samplers.timesteps(num_steps, shift)
    if f"{key}/timesteps" in values:
        assert relative_error(times, values[f"{key}/timesteps"]) < 2e-6
    step_noise = jnp.asarray(nhwc(values["sde/noise"])) * (key == "sde") if sampler == "sde" else None

    def run(params, noise, labels, null_labels):
        velocity = make_velocity(
            lambda params, x, t, label: prediction.velocity(net.apply(params, x, t, label)[0], x, t),
            Guidance(guidance),
            params,
            (labels, null_labels),
        )
        return sample(
            velocity,
            noise,
            sampler=sampler,
            times=times,
            guided=Guidance(guidance, interval).steps(times),
            step_noise=None if step_noise is None else lambda i: step_noise[i],
            return_trajectory=True,
        )[1]

    labels, null_labels = (jnp.asarray(start[name], jnp.int32) for name in ("cond", "uncond"))
    trajectory = run(params, jnp.asarray(nhwc(start["noise"])), labels, null_labels)
    expected = nhwc(values[f"{key}/x"])
    states = values[f"{key}/steps"] if f"{key}/steps" in values else np.arange(num_steps + 1)
    for state, reference in zip(states, expected, strict=True):
        assert relative_error(trajectory[state], reference) < 1e-4, state

"""Which steps are guided, and what a guided evaluation computes and costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.errors import UserError
from deco_jax.sampling import samplers
from deco_jax.sampling.guidance import Functions, Guidance, Weaker, ZeroStar, make_velocity
from deco_jax.sampling.samplers import timesteps
from deco_jax.sampling.settings import Sampling
from tests.helpers import relative_error

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 250])
def test_the_step_at_the_lower_edge_is_unguided(num_steps):
    guided = Guidance(3.2, (0.1, 1.0)).steps(timesteps(num_steps))
    edge = num_steps // 10
    assert not guided[: edge + 1].any()
    assert guided[edge + 1 :].all()
    assert guided.dtype == bool
    assert guided.shape == (num_steps,)


def test_the_upper_edge_is_guided():
    np.testing.assert_array_equal(Guidance(2.0, (0.25, 0.5)).steps(timesteps(4)), [False, False, True, False])


def test_the_first_step_is_unguided_from_zero():
    np.testing.assert_array_equal(Guidance(2.0, (0.0, 1.0)).steps(timesteps(3)), [False, True, True])
    np.testing.assert_array_equal(Guidance(2.0, (-1.0, 1.0)).steps(timesteps(3)), [True, True, True])


def test_shifted_times_decide():
    # Shift 3 moves 0.5 to 0.25.
    np.testing.assert_array_equal(Guidance(2.0, (0.25, 1.0)).steps(timesteps(2, 3.0)), [False, False])
    np.testing.assert_array_equal(Guidance(2.0, (0.25, 1.0)).steps(timesteps(2, 1.0)), [False, True])


def test_guidance_of_one_guides_nothing():
    assert not Guidance(1.0, (-1.0, 1.0)).steps(timesteps(50)).any()


@pytest.mark.parametrize("interval", [(1.0, 0.1), (0.1,), (0.0, 0.5, 1.0), (float("nan"), 1.0)])
def test_a_wrong_interval_is_refused(interval):
    with pytest.raises(UserError, match="guidance interval"):
        Guidance(2.0, interval).steps(timesteps(4))


def test_guide():
    assert Guidance(1.0).combine(np.array([3.0]), np.array([1.0])) == 3.0
    assert Guidance(0.0).combine(np.array([3.0]), np.array([1.0])) == 1.0
    assert Guidance(2.5).combine(np.array([3.0]), np.array([1.0])) == 6.0


def velocity_of(network, condition, null, scale):
    return make_velocity(lambda params, *inputs: network(*inputs), Guidance(scale), None, (condition, null))


def toy_network(x, t, condition):
    """Depends on every input, example by example."""
    scale = condition["label"] + condition["text"].sum(axis=(1, 2)) + t
    return x * scale[:, None, None, None]


def test_guided_evaluations_are_one_doubled_batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 2, 3)).astype(np.float32)
    condition = {"label": jnp.arange(3.0), "text": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)}
    null = {"label": jnp.float32(10.0), "text": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
    batches = []

    def network(x, t, condition):
        batches.append((x.shape[0], t.shape[0], condition["label"].shape[0], condition["text"].shape))
        return toy_network(x, t, condition)

    velocity = velocity_of(network, condition, null, 3.2)
    plain = velocity(x, jnp.float32(0.3), False)
    guided = velocity(x, jnp.float32(0.3), True)
    assert batches == [(3, 3, 3, (3, 4, 5)), (6, 6, 6, (6, 4, 5))]

    everywhere = {"label": jnp.full(3, 10.0), "text": jnp.broadcast_to(null["text"], (3, 4, 5))}
    t = jnp.full(3, 0.3)
    conditional, unconditional = (np.asarray(toy_network(x, t, c), np.float64) for c in (condition, everywhere))
    assert relative_error(plain, conditional) < 1e-6
    assert relative_error(guided, unconditional + 3.2 * (conditional - unconditional)) < 1e-5


def test_labels_stay_integers():
    def network(x, t, label):
        assert label.dtype == jnp.int32
        return x * jnp.take(jnp.arange(1.0, 12.0), label)[:, None, None, None]

    velocity = velocity_of(network, jnp.array([0, 4], jnp.int32), jnp.int32(10), 2.0)
    guided = jax.jit(lambda x: velocity(x, 0.5, True))(jnp.ones((2, 1, 1, 1)))
    np.testing.assert_allclose(guided.ravel(), [11 + 2 * (1 - 11), 11 + 2 * (5 - 11)])


def test_a_half_precision_network_gives_float32():
    velocity = velocity_of(lambda x, t, c: x.astype(jnp.bfloat16), jnp.zeros(2), jnp.zeros(2), 2.0)
    x = jnp.ones((2, 1, 1, 3))
    assert velocity(x, 0.0, True).dtype == velocity(x, 0.0, False).dtype == jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromAWeakerNetwork(Guidance):
    """A rule as another paper would add it: the guide is the same network with other parameters, same condition."""

    weak: jax.Array | float = 0.0

    def halves(self, denoiser, params, x, t, conditions):
        times = jnp.full(len(x), t)
        return jnp.stack([denoiser(p, x, times, conditions[0]) for p in (params, self.weak)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved(Guidance):
    def combine(self, conditional, unconditional):
        return super().combine(conditional, unconditional) / 2


def test_another_rule_is_a_class():
    """Its numbers are data: another scale doesn't trace again."""
    traced = []

    def denoiser(params, x, t, label):
        return x * params * label[:, None, None, None]

    @jax.jit
    def guided(rule, x):
        traced.append(type(rule).__name__)
        return make_velocity(denoiser, rule, 5.0, (jnp.asarray([1.0, 2.0]), 0.0))(x, 0.5, True)

    x = jnp.ones((2, 1, 1, 1))
    np.testing.assert_allclose(guided(FromAWeakerNetwork(3.0, weak=2.0), x).ravel(), [2 + 3 * 3, 2 * (2 + 3 * 3)])
    np.testing.assert_allclose(guided(FromAWeakerNetwork(2.0, (0.2, 0.4), weak=1.0), x).ravel(), [9, 18])
    np.testing.assert_allclose(guided(Halved(3.0), x).ravel(), [7.5, 15])
    assert traced == ["FromAWeakerNetwork", "Halved"]


# ---------------------------------------------------------------------------------------- other rules, in float64

X = np.random.default_rng(1).normal(size=(3, 4, 4, 3))
C = np.random.default_rng(2).normal(size=X.shape)
U = np.random.default_rng(3).normal(size=X.shape) + 0.5 * C


def zero_star(c, u, scale):
    a = np.stack(
        [np.full(c.shape[1:], np.vdot(ci, ui) / (np.vdot(ui, ui) + 1e-8)) for ci, ui in zip(c, u, strict=True)]
    )
    return a * u + scale * (c - a * u)


def rescaled(v, c, share):
    ratio = np.stack([np.full(c.shape[1:], ci.std() / vi.std()) for ci, vi in zip(c, v, strict=True)])
    return v * (share * ratio + 1 - share)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rule", [Guidance, ZeroStar])
def test_rules_in_float64(rule, share):
    """The conditional velocity is C where the condition is 1 and U where it is 0; traced numbers do the same."""

    def network(params, x, t, condition):
        return jnp.where(
            condition[:, None, None, None] > 0,
            jnp.asarray(C)[jnp.arange(len(x)) // 2],
            jnp.asarray(U)[jnp.arange(len(x)) // 2],
        )

    with jax.enable_x64(True):
        made = rule(2.5, rescale=share)
        v = zero_star(C, U, 2.5) if rule is ZeroStar else U + 2.5 * (C - U)
        expected = rescaled(v, C, share)
        np.testing.assert_allclose(made.rescaled(made.combine(C, U), C), expected, atol=1e-12)

        @jax.jit
        def run(rule):
            return make_velocity(network, rule, None, (jnp.ones(3), jnp.zeros(())))(jnp.asarray(X), 0.5, True)

        numbers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), made)
        np.testing.assert_allclose(run(numbers), expected, atol=1e-5)  # the halves are float32


def test_a_flat_velocity_is_not_rescaled():
    np.testing.assert_array_equal(
        Guidance(2.0, rescale=0.7).rescaled(jnp.zeros((2, 2, 2, 3)), jnp.ones((2, 2, 2, 3))), 0
    )


def test_a_weaker_model_is_one_evaluation_beside_the_model_s_own():
    calls = []

    def model(params, x, t, label):
        calls.append(("model", len(x)))
        return x * params * label[:, None, None, None]

    def weak(params, x, t, label):
        calls.append(("weaker", len(x)))
        return x * params * label[:, None, None, None]

    rule = Guidance(3.0, weaker=Weaker(Functions(weak, lambda params: params), 2.0))
    velocity = make_velocity(model, rule, 5.0, (jnp.asarray([1.0, 2.0, 4.0]), jnp.asarray(99.0)))
    plain, guided = velocity(jnp.ones((3, 1, 1, 1)), 0.5, False), velocity(jnp.ones((3, 1, 1, 1)), 0.5, True)
    assert calls == [("model", 3), ("model", 3), ("weaker", 3)]
    np.testing.assert_allclose(plain.ravel(), [5, 10, 20])
    np.testing.assert_allclose(guided.ravel(), np.array([1, 2, 4]) * (2 + 3 * (5 - 2)))


def test_an_evaluation_s_own_time_decides_if_asked():
    """Heun's corrector at 0.5 belongs to the step from 0.25: by default it is guided as that is."""
    starts = Sampling((8, 8), 4, "heun", guidance=Guidance(2.0, (0.3, 0.6)))
    own = dataclasses.replace(starts, guidance=Guidance(2.0, (0.3, 0.6), by_evaluation=True))
    table = starts.table()
    np.testing.assert_allclose(table.time, [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])
    np.testing.assert_array_equal(starts.guided(table), [False] * 4 + [True, True, False])
    np.testing.assert_array_equal(own.guided(table), [False] * 3 + [True, True, False, False])
    assert starts.num_evaluations() == own.num_evaluations() == 7 + 2
    euler = dataclasses.replace(own, sampler="euler")
    np.testing.assert_array_equal(euler.guided(euler.table()), Guidance(2.0, (0.3, 0.6)).steps(timesteps(4)))


def drawn(sampling, velocity, x):
    """All states of a sampling of x [1, 1, 1, 3]."""
    table = sampling.table()
    carry, states = samplers.start(jnp.asarray(x), table.advance.shape[1]), [np.asarray(x)]
    rows = samplers.rows(table, sampling.guided(table))
    for between in samplers.evaluations_of_steps(table):
        carry = samplers.integrate(velocity, carry, rows, between, lambda step: jnp.zeros_like(x))
        states.append(np.asarray(carry.state))
    return np.stack([*states[:-1], np.asarray(carry.point)])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_first_steps_that_wait(sampler):
    """As a loop in float64 whose velocity is zero in the first two steps; these evaluate nothing."""
    sampling = Sampling((1, 1), 6, sampler, shift=1.5, guidance=ZeroStar(2.0, (-1.0, 1.0), zero_steps=2))
    x, times = np.full((1, 1, 1, 3), 0.3, np.float32), timesteps(6, 1.5)

    def velocity(x, t, guided, math=np):
        return (2.0 if guided else 1.0) * math.sin(3 * x + t)

    state, expected = x.astype(np.float64), [x]
    for i, dt in enumerate(np.diff(times)):
        if i >= 2:
            v = velocity(state, times[i], True)
            if sampler == "heun" and i < 5:
                v = (v + velocity(state + dt * v, times[i + 1], True)) / 2
            state = state + dt * v
        expected.append(state)
    states = drawn(sampling, lambda *a: velocity(*a, math=jnp), x)
    assert relative_error(states, np.stack(expected)) < 1e-6
    assert sampling.num_evaluations() == 2 * (4 if sampler == "euler" else 7)


def test_waiting_is_part_of_guidance():
    plain = Sampling((1, 1), 3, guidance=ZeroStar(1.0))
    np.testing.assert_array_equal(plain.table().time, timesteps(3)[:-1])
    with pytest.raises(UserError, match="draw in more steps"):
        Sampling((1, 1), 1, guidance=ZeroStar(2.0)).table()
    with pytest.raises(UserError, match="backwards"):
        Sampling((1, 1), 3, guidance=ZeroStar(2.0), backwards=True).table()

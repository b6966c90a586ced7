"""Samplers: integrate dx/dt = v(x, t) from noise at t = 0 to images at t = 1.

Every sampler is a table with a row per network evaluation, worked out on the host in float64; one loop runs any of
them. A row says at which time the network is evaluated, and how the state and the next point of evaluation follow:

      point ── network, at `time` ──▶ v₀ (before it: v₁, v₂, …)
      state ◀─ keep · state + Σ advance[m] · vₘ + noise · ε
      point ◀─ state + Σ predict[m] · vₘ

Euler, Adams and SDE steps evaluate at the state itself, so `predict` is 0. Heun's method alternates: it predicts
without advancing, then advances by the mean of two velocities. The image is the last point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from deco_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
    """A sampler's coefficients; float64 with a leading axis [evaluations] and a second one [velocities]."""

    step: np.ndarray  # int [evaluations]: the step an evaluation belongs to; its guidance and noise follow from it
    time: np.ndarray  # [evaluations]
    keep: np.ndarray  # [evaluations]
    advance: np.ndarray  # [evaluations, velocities], newest velocity first
    predict: np.ndarray  # [evaluations, velocities]
    noise: np.ndarray  # [evaluations]
    ends: np.ndarray  # int [steps - 1]: the evaluations after which the state is x at times[1:-1]


def _table(step: np.ndarray, time: np.ndarray, advance: np.ndarray, ends: np.ndarray, **columns: np.ndarray) -> Table:
    defaults = {"keep": np.ones(len(time)), "predict": np.zeros_like(advance), "noise": np.zeros(len(time))}
    return Table(step, time, advance=advance, ends=ends, **{**defaults, **columns})


def adams(times: np.ndarray, order: int, past_times: Sequence[float] = ()) -> Table:
    """Adams–Bashforth on any grid: integrate the polynomial through the last velocities over each step.

    The first steps have fewer velocities and so a lower order, unless `past_times` (ascending, before times[0]) says
    that velocities from before the start will be given. Order 1 is Euler.
    """
    nodes = np.concatenate([np.asarray(past_times, np.float64), times[:-1]])
    steps = len(times) - 1
    advance = np.zeros((steps, order))
    for i in range(steps):
        last = nodes[: len(past_times) + i + 1][::-1][:order]
        dt = times[i + 1] - times[i]
        # Exact for each power of u = (t - times[i]) / dt, whose integral over the step is dt / (power + 1).
        powers = np.arange(len(last))
        advance[i, : len(last)] = dt * np.linalg.solve(((last - times[i]) / dt) ** powers[:, None], 1 / (powers + 1))
    return _table(np.arange(steps), times[:-1], advance, ends=np.arange(steps - 1))


def heun(times: np.ndarray) -> Table:
    """Heun's method, two evaluations a step; the last step is Euler's, with one: 2 · steps − 1 in all."""
    steps, dt = len(times) - 1, np.diff(times)
    evaluation = np.arange(2 * steps - 1)
    step, predictor = evaluation // 2, evaluation[:, None] % 2 == 0
    return _table(
        step,
        times[(evaluation + 1) // 2],
        advance=np.where(predictor, 0, dt[step, None] * [0.5, 0.5]),
        predict=np.where(predictor, dt[step, None] * [1.0, 0.0], 0),
        ends=evaluation[1::2],
    )


def heun_reuse(times: np.ndarray) -> Table:
    """Heun's method whose corrector's velocity is the next step's predictor: one evaluation a step.

    Evaluation i corrects step i − 1 and predicts step i; the last step is Euler's.
    """
    steps, dt = len(times) - 1, np.diff(times)
    corrected = np.concatenate([[0.0], dt[:-1]])
    return _table(
        np.maximum(np.arange(steps) - 1, 0),
        times[:-1],
        advance=corrected[:, None] * [0.5, 0.5],
        predict=dt[:, None] * [1.0, 0.0],
        ends=np.arange(1, steps),
    )


def sde(times: np.ndarray) -> Table:
    """Euler–Maruyama on dx = (v + w·s) dt + √(2w) dW with the score s = (t·v − x)/(1 − t) and w = 1 − t.

    It has the ODE's marginals (Song et al. 2021; Ma et al. 2024, "SiT", eq. 5). The last step is Euler's on the ODE.
    """
    t, dt = times[:-1], np.diff(times)
    stochastic = np.arange(len(dt)) < len(dt) - 1
    # w·s = t·v − x: nothing is divided by 1 − t.
    return _table(
        np.arange(len(dt)),
        t,
        keep=np.where(stochastic, 1 - dt, 1.0),
        advance=np.where(stochastic, (1 + t) * dt, dt)[:, None],
        noise=np.where(stochastic, np.sqrt(2 * (1 - t) * dt), 0.0),
        ends=np.arange(len(dt) - 1),
    )


SAMPLERS: dict[str, Callable[[np.ndarray], Table]] = {
    "euler": lambda times: adams(times, 1),
    "heun": heun,
    "heun_reuse": heun_reuse,
    "adams1": lambda times: adams(times, 1),
    "adams2": lambda times: adams(times, 2),
    "adams3": lambda times: adams(times, 3),
    "adams4": lambda times: adams(times, 4),
    "sde": sde,
}


def make_table(sampler: str, times: np.ndarray) -> Table:
    """The coefficients of the named sampler on float64 times [steps + 1]; UserError if there is no such sampler."""
    if sampler not in SAMPLERS:
        raise UserError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[sampler](np.asarray(times, np.float64))


def timesteps(num_steps: int, shift: float = 1.0) -> np.ndarray:
    """Sampling times, float64 [num_steps + 1] from 0 (noise) to 1 (data): i/num_steps, shifted as in `path.shift_time`.

    Raises:
        UserError: fewer than one step, or a shift that is not positive.
    """
    if num_steps < 1 or not shift > 0:
        raise UserError(f"Cannot sample in {num_steps} steps with shift {shift}; give at least 1 step and a shift > 0.")
    done = np.arange(num_steps + 1)
    # Of whole numbers, so that without a shift this is i/num_steps to the last bit, as the guidance interval needs.
    return done / (done + (num_steps - done) * shift)


def num_evaluations(sampler: str, guided: np.ndarray) -> int:
    """Network evaluations a sampler makes per image; a guided one counts two. `guided`: bool [steps]."""
    guided = np.asarray(guided, bool)
    table = make_table(sampler, timesteps(len(guided)))
    return int(np.sum(1 + guided[table.step]))


class Carry(NamedTuple):
    """Between two evaluations; arrays [batch, height, width, 3]."""

    state: Array  # x at the last time reached
    point: Array  # where the network is evaluated next
    previous: tuple[Array, ...]  # velocities, newest first, one fewer than the table has columns


def rows(table: Table) -> dict[str, Array]:
    """The table as arrays with a leading axis [evaluations], one entry of which `update` takes."""
    columns = {name: getattr(table, name) for name in ("time", "keep", "advance", "predict", "noise")}
    return {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}


def start(x: Array, table: Table, previous: Sequence[Array] | None = None) -> Carry:
    """Before the first evaluation. `previous` as in `integrate`."""
    x = x.astype(jnp.float32)
    return Carry(x, x, tuple(previous or [jnp.zeros_like(x)] * (table.advance.shape[1] - 1)))


def update(carry: Carry, velocity: Array, row: dict[str, Array], noise: Array | None = None) -> Carry:
    """What follows from the network's velocity at `carry.point`; `noise` where the row's is not 0."""
    velocities = (velocity.astype(jnp.float32), *carry.previous)

    def combine(coefficients: Array) -> Array:
        return sum((coefficients[m] * v for m, v in enumerate(velocities)), start=jnp.zeros_like(velocities[0]))

    state = row["keep"] * carry.state + combine(row["advance"])
    if noise is not None:
        state += row["noise"] * noise.astype(jnp.float32)
    return Carry(state, state + combine(row["predict"]), velocities[:-1])


def integrate(
    velocity: Callable[[Array, Array, bool], Array],
    x: Array,
    table: Table,
    guided: np.ndarray,
    step_noise: Callable[[Array], Array] | None = None,
    previous: Sequence[Array] | None = None,
    keep_states: bool = False,
) -> tuple[Array, Array | None]:
    """Run a table from state `x`: the last point, and all states [evaluations, *x.shape] if they are to be kept.

    `previous` are the velocities before the first, newest first, one fewer than the table has columns; None if the
    table starts without any.
    """
    guided = np.asarray(guided, bool)[table.step]
    noisy = bool(np.any(table.noise))
    if noisy and step_noise is None:
        raise ValueError("this sampler is stochastic: give step_noise")

    def evaluate(carry: Carry, row: dict[str, Array]) -> tuple[Carry, Array | None]:
        if guided.all() or not guided.any():
            v = velocity(carry.point, row["time"], bool(guided.all()))
        else:
            v = lax.cond(
                row["guided"],
                lambda point, t: velocity(point, t, True).astype(jnp.float32),
                lambda point, t: velocity(point, t, False).astype(jnp.float32),
                carry.point,
                row["time"],
            )
        carry = update(carry, v, row, step_noise(row["step"]) if noisy and step_noise is not None else None)
        return carry, carry.state if keep_states else None

    steps = {"guided": jnp.asarray(guided), "step": jnp.asarray(table.step, jnp.int32)}
    last, states = lax.scan(evaluate, start(x, table, previous), rows(table) | steps)
    return last.point, states


@overload
def sample(
    velocity: Callable[[Array, Array, bool], Array],
    noise: Array,
    *,
    sampler: str,
    times: np.ndarray,
    guided: np.ndarray,
    step_noise: Callable[[Array], Array] | None = None,
    return_trajectory: Literal[False] = False,
) -> Array: ...


@overload
def sample(
    velocity: Callable[[Array, Array, bool], Array],
    noise: Array,
    *,
    sampler: str,
    times: np.ndarray,
    guided: np.ndarray,
    step_noise: Callable[[Array], Array] | None = None,
    return_trajectory: Literal[True],
) -> tuple[Array, Array]: ...


def sample(
    velocity: Callable[[Array, Array, bool], Array],
    noise: Array,
    *,
    sampler: str,
    times: np.ndarray,
    guided: np.ndarray,
    step_noise: Callable[[Array], Array] | None = None,
    return_trajectory: bool = False,
) -> Array | tuple[Array, Array]:
    """Turn noise into images with the named sampler. To be called under `jax.jit`, with times and guided constant.

    Args:
        velocity: (x [batch, height, width, 3], t scalar, guided: bool) -> velocity, as `guidance.guided_velocity`
            makes. Which of the two evaluations a step needs is decided when tracing if all steps agree, otherwise
            by a conditional on the device, so that an unguided step always costs one.
        noise: [batch, height, width, 3], standard normal.
        sampler: a name in SAMPLERS.
        times: float64 [steps + 1] from `timesteps`.
        guided: bool [steps] from `guidance.guided_steps`.
        step_noise: traced step index -> standard normal [batch, height, width, 3]; only for "sde".
        return_trajectory: also return the states [steps + 1, batch, height, width, 3], noise first, images last.

    Returns:
        float32 images, or (images, trajectory).

    Raises:
        UserError: no such sampler.
    """
    times = np.asarray(times, np.float64)
    if np.shape(guided) != (len(times) - 1,):
        raise ValueError(f"{len(times)} times make {len(times) - 1} steps, but guided has shape {np.shape(guided)}")
    table = make_table(sampler, times)
    images, states = integrate(velocity, noise, table, guided, step_noise, keep_states=return_trajectory)
    if states is None:
        return images
    return images, jnp.concatenate([noise[None].astype(jnp.float32), states[table.ends], images[None]])

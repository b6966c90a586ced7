"""Samplers: integrate dx/dt = v(x, t) from noise at t = 0 to images at t = 1.

Every sampler is a table with a row per network evaluation, computed on the host in float64; one loop runs all of them.
A row says at which time the network is evaluated, and how the state and the next evaluation point follow from it:

      point ── network, at `time` ──▶ v₀ (before it: v₁, v₂, …)
      state ◀─ keep · state + Σ advance[m] · vₘ + noise · ε
      point ◀─ state + Σ predict[m] · vₘ

Euler, Adams and SDE steps evaluate at the state itself, so `predict` is 0. Heun's method alternates: it predicts
without advancing, then advances by the mean of two velocities. The image is the last point.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from deco_jax.errors import UserError
from deco_jax.shapes import Grid, State


@dataclasses.dataclass(frozen=True)
class Table:
    """A sampler's coefficients; float64 with a leading axis [evaluations] and a second one [velocities]."""

    step: np.ndarray  # int [evaluations]: the step that an evaluation belongs to, which decides its guidance and noise
    time: np.ndarray  # [evaluations]
    keep: np.ndarray  # [evaluations]
    advance: np.ndarray  # [evaluations, velocities], newest velocity first
    predict: np.ndarray  # [evaluations, velocities]
    span: np.ndarray  # [evaluations]: the time span of a mean velocity; 0: the velocity
    noise: np.ndarray  # [evaluations]
    ends: np.ndarray  # int [steps - 1]: the evaluations after which the state is x at times[1:-1]


def _table(step: np.ndarray, time: np.ndarray, advance: np.ndarray, ends: np.ndarray, **columns: np.ndarray) -> Table:
    defaults = {
        "keep": np.ones(len(time)),
        "predict": np.zeros_like(advance),
        "span": np.zeros(len(time)),
        "noise": np.zeros(len(time)),
    }
    return Table(step, time, advance=advance, ends=ends, **{**defaults, **columns})


def adams(times: Grid, order: int) -> Table:
    """Adams–Bashforth on any grid: integrate the polynomial through the last velocities over each step.

    The first steps have fewer velocities and so a lower order. Order 1 is Euler.
    """
    steps = len(times) - 1
    advance = np.zeros((steps, order))
    for i in range(steps):
        last = times[: i + 1][::-1][:order]
        dt = times[i + 1] - times[i]
        # Exact for each power of u = (t - times[i]) / dt, whose integral over the step is dt / (power + 1).
        powers = np.arange(len(last))
        advance[i, : len(last)] = dt * np.linalg.solve(((last - times[i]) / dt) ** powers[:, None], 1 / (powers + 1))
    return _table(np.arange(steps), times[:-1], advance, ends=np.arange(steps - 1))


def heun(times: Grid) -> Table:
    """Heun's method, two evaluations per step; the last step is Euler's, with one: 2 · steps − 1 in all."""
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


def heun_reuse(times: Grid) -> Table:
    """Heun's method that reuses the corrector's velocity as the next step's predictor: one evaluation per step.

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


def sde(times: Grid) -> Table:
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


def mean_flow(times: np.ndarray) -> Table:
    """Jump over each step by its mean velocity: exact in any number of steps, one too, if the network is."""
    dt = np.diff(times)
    return _table(np.arange(len(dt)), times[:-1], advance=dt[:, None], ends=np.arange(len(dt) - 1), span=dt)


# Enough for 512 steps of Heun's method.
MIN_ROWS = 1024

SAMPLERS: dict[str, Callable[[Grid], Table]] = {
    "euler": functools.partial(adams, order=1),
    "heun": heun,
    "heun_reuse": heun_reuse,
    "adams1": functools.partial(adams, order=1),
    "adams2": functools.partial(adams, order=2),
    "adams3": functools.partial(adams, order=3),
    "adams4": functools.partial(adams, order=4),
    "sde": sde,
    "mean_flow": mean_flow,
}


def make_table(sampler: str, times: Grid) -> Table:
    """The coefficients of the named sampler on float64 times [steps + 1]; UserError if there is no such sampler."""
    if sampler not in SAMPLERS:
        raise UserError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[sampler](np.asarray(times, np.float64))


def timesteps(num_steps: int, shift: float = 1.0) -> Grid:
    """Sampling times, float64 [num_steps + 1] from 0 (noise) to 1 (data): i/num_steps, shifted as in `path.shift_time`.

    Raises:
        UserError: fewer than one step, or a shift that is not positive.
    """
    if num_steps < 1 or not shift > 0:
        raise UserError(f"Cannot sample in {num_steps} steps with shift {shift}; give at least 1 step and a shift > 0.")
    done = np.arange(num_steps + 1)
    # Of whole numbers, so that without a shift this is i/num_steps to the last bit, as the guidance interval needs.
    return done / (done + (num_steps - done) * shift)


def after_waiting(table: Table, steps: int) -> Table:
    """The table with so many steps before its own in which the state stays what it is."""
    return dataclasses.replace(
        table, step=table.step + steps, ends=np.concatenate([np.full(steps, -1, table.ends.dtype), table.ends])
    )


class Carry(NamedTuple):
    """Between two evaluations; arrays [batch, height, width, 3]."""

    state: Array  # x at the last time reached
    point: Array  # where the network is evaluated next
    previous: tuple[Array, ...]  # velocities, newest first, one fewer than the table has columns


def rows(table: Table, guided: np.ndarray) -> dict[str, np.ndarray]:
    """The table as float32 arrays with a leading axis, one entry of which an evaluation takes.

    Filled up with rows that are never reached, so that programs for different numbers of steps are the same program.

    Args:
        guided: bool [evaluations], which of them are guided; without any the program has no guided half.

    Raises:
        ValueError: `guided` is of another number of evaluations.
    """
    if np.shape(guided) != table.step.shape:
        raise ValueError(f"the sampler makes {len(table.step)} evaluations, but guided has shape {np.shape(guided)}")
    columns = {name: getattr(table, name) for name in ("time", "keep", "advance", "predict", "span", "noise")}
    columns = {name: np.asarray(column, np.float32) for name, column in columns.items()}
    columns["step"] = table.step.astype(np.int32)
    if np.any(guided):
        columns["guided"] = np.asarray(guided, bool)
    length = max(MIN_ROWS, 1 << (len(table.step) - 1).bit_length())
    return {
        name: np.concatenate([column, np.zeros((length - len(column), *column.shape[1:]), column.dtype)])
        for name, column in columns.items()
    }


def evaluations_of_steps(table: Table) -> list[tuple[int, int]]:
    """For each step the evaluations (first, last + 1) after which its state is reached."""
    ends = [*(table.ends + 1).tolist(), len(table.step)]
    return list(itertools.pairwise([0, *ends]))


def start(x: State, velocities: int) -> Carry:
    """Before the first evaluation, at state `x`; `velocities` is the number of columns of the table."""
    x = x.astype(jnp.float32)
    return Carry(x, x, (jnp.zeros_like(x),) * (velocities - 1))


def update(carry: Carry, velocity: Array, row: dict[str, Array], noise: Array) -> Carry:
    """What follows from the network's velocity at `carry.point`, by the row of that evaluation."""
    velocities = (velocity.astype(jnp.float32), *carry.previous)

    def combine(coefficients: Array) -> Array:
        return sum((coefficients[m] * v for m, v in enumerate(velocities)), start=jnp.zeros_like(velocities[0]))

    state = row["keep"] * carry.state + combine(row["advance"]) + row["noise"] * noise.astype(jnp.float32)
    return Carry(state, state + combine(row["predict"]), velocities[:-1])


def integrate(
    velocity: Callable[..., Array],
    carry: Carry,
    rows: dict[str, Array],
    between: tuple[int | Array, int | Array],
    step_noise: Callable[[Array], Array],
    spans: bool = False,
) -> Carry:
    """Run the evaluations of a table from between[0] up to but without between[1]. To be called under `jax.jit`.

    Everything that says how images are drawn is data, so one compiled program serves all numbers of steps, times and
    guidance. What a row doesn't need is not computed: an unguided evaluation costs one, and noise is drawn where it is
    added.

    Args:
        velocity: (x [batch, height, width, 3], t scalar, guided: bool) → velocity, as `guidance.make_velocity` makes.
        rows: of `rows`.
        step_noise: index of a step → standard normal [batch, height, width, 3].
        spans: whether `velocity` takes a row's span as a fourth argument.
    """

    def evaluate(i: Array, carry: Carry) -> Carry:
        row = {name: lax.dynamic_index_in_dim(column, i, keepdims=False) for name, column in rows.items()}
        more = [row["span"]] if spans else []

        def plain(point: Array, t: Array, *more: Array) -> Array:
            return velocity(point, t, False, *more).astype(jnp.float32)

        def with_guide(point: Array, t: Array, *more: Array) -> Array:
            return velocity(point, t, True, *more).astype(jnp.float32)

        if "guided" in row:
            v = lax.cond(row["guided"], with_guide, plain, carry.point, row["time"], *more)
        else:  # memory for a doubled batch would be reserved even if no evaluation took it
            v = plain(carry.point, row["time"], *more)
        noise = lax.cond(
            row["noise"] != 0,
            lambda step: step_noise(step).astype(jnp.float32),
            lambda step: jnp.zeros_like(carry.state),
            row["step"],
        )
        return update(carry, v, row, noise)

    return lax.fori_loop(*between, evaluate, carry)

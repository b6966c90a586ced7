"""Guidance: how a network's conditional velocity is combined with another one, and at which steps.

A rule is a frozen dataclass, registered as a JAX pytree. Its type says what is computed; its numbers are data of the
compiled program, so another scale or interval doesn't compile again. To add a rule, write a subclass of `Guidance` and
add its name to `RULES`:

    another velocity of a guided step   override `combine`
    another set of guided times         override `guides`
    first steps that change nothing     override `waits`
    another pair of velocities          override `halves`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.errors import UserError
from deco_jax.shapes import Grid, Guided, Halves, Scalar, State

# (params, x [n, height, width, 3], t [n], condition with leading axis n) → velocity [n, height, width, 3]
Denoiser = Callable[[Any, Array, Array, Any], Array]


class Functions:
    """A network as a weaker guide needs it: pure functions, the same object for the same program.

    Args:
        velocity: as for `make_velocity`.
        whole: (params) → the same, whole on this device; see `models.network.Network`.
    """

    def __init__(self, velocity: Denoiser, whole: Callable[[Any], Any]) -> None:
        self.velocity, self.whole = velocity, whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weaker:
    """A weaker model; its functions are part of the program, its parameters are data."""

    functions: Functions = dataclasses.field(metadata={"static": True})
    params: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance within an interval of time (Kynkäänniemi et al. 2024).

    It leads away from the model without a condition (classifier-free, Ho & Salimans 2022) or from a weaker model with
    the same condition (autoguidance, Karras et al. 2024).

    Args:
        scale: 1.0 changes nothing, so no step needs two evaluations.
        interval: (low, high); times low < t <= high are guided.
        rescale: share of the guided velocity that gets the conditional one's standard deviation (Lin et al. 2023,
            section 3.4; DeCo's code uses 0.7); 0: none.
        by_evaluation: each evaluation's own time decides, as in JiT's code; otherwise the start of its step. They
            differ for Heun's corrector.
        weaker: the model to lead away from instead of the null condition.
    """

    scale: float | Array = 1.0
    interval: Sequence[float] = (0.0, 1.0)
    rescale: float | Array = 0.0
    by_evaluation: bool | Array = False
    weaker: Weaker | None = None

    @property
    def waits(self) -> int:
        """The number of first steps that leave the noise unchanged and evaluate nothing."""
        return 0

    def evaluations(self, times: np.ndarray, steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return which evaluations are guided, bool [evaluations].

        Args:
            times: float64 [evaluations], the time of each.
            steps: int [evaluations], the step that each belongs to.
            starts: float64 [steps], the start of each step.

        Raises:
            UserError: as for `guides`.
        """
        return self.guides(times if self.by_evaluation else np.asarray(starts)[steps])

    def steps(self, times: Grid) -> Guided:
        """Return which sampling steps are guided by their start, bool [steps]; times [steps + 1] in ascending order."""
        return self.guides(np.asarray(times)[:-1])

    def guides(self, times: np.ndarray) -> np.ndarray:
        """Return which times are guided.

        This is decided on the host in float64, so that 5/50, 10/100 and 25/250 all equal 0.1 and are outside (0.1, 1].

        Args:
            times: float64 from `samplers.timesteps`, already shifted.

        Returns:
            bool of the same shape.

        Raises:
            UserError: the interval is not two numbers in ascending order.
        """
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise UserError(
                f"the guidance interval {tuple(self.interval)} is not (low, high); give two times, low <= high"
            )
        low, high = (float(edge) for edge in self.interval)
        times = np.asarray(times, np.float64)
        return (low < times) & (times <= high) & (self.scale != 1.0)

    def halves(self, denoiser: Denoiser, params: Any, x: State, t: Scalar, conditions: tuple[Any, Any]) -> Halves:
        """Return the conditional velocity and the one to lead away from, float32 [2, batch, height, width, 3].

        Both come from one evaluation of 2 · batch images, or from one evaluation each of the model and the weaker one.
        Arguments are as for `make_velocity`; `t` is a scalar.
        """
        condition, null = conditions
        batch = x.shape[0]
        if self.weaker is not None:
            times, weaker = jnp.full((batch,), t, jnp.float32), self.weaker
            pair = (
                denoiser(params, x, times, condition),
                weaker.functions.velocity(weaker.params, x, times, condition),
            )
            return jnp.stack([v.astype(jnp.float32) for v in pair])
        both = jax.tree.map(_interleave, condition, null)
        v = denoiser(params, _interleave(x, x), jnp.full((2 * batch,), t, jnp.float32), both)
        return jnp.moveaxis(v.astype(jnp.float32).reshape(batch, 2, *v.shape[1:]), 1, 0)

    def combine(self, conditional: State, unconditional: State) -> State:
        """Return unconditional + scale · (conditional − unconditional), all [batch, height, width, 3]."""
        return unconditional + self.scale * (conditional - unconditional)

    def rescaled(self, velocity: Array, conditional: Array) -> Array:
        """Return velocity · (rescale · std(conditional) / std(velocity) + 1 − rescale), for each image separately."""
        if isinstance(self.rescale, (int, float)) and not self.rescale:
            return velocity
        axes = tuple(range(1, velocity.ndim))
        wanted, found = (jnp.std(v, axis=axes, keepdims=True) for v in (conditional, velocity))
        ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1.0), 1.0)
        return velocity * (self.rescale * ratio + (1 - self.rescale))

    def whole(self) -> Guidance:
        """Return the rule with a weaker model's parameters made whole on this device, before a loop that uses them."""
        if self.weaker is None:
            return self
        weaker = dataclasses.replace(self.weaker, params=self.weaker.functions.whole(self.weaker.params))
        return dataclasses.replace(self, weaker=weaker)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZeroStar(Guidance):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): scales the unconditional velocity for the best fit, and starts
    with steps of velocity zero.

    Args:
        zero_steps: number of first steps at velocity zero, where a model knows the least; only if scale is not 1.
    """

    zero_steps: int | Array = 1

    @property
    def waits(self) -> int:
        return int(self.zero_steps) if self.scale != 1.0 else 0

    def combine(self, conditional: Array, unconditional: Array) -> Array:
        """Return a·u + scale·(c − a·u) with a = ⟨c, u⟩ / (‖u‖² + 1e-8), for each image separately."""
        axes = tuple(range(1, conditional.ndim))
        dot = jnp.sum(conditional * unconditional, axis=axes, keepdims=True)
        square = jnp.sum(jnp.square(unconditional), axis=axes, keepdims=True)
        return super().combine(conditional, dot / (square + 1e-8) * unconditional)


RULES: dict[str, type[Guidance]] = {"plain": Guidance, "zero_star": ZeroStar}


def _interleave(a: Array, b: Array) -> Array:
    """Interleave [batch, ...] and what broadcasts to it → [2 · batch, ...], with pairs next to each other."""
    # On a mesh, both halves of an example then stay on the example's device.
    return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def make_velocity(
    denoiser: Denoiser, guidance: Guidance, params: Any, conditions: tuple[Any, Any]
) -> Callable[[Array, Array, bool], Array]:
    """Bind a network to its parameters, conditions and guidance: the function of state and time that is integrated.

    Args:
        denoiser: called with n = batch images, or with 2 · batch in a guided step.
        conditions: (condition, null). A condition is an array or a tree of arrays with a leading batch axis: labels
            [batch], text [batch, tokens, features]. Null is the same tree, its leaves broadcast to the condition's:
            the "no class" label, the empty prompt.

    Returns:
        f(x [batch, height, width, 3], t scalar, guided) → float32 velocity. An unguided call only evaluates the
        conditional half.
    """

    def velocity(x: State, t: Scalar, guided: bool) -> State:
        if guided:
            conditional, unconditional = guidance.halves(denoiser, params, x, t, conditions)
            return guidance.rescaled(guidance.combine(conditional, unconditional), conditional)
        times = jnp.full((x.shape[0],), t, jnp.float32)
        return denoiser(params, x, times, conditions[0]).astype(jnp.float32)

    return velocity

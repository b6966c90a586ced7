"""Guidance: what combines a network's conditional velocity with another one, and at which steps.

A rule is a frozen dataclass, registered as a JAX pytree: its type says what is computed, its numbers are data of the
compiled program, so another scale or interval doesn't compile again. One more rule is one more subclass of `Guidance`:

    velocity of a rescaled step     override `combine`
    another set of guided steps     override `steps`
    a weaker network as the guide   override `halves`, with its parameters as a field
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022) within an interval of time (Kynkäänniemi et al. 2024).

    Args:
        scale: 1.0 changes nothing, so that no step costs two evaluations.
        interval: (low, high); steps whose start time t has low < t <= high are guided.
    """

    scale: float | Array = 1.0
    interval: Sequence[float] = (0.0, 1.0)

    def steps(self, times: Grid) -> Guided:
        """Which sampling steps are guided.

        Decided on the host in float64, so that 5/50, 10/100 and 25/250 all equal 0.1 and lie outside (0.1, 1].

        Args:
            times: float64 [steps + 1] from `samplers.timesteps`, ascending, shifted already.

        Returns:
            bool [steps].

        Raises:
            UserError: the interval is not two numbers in ascending order.
        """
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise UserError(
                f"The guidance interval {tuple(self.interval)} is not (low, high); give two times, low <= high."
            )
        low, high = (float(edge) for edge in self.interval)
        starts = np.asarray(times, np.float64)[:-1]
        return (low < starts) & (starts <= high) & (self.scale != 1.0)

    def halves(self, denoiser: Denoiser, params: Any, x: State, t: Scalar, conditions: tuple[Any, Any]) -> Halves:
        """The conditional velocity and the one to lead away from, float32 [2, batch, height, width, 3].

        Here both are one evaluation of 2 · batch images. Arguments as of `make_velocity`, `t` a scalar.
        """
        condition, null = conditions
        batch = x.shape[0]
        both = jax.tree.map(_interleave, condition, null)
        v = denoiser(params, _interleave(x, x), jnp.full((2 * batch,), t, jnp.float32), both)
        return jnp.moveaxis(v.astype(jnp.float32).reshape(batch, 2, *v.shape[1:]), 1, 0)

    def combine(self, conditional: State, unconditional: State) -> State:
        """unconditional + scale · (conditional − unconditional), all [batch, height, width, 3]."""
        return unconditional + self.scale * (conditional - unconditional)


def _interleave(a: Array, b: Array) -> Array:
    """[batch, ...] and what broadcasts to it → [2 · batch, ...], pairs side by side."""
    # So that on a mesh both halves of an example stay on the example's device.
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
        f(x [batch, height, width, 3], t scalar, guided) → float32 velocity. An unguided call evaluates the conditional
        half alone.
    """

    def velocity(x: State, t: Scalar, guided: bool) -> State:
        if guided:
            conditional, unconditional = guidance.halves(denoiser, params, x, t, conditions)
            return guidance.combine(conditional, unconditional)
        times = jnp.full((x.shape[0],), t, jnp.float32)
        return denoiser(params, x, times, conditions[0]).astype(jnp.float32)

    return velocity

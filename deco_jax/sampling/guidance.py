"""Classifier-free guidance (Ho & Salimans 2022) within an interval of time (Kynkäänniemi et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.errors import UserError


def guided_steps(times: np.ndarray, guidance: float, interval: Sequence[float] = (0.0, 1.0)) -> np.ndarray:
    """Which sampling steps are guided: those whose start time t has low < t <= high.

    Decided on the host in float64, so that 5/50, 10/100 and 25/250 all equal 0.1 and lie outside (0.1, 1].

    Args:
        times: float64 [steps + 1] from `samplers.timesteps`, shifted already.
        guidance: the scale; at 1.0 guidance changes nothing, so no step is guided.
        interval: (low, high).

    Returns:
        bool [steps].

    Raises:
        UserError: the interval is not two numbers in ascending order.
    """
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise UserError(f"The guidance interval {tuple(interval)} is not (low, high); give two times, low <= high.")
    low, high = (float(edge) for edge in interval)
    starts = np.asarray(times, np.float64)[:-1]
    return (low < starts) & (starts <= high) & (guidance != 1.0)


def guide(conditional: Array, unconditional: Array, scale: float | Array) -> Array:
    """unconditional + scale · (conditional − unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def guided_velocity(
    velocity_fn: Callable[[Array, Array, Any], Array], condition: Any, null_condition: Any, scale: float | Array
) -> Callable[[Array, Array, bool], Array]:
    """Bind a network to its conditions and guidance: the function of state and time that samplers integrate.

    Args:
        velocity_fn: (x [n, height, width, 3], t [n], condition with leading axis n) -> velocity [n, height, width, 3];
            called with n = batch or 2 · batch.
        condition: array or tree of arrays with a leading batch axis: labels [batch], text [batch, tokens, features].
        null_condition: same tree, its leaves broadcast to the condition's: the "no class" label, the empty prompt.
        scale: the guidance scale.

    Returns:
        f(x, t scalar, guided) -> float32 velocity. Guided calls evaluate both halves as one batch of 2 · batch,
        unguided ones only the conditional half.
    """

    def interleave(a: Array, b: Array) -> Array:
        # Pairs lie side by side, so that on a mesh both halves of an example stay on the example's device.
        return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(2 * a.shape[0], *a.shape[1:])

    def velocity(x: Array, t: Array, guided: bool) -> Array:
        batch = x.shape[0]
        if not guided:
            return velocity_fn(x, jnp.full((batch,), t, jnp.float32), condition).astype(jnp.float32)
        both = jax.tree.map(interleave, condition, null_condition)
        v = velocity_fn(interleave(x, x), jnp.full((2 * batch,), t, jnp.float32), both).astype(jnp.float32)
        v = v.reshape(batch, 2, *v.shape[1:])
        return guide(v[:, 0], v[:, 1], scale)

    return velocity

"""The flow's path between noise (t = 0) and data (t = 1), and how training times are drawn.

The path is a straight line, x_t = t·x + (1 − t)·ε, so its velocity v = x − ε does not depend on t.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.errors import UserError

Prediction = Literal["v", "x"]

# JiT's floor of 1 − t (Li & He 2025): without it an x-prediction's velocity is unbounded towards t = 1.
MIN_REMAINING_TIME = 0.05


def _per_example(t: Array, like: Array) -> Array:
    """[batch] or a scalar, shaped to multiply `like` [batch, ...]."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def interpolate(x: Array, noise: Array, t: Array) -> Array:
    """x_t = t·x + (1 − t)·ε for images x and noise ε, both [batch, height, width, 3], and t [batch] in [0, 1]."""
    t = _per_example(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Array, noise: Array) -> Array:
    """dx_t/dt = x − ε; all [batch, height, width, 3]."""
    return x - noise


def to_velocity(output: Array, x_t: Array, t: Array, prediction: Prediction | str) -> Array:
    """The velocity that a network's output stands for.

    Given the true image in place of an x-prediction's output, this is that prediction's target: JiT divides both
    by max(1 − t, 0.05), so above t = 0.95 the target is not x − ε.

    Args:
        output: [batch, height, width, 3].
        x_t: where the network was evaluated, same shape.
        t: [batch] or scalar, in [0, 1].
        prediction: "v", the output is the velocity; "x", it is the clean image.

    Raises:
        UserError: the prediction has another name.
    """
    if prediction == "v":
        return output
    if prediction == "x":
        return (output - x_t) / jnp.maximum(1 - _per_example(t, x_t), MIN_REMAINING_TIME)
    raise UserError(f"There is no prediction type {prediction!r}; choose 'v' (velocity) or 'x' (clean image).")


def shift_time(t: Array, shift: float) -> Array:
    """t / (t + (1 − t)·shift): shift > 1 moves times in [0, 1] towards the noise (Esser et al. 2024, §5.3.2)."""
    return t / (t + (1 - t) * shift)


def sample_times(key: Array, batch: int, shift: float = 1.0, mean: float = 0.0, std: float = 1.0) -> Array:
    """Training times: float32 [batch] in (0, 1), the logistic function of N(mean, std²), shifted.

    Esser et al. 2024, §3.1 "logit-normal sampling". JiT's choice is mean −0.8, std 0.8.
    """
    return shift_time(jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,))), shift)

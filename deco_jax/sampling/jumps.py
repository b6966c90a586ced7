"""Drawing with networks that predict the mean velocity over a jump, with guidance as an input (MeanFlow)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.sampling.guidance import Guidance

# (params, x [n, height, width, 3], t [n], condition, jump [n, 4]) → velocity [n, height, width, 3]
Jumper = Callable[[Any, Array, Array, Any, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedGuidance(Guidance):
    """Guidance that is included in the network's velocity: scale and interval are its inputs, a step costs one pass."""

    def guides(self, times: np.ndarray) -> np.ndarray:
        return np.zeros_like(super().guides(times))


def make_mean_velocity(
    denoiser: Jumper, guidance: Guidance, params: Any, condition: Any
) -> Callable[[Array, Array, bool, Array], Array]:
    """Bind a network to its parameters, condition and guidance, as `guidance.make_velocity` does.

    Returns:
        f(x [batch, height, width, 3], t scalar, guided, span) → the mean velocity over [t, t + span], float32; `guided`
        is ignored.
    """

    def velocity(x: Array, t: Array, guided: bool, span: Array) -> Array:
        low, high = guidance.interval
        jump = jnp.stack([jnp.asarray(value, jnp.float32) for value in (span, guidance.scale, low, high)])
        times = jnp.full((len(x),), t, jnp.float32)
        return denoiser(params, x, times, condition, jnp.tile(jump, (len(x), 1))).astype(jnp.float32)

    return velocity

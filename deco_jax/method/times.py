"""How training times are drawn."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
from jax import Array

from deco_jax.shapes import PerExample


class Times(Protocol):
    """A distribution of training times."""

    def __call__(self, key: Array, batch: int) -> PerExample:
        """Draw float32 [batch] times in (0, 1); 0 is noise."""
        ...


def shift_time(t: Array, shift: float) -> Array:
    """Return t / (t + (1 − t)·shift); shift > 1 moves times in [0, 1] towards the noise (Esser et al. 2024, §5.3.2)."""
    return t / (t + (1 - t) * shift)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """The logistic function of N(mean, std²), shifted (Esser et al. 2024, §3.1). JiT uses mean −0.8 and std 0.8."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __call__(self, key: Array, batch: int) -> PerExample:
        return shift_time(jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,))), self.shift)

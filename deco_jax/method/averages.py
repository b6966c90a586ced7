"""Exponential moving averages of the weights, by name.

`config.optimizer.averages` is a list such as "short=0.9996,k500=500kimg" beside the average called "ema".
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from deco_jax.errors import UserError

EMA = "ema"  # the name of the average that every run has
# The average reaches back over at most this share of the run so far (Karras et al. 2022, "EMA ramp-up").
RAMP_UP = 0.05


class Average(Protocol):
    """How much of an average a step keeps."""

    def decay(self, images: Array, batch: int) -> Array | float:
        """Return the factor of the average before a step of `batch` images, after which `images` were seen in all."""
        ...


@dataclasses.dataclass(frozen=True)
class Decay:
    """The same factor at every step."""

    factor: float

    def decay(self, images: Array, batch: int) -> float:
        return self.factor


@dataclasses.dataclass(frozen=True)
class HalfLife:
    """0.5^(batch / min(1000 · kimg, 0.05 · images)): halves what is older than so many thousand images.

    Source: EDM (Karras et al. 2022), training configuration.
    """

    kimg: float

    def decay(self, images: Array, batch: int) -> Array:
        return 0.5 ** (batch / jnp.minimum(1000.0 * self.kimg, RAMP_UP * images.astype(jnp.float32)))


def update_average(average: Any, params: Any, decay: Array | float) -> Any:
    """decay · average + (1 − decay) · params, leaf by leaf, in float32."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def parse_averages(ema_decay: float, more: str = "") -> dict[str, Average]:
    """Read the averages of a config: "ema" by `ema_decay`, and `more`, "NAME=DECAY" or "NAME=…kimg" by commas.

    Raises:
        UserError: an entry can't be read, or a name is given twice.
    """
    found: dict[str, Average] = {EMA: Decay(ema_decay)}
    for entry in filter(None, (part.strip() for part in more.split(","))):
        match = re.fullmatch(r"([a-z][a-z0-9_]*)=(\d*\.?\d+(?:e-?\d+)?)(kimg)?", entry)
        value = float(match[2]) if match else -1.0
        if match is None or (value <= 0 if match[3] else not 0 <= value <= 1):
            raise UserError(
                f"config.optimizer.averages: {entry!r} is not an average; write NAME=DECAY with a decay from 0 to 1, "
                "such as short=0.9996, or NAME=HALFLIFE, such as k500=500kimg"
            )
        if match[1] in found:
            raise UserError(
                f"config.optimizer.averages names {match[1]!r} twice"
                + ("; its decay is config.optimizer.ema_decay" if match[1] == EMA else "")
            )
        found[match[1]] = HalfLife(value) if match[3] else Decay(value)
    return found

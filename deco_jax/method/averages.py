"""Exponential moving averages of the weights, by name.

`config.optimizer.averages` is a list such as "short=0.9996,k500=500kimg", in addition to the average called "ema". A
new kind of average is a class with `decay` and with `read`, which parses its entries, and its name in `KINDS`.
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
RAMP_UP = 0.05  # a half-life is at most this share of the run so far, so that early weights fade


class Average(Protocol):
    """How much of an average a step keeps."""

    def decay(self, images: Array, batch: int) -> Array | float:
        """Return the factor for the old average at a step of `batch` images, after which `images` were seen in all."""
        ...


@dataclasses.dataclass(frozen=True)
class Decay:
    """The same factor at every step, from 0 to 1."""

    factor: float
    example = "short=0.9996"

    @classmethod
    def read(cls, value: str) -> Decay | None:
        """Read the value of an entry; None if it is not of this kind."""
        factor = number(value)
        return cls(factor) if factor is not None and 0 <= factor <= 1 else None

    def decay(self, images: Array, batch: int) -> float:
        return self.factor


@dataclasses.dataclass(frozen=True)
class HalfLife:
    """0.5^(batch / min(1000 · kimg, 0.05 · images)): halves the weight of what is `kimg` thousand images old.

    Source: EDM (Karras et al. 2022), training configuration.
    """

    kimg: float
    example = "k500=500kimg"

    @classmethod
    def read(cls, value: str) -> HalfLife | None:
        """Read the value of an entry; None if it is not of this kind."""
        kimg = number(value.removesuffix("kimg")) if value.endswith("kimg") else None
        return cls(kimg) if kimg else None

    def decay(self, images: Array, batch: int) -> Array:
        return 0.5 ** (batch / jnp.minimum(1000.0 * self.kimg, RAMP_UP * images))


KINDS = (Decay, HalfLife)


def number(text: str) -> float | None:
    """Parse the number in an entry; None if it isn't one."""
    return float(text) if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text) else None


def update_average(average: Any, params: Any, decay: Array | float) -> Any:
    """Return decay · average + (1 − decay) · params, leaf by leaf, in float32."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def parse_averages(ema_decay: float, more: str = "") -> dict[str, Average]:
    """Parse the averages of a config: "ema" with `ema_decay`, and `more`, comma-separated NAME=VALUE.

    Raises:
        UserError: an entry can't be read, or a name is given twice.
    """
    found: dict[str, Average] = {EMA: Decay(ema_decay)}
    for entry in filter(None, (part.strip() for part in more.split(","))):
        name, _, value = entry.partition("=")
        read = [kind.read(value) for kind in KINDS]
        average = next((each for each in read if each is not None), None)
        if average is None or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(
                f"config.optimizer.averages: {entry!r} is not an average; write a name of small letters and a value, "
                f"such as {' or '.join(kind.example for kind in KINDS)}"
            )
        if name in found:
            instead = "; set the decay of that one by config.optimizer.ema_decay" if name == EMA else ""
            raise UserError(f"config.optimizer.averages names {name!r} twice{instead}")
        found[name] = average
    return found

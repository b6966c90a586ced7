"""The terms of the objective, one file each.

A file has the loss as a pure function, a `Loss` that passes it what it needs from a step, and `from_config`, which
builds it from the settings or returns None if they turn it off. `LOSSES` is their order in the sum; a program that
appends to it trains with its own loss.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from deco_jax.method.losses import frequency, mean_flow, perceptual, pixel, pseudo_huber, reg, repa
from deco_jax.method.losses.loss import Loss

LOSSES: list[Callable[[ml_collections.ConfigDict], Loss | None]] = [
    pixel.from_config,
    mean_flow.mean_from_config,
    mean_flow.head_from_config,
    frequency.from_config,
    repa.from_config,
    reg.from_config,
    perceptual.lpips_from_config,
    perceptual.dino_from_config,
    pseudo_huber.from_config,
]

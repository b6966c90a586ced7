"""The pixel-space flow-matching loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from deco_jax.method.losses.loss import Loss
from deco_jax.method.step import Step
from deco_jax.shapes import Images, PerExample


@dataclasses.dataclass(frozen=True)
class PixelLoss(Loss):
    """Flow matching at every pixel."""

    name = "pixel"
    weight: float = 1.0

    def __call__(self, step: Step) -> PerExample:
        return step.error_weight * flow_matching_loss(step.error)


@jax.named_scope("loss")
def flow_matching_loss(error: Images) -> PerExample:
    """Return the mean square of v̂ − v over everything except the batch (Lipman et al. 2023, eq. 9).

    Args:
        error: predicted minus true velocity, [batch, height, width, 3].

    Returns:
        float32 [batch].
    """
    return jnp.mean(jnp.square(error.astype(jnp.float32)), axis=tuple(range(1, error.ndim)))


def from_config(config: ml_collections.ConfigDict) -> PixelLoss | None:
    """Build the loss that every run has; None if MeanFlow replaces it."""
    return None if config.loss.mean_flow else PixelLoss()

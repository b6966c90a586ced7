"""The pseudo-Huber loss: flow matching that a few large errors don't dominate (Song & Dhariwal 2023, section 3.3).

Near 0 it grows with the square of an image's error, far from 0 with the error itself. Lee et al. 2024 train rectified
flows with it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from deco_jax.method.losses.loss import Loss
from deco_jax.method.losses.pixel import flow_matching_loss
from deco_jax.method.step import Step
from deco_jax.schema import above, at_least, setting
from deco_jax.shapes import PerExample


@dataclasses.dataclass(frozen=True)
class PseudoHuberSettings:
    """The settings of the pseudo-Huber loss."""

    pseudo_huber_weight: float = setting(
        0.0, "Weight of the pseudo-Huber loss of the velocity's error; 0: off.", at_least(0, 1e6)
    )
    pseudo_huber_scale: float = setting(
        0.03, "Root mean square error below which it is quadratic; Song & Dhariwal use 0.00054.", above(0, 1000)
    )


@dataclasses.dataclass(frozen=True)
class PseudoHuberLoss(Loss):
    """Compares velocities by the pseudo-Huber loss."""

    weight: float = 1.0
    scale: float = 0.03
    name = "pseudo_huber"

    def __call__(self, step: Step) -> PerExample:
        return pseudo_huber(step.error_weight * flow_matching_loss(step.error), self.scale)


@jax.named_scope("loss")
def pseudo_huber(mean_square: PerExample, scale: float) -> PerExample:
    """Compute √(m + c²) − c of mean squares m [batch] of each image's error; its gradient at 0 is finite.

    Song & Dhariwal use the error's norm, √d times its root mean square over d values, and a c proportional to √d. Their
    loss is √d times this one, which doesn't depend on the size of the image.
    """
    # As m / (√(m + c²) + c), because the difference of nearly equal numbers would lose a small m.
    return mean_square / (jnp.sqrt(mean_square + scale**2) + scale)


def from_config(config: ml_collections.ConfigDict) -> PseudoHuberLoss | None:
    """Build the loss of config.loss.pseudo_huber_*; None if it is off."""
    loss = config.loss
    return PseudoHuberLoss(loss.pseudo_huber_weight, loss.pseudo_huber_scale) if loss.pseudo_huber_weight else None

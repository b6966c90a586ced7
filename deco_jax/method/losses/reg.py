"""REG: the teacher's class token is noised like the image and denoised as one more token (Wu et al. 2025).

Its path is the straight line c_t = t·c + (1 − t)·ε, whatever the image's path is, and the network predicts its velocity
c − ε, whatever it predicts for the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from deco_jax.method.losses.loss import Loss
from deco_jax.method.losses.repa import TEACHER
from deco_jax.method.step import Step
from deco_jax.models.network import FrozenNetwork
from deco_jax.models.teachers import make_teacher
from deco_jax.schema import at_least, setting
from deco_jax.shapes import PerExample


@dataclasses.dataclass(frozen=True)
class RegSettings:
    """The settings of REG."""

    class_token_weight: float = setting(
        0.0,
        "Weight of the squared error of the class token's velocity, with model.class_token; REG uses 0.03; 0: off.",
        at_least(0, 1e6),
    )


@jax.named_scope("loss")
def token_loss(velocity: Array, token: Array, noise: Array) -> PerExample:
    """Return the mean square of v̂ − (c − ε) over channels, float32 [batch]; all arguments [batch, channels]."""
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - (token - noise)), axis=-1)


@dataclasses.dataclass(frozen=True)
class ClassTokenLoss(Loss):
    """Flow matching of the teacher's view of the whole image.

    Args:
        channels: the number of channels of that view.
    """

    teacher: FrozenNetwork
    channels: int
    weight: float = 0.03
    name = "class_token"
    features = (TEACHER,)

    @property
    def token(self) -> tuple[str, int]:  # type: ignore[override]
        return TEACHER, self.channels

    @property
    def frozen(self) -> Mapping[str, FrozenNetwork]:  # type: ignore[override]
        return {TEACHER: self.teacher}

    def __call__(self, step: Step) -> PerExample:
        assert step.draws.token_noise is not None
        return token_loss(step.hidden["token_velocity"], step.features[TEACHER].image, step.draws.token_noise)


def from_config(config: ml_collections.ConfigDict) -> ClassTokenLoss | None:
    """Build the loss of config.loss.class_token_weight with config.teacher; None if it is off."""
    if not config.loss.class_token_weight:
        return None
    teacher = make_teacher(config)
    return ClassTokenLoss(teacher.network, teacher.width, config.loss.class_token_weight)

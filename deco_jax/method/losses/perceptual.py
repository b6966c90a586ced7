"""Perceptual losses: the predicted image looks like the true one (PixelGen, arXiv 2602.02493).

LPIPS compares VGG16's features, P-DINO those of REPA's teacher, of the predicted image x̂, whatever the network
predicts. LPIPS compares it with the x̂ of a perfect network. P-DINO compares it with the clean image, whose features
REPA needs too; on the energy-guided path with a v-prediction, where a perfect x̂ is blurred, the two differ. Only
examples from `perceptual_min_time` on count, because images predicted at early times are blurred.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import ml_collections

from deco_jax.method.losses.loss import Loss
from deco_jax.method.losses.repa import TEACHER, alignment_loss
from deco_jax.method.step import Step
from deco_jax.models import vgg
from deco_jax.models.network import FrozenNetwork
from deco_jax.models.teachers import make_teacher
from deco_jax.schema import MAX_INT32, at_least, between, setting
from deco_jax.shapes import PerExample


@dataclasses.dataclass(frozen=True)
class PerceptualSettings:
    """The settings of the perceptual losses."""

    lpips_weight: float = setting(
        0.0, "Weight of LPIPS between predicted and true image; PixelGen uses 0.1; 0: off.", at_least(0, 1e6)
    )
    dino_weight: float = setting(
        0.0,
        "Weight of 1 - cosine of the teacher's features of predicted and true image; PixelGen uses 0.01; 0: off.",
        at_least(0, 1e6),
    )
    perceptual_min_time: float = setting(
        0.3, "Time from which examples count in both losses; noise is 0, the image 1.", between(0, 1)
    )
    balance_start: int = setting(
        0,
        "Step from which both losses are weighted so that their gradient at the output layer is as large as flow "
        "matching's; PixelGen uses 400000; 0: never.",
        at_least(0, MAX_INT32),
    )
    balance_every: int = setting(50, "Steps between two changes of that weight.", at_least(1, MAX_INT32))


@dataclasses.dataclass(frozen=True)
class LPIPSLoss(Loss):
    """Compares VGG16's features of the predicted and the true image."""

    network: FrozenNetwork
    weight: float = 0.1
    min_time: float = 0.3
    name = "lpips"
    balanced = True

    @property
    def frozen(self) -> Mapping[str, FrozenNetwork]:  # type: ignore[override]
        return {self.name: self.network}

    def __call__(self, step: Step) -> PerExample:
        return step.frozen(self.name, step.image, step.true_image)


@dataclasses.dataclass(frozen=True)
class DINOLoss(Loss):
    """Compares the teacher's features of the predicted and the clean image."""

    teacher: FrozenNetwork
    weight: float = 0.01
    min_time: float = 0.3
    name = "dino"
    balanced = True
    features = (TEACHER,)

    @property
    def frozen(self) -> Mapping[str, FrozenNetwork]:  # type: ignore[override]
        return {TEACHER: self.teacher}

    def __call__(self, step: Step) -> PerExample:
        with jax.named_scope("teacher"):
            predicted = step.frozen(TEACHER, (step.image + 1) / 2).tokens
        return alignment_loss(predicted, step.features[TEACHER].tokens)


def lpips_from_config(config: ml_collections.ConfigDict) -> LPIPSLoss | None:
    """Build the loss of config.loss.lpips_weight with config.lpips; None if it is off."""
    loss = config.loss
    return LPIPSLoss(vgg.make_lpips(config), loss.lpips_weight, loss.perceptual_min_time) if loss.lpips_weight else None


def dino_from_config(config: ml_collections.ConfigDict) -> DINOLoss | None:
    """Build the loss of config.loss.dino_weight with config.teacher; None if it is off."""
    loss = config.loss
    return (
        DINOLoss(make_teacher(config).network, loss.dino_weight, loss.perceptual_min_time) if loss.dino_weight else None
    )

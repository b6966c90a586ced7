"""Representation alignment (REPA, Yu et al. 2025): hidden states pulled towards a frozen encoder's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from deco_jax.method.losses.loss import Loss
from deco_jax.method.step import Step
from deco_jax.models import dinov2
from deco_jax.models.network import FrozenNetwork, Network
from deco_jax.models.projector import make_projector
from deco_jax.schema import at_least, setting
from deco_jax.shapes import Features, PerExample

TEACHER = "teacher"

EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class RepaSettings:
    """The settings of REPA."""

    repa_weight: float = setting(
        0.5, "Weight of REPA, the alignment with DINOv2's features; 0: no teacher is read.", at_least(0, 1e6)
    )
    repa_layer: int = setting(8, "Transformer block whose output is aligned, from 1.", at_least(1, 1024))


@jax.named_scope("loss")
def alignment_loss(projected: Features, teacher: Features) -> PerExample:
    """One minus the cosine similarity of matching tokens, averaged over the tokens.

    Each norm has the floor 1e-8, so an all-zero token has similarity 0 and a finite gradient.

    Args:
        projected: the projector's output, [batch, tokens, features].
        teacher: the encoder's features, same shape.

    Returns:
        float32 [batch], in [0, 2].
    """
    if projected.shape != teacher.shape:
        raise ValueError(f"projected tokens {projected.shape} and teacher features {teacher.shape} differ in shape")
    projected, teacher = projected.astype(jnp.float32), teacher.astype(jnp.float32)
    dot = jnp.sum(projected * teacher, axis=-1)
    # The floor sits under the root: the root's gradient at zero would be infinite.
    squares = [jnp.maximum(jnp.sum(jnp.square(x), axis=-1), EPSILON**2) for x in (projected, teacher)]
    cosine = dot / (jnp.sqrt(squares[0]) * jnp.sqrt(squares[1]))
    return jnp.mean(1 - cosine, axis=-1)


@dataclasses.dataclass(frozen=True)
class AlignmentLoss(Loss):
    """Pulls the hidden states after `layer` blocks, projected, towards a teacher's features of the clean images.

    Args:
        teacher: uint8 [batch, height, width, 3] → [batch, tokens, features], a token for each of the denoiser's.
        projector: [batch, tokens, width] → [batch, tokens, features].
    """

    teacher: FrozenNetwork
    projector: Network
    layer: int | None
    weight: float = 0.5
    name = "alignment"
    features = (TEACHER,)

    @property
    def trained(self) -> Mapping[str, Network]:  # type: ignore[override]
        return {"projector": self.projector}

    @property
    def frozen(self) -> Mapping[str, FrozenNetwork]:  # type: ignore[override]
        return {TEACHER: self.teacher}

    def __call__(self, step: Step) -> PerExample:
        return alignment_loss(step.trained("projector", step.hidden["aligned"]), step.features[TEACHER])


def frozen_teacher(config: ml_collections.ConfigDict) -> FrozenNetwork:
    """Build the teacher of config.teacher, with tokens as the denoiser has them."""
    teacher = config.teacher
    return dinov2.teacher(teacher.size, teacher.path, teacher.dtype, config.model.patch_size)


def from_config(config: ml_collections.ConfigDict) -> AlignmentLoss | None:
    """Build the loss of config.loss.repa_* with config.teacher; None if it is off."""
    loss, teacher = config.loss, config.teacher
    if not loss.repa_weight:
        return None
    return AlignmentLoss(
        frozen_teacher(config),
        make_projector(config.model, dinov2.sizes(teacher.size)[0]),
        loss.repa_layer,
        loss.repa_weight,
    )

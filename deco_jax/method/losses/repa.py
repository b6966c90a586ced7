"""Representation alignment: pulls hidden states towards a frozen encoder's features.

Sources: REPA (Yu et al. 2025); iREPA, whose target and projector take a token's position into account; HASTE, which
stops the alignment during training; PixelREPA, which hides some of the tokens from a deeper projector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from deco_jax.method.losses.loss import Loss
from deco_jax.method.step import Step
from deco_jax.models.network import FrozenNetwork, Network
from deco_jax.models.projector import KINDS, make_projector
from deco_jax.models.teachers import features_width, make_teacher
from deco_jax.schema import MAX_INT32, Rule, at_least, one_of, setting
from deco_jax.shapes import Features, PerExample

TEACHER = "teacher"

EPSILON = 1e-8
MEAN_SHARE = 0.8  # the share of the tokens' mean that iREPA removes
SPREAD_EPSILON = 1e-6
MASK = 2**20  # keeps its random draws separate from those of dropout, which use the blocks' numbers


@dataclasses.dataclass(frozen=True)
class RepaSettings:
    """The settings of REPA."""

    repa_weight: float = setting(
        0.5, "Weight of REPA, the alignment with a teacher's features; 0: off.", at_least(0, 1e6)
    )
    repa_layer: int = setting(8, "Transformer block whose output is aligned, from 1.", at_least(1, 1024))
    repa_target: str = setting(
        "plain",
        "plain: the teacher's features; spatial: minus most of the image's mean, at unit deviation (iREPA).",
        one_of("plain", "spatial"),
    )
    repa_projector: str = setting(
        "mlp",
        "Network from the denoiser's tokens to the teacher's: mlp (REPA); conv, one 3×3 convolution (iREPA); or "
        "transformer, two blocks (PixelREPA).",
        one_of(*KINDS),
    )
    repa_mask: float = setting(
        0.0,
        "Share of the tokens that training hides from the projector; PixelREPA uses 0.2.",
        Rule(lambda share: 0 <= share < 1, "from 0 to below 1"),
    )
    repa_until_step: int = setting(
        0, "Step from which training drops the alignment and the teacher (HASTE); 0: never.", at_least(0, MAX_INT32)
    )
    repa_schedule: str = setting(
        "constant",
        "Weight of the alignment until then: constant, or falling to 0 as a line or a cosine.",
        one_of("constant", "linear", "cosine"),
    )


@jax.named_scope("loss")
def alignment_loss(projected: Features, teacher: Features) -> PerExample:
    """Return one minus the cosine similarity of matching tokens, averaged over the tokens.

    Each norm is at least 1e-8, so an all-zero token has similarity 0 and a finite gradient.

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
    # The floor is inside the root, because the root's gradient at zero would be infinite.
    squares = [jnp.maximum(jnp.sum(jnp.square(x), axis=-1), EPSILON**2) for x in (projected, teacher)]
    cosine = dot / (jnp.sqrt(squares[0]) * jnp.sqrt(squares[1]))
    return jnp.mean(1 - cosine, axis=-1)


def spatial_target(features: Features) -> Array:
    """Return iREPA's target: each image's features minus 0.8 of their mean over tokens, divided by their deviation.

    Args:
        features: [batch, tokens, width], at least two tokens.

    Returns:
        float32 [batch, tokens, width].
    """
    x = features.astype(jnp.float32)
    deviation = jnp.std(x, axis=1, ddof=1, keepdims=True)
    return (x - MEAN_SHARE * jnp.mean(x, axis=1, keepdims=True)) / (deviation + SPREAD_EPSILON)


def hidden_tokens(keys: Array, tokens: int, share: float) -> Array:
    """Draw the tokens that a projector doesn't see, bool [batch, tokens], equally many in each example.

    Args:
        keys: [batch].
        share: of the tokens, rounded to a whole number of tokens.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, MASK), (tokens,)))(keys)
    return jnp.argsort(jnp.argsort(draws, axis=1), axis=1) < round(share * tokens)


@dataclasses.dataclass(frozen=True)
class AlignmentLoss(Loss):
    """Pulls the projected hidden states after `layer` blocks towards a teacher's features of the clean images.

    Args:
        teacher: uint8 [batch, height, width, 3] → `View`, with a token for each of the denoiser's tokens.
        projector: a `models.projector.Projector`.
        patch_size: of the denoiser.
        spatial: whether the target is `spatial_target`.
        mask: share of the tokens that are hidden from the projector.
    """

    teacher: FrozenNetwork
    projector: Network
    layer: int | None
    weight: float = 0.5
    patch_size: int = 16
    spatial: bool = False
    mask: float = 0.0
    until_step: int = 0
    schedule: str = "constant"
    name = "alignment"
    features = (TEACHER,)

    @property
    def trained(self) -> Mapping[str, Network]:  # type: ignore[override]
        return {"projector": self.projector}

    @property
    def frozen(self) -> Mapping[str, FrozenNetwork]:  # type: ignore[override]
        return {TEACHER: self.teacher}

    def __call__(self, step: Step) -> PerExample:
        hidden, target = step.hidden["aligned"], step.features[TEACHER].tokens
        _, height, width, _ = step.pixels.shape
        grid, mask = (height // self.patch_size, width // self.patch_size), None
        if self.mask:
            assert step.draws.keys is not None
            mask = hidden_tokens(step.draws.keys, hidden.shape[1], self.mask)
        projected = step.trained("projector", hidden, grid, mask)
        return alignment_loss(projected, spatial_target(target) if self.spatial else target)


def from_config(config: ml_collections.ConfigDict) -> AlignmentLoss | None:
    """Build the loss of config.loss.repa_* with config.teacher; None if it is off."""
    loss = config.loss
    if not loss.repa_weight:
        return None
    return AlignmentLoss(
        make_teacher(config).network,
        projector_of(config),
        loss.repa_layer,
        loss.repa_weight,
        config.model.patch_size,
        loss.repa_target == "spatial",
        loss.repa_mask,
        loss.repa_until_step,
        loss.repa_schedule,
    )


def projector_of(config: ml_collections.ConfigDict) -> Network:
    """Build the projector of a config that has an alignment."""
    loss, teacher = config.loss, config.teacher
    width = features_width(teacher.name, teacher.size)
    return make_projector(config.model, width, loss.repa_projector, masked=loss.repa_mask > 0)

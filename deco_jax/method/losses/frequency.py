"""The frequency-aware loss (DeCo paper, "Frequency-aware FM loss"): errors weighted as JPEG quantises them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax.errors import UserError
from deco_jax.method.dct import RGB_TO_YCBCR, block_dct
from deco_jax.method.losses.loss import Loss
from deco_jax.method.step import Step
from deco_jax.schema import at_least, between, setting
from deco_jax.shapes import FrequencyWeights, Images, PerExample


@dataclasses.dataclass(frozen=True)
class FrequencySettings:
    """The settings of the frequency-aware loss."""

    frequency_weight: float = setting(1.0, "Weight of the frequency-aware loss; 0: off.", at_least(0, 1e6))
    frequency_quality: float = setting(
        85.0, "JPEG quality whose quantisation steps weight the frequencies.", between(1, 100)
    )


# ITU-T T.81, Annex K, tables K.1 and K.2: [vertical frequency, horizontal frequency].
LUMINANCE_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMINANCE_TABLE = np.array(
    [
        [17, 18, 24, 47, 99, 99, 99, 99],
        [18, 21, 26, 66, 99, 99, 99, 99],
        [24, 26, 56, 99, 99, 99, 99, 99],
        [47, 66, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
    ]
)


def jpeg_weights(quality: float) -> np.ndarray:
    """Return the weights of the squared DCT coefficients: the inverse of JPEG's quantisation steps at a quality.

    Args:
        quality: 1 (only the lowest frequencies count) to 100 (all weights equal); the paper's default is 85.

    Returns:
        float32 [3, 8, 8], [Y Cb Cr, vertical frequency, horizontal frequency], of mean 1 in each channel.

    Raises:
        UserError: the quality is outside [1, 100].
    """
    if not 1 <= quality <= 100:
        raise UserError(f"the JPEG quality of the frequency loss is {quality}; give one from 1 to 100 (the paper: 85)")
    scale = 200 - 2 * quality if quality >= 50 else 5000 / quality
    tables = np.stack([LUMINANCE_TABLE, CHROMINANCE_TABLE, CHROMINANCE_TABLE])
    steps = np.clip(np.floor((tables * scale + 50) / 100), 1, 255)
    weights = 1 / steps
    return (weights / weights.mean(axis=(1, 2), keepdims=True)).astype(np.float32)


@jax.named_scope("loss")
def frequency_loss(error: Images, weights: FrequencyWeights) -> PerExample:
    """Return the weighted mean square of the YCbCr block DCT of v̂ − v.

    The DCT is linear, so one transform of the difference is enough.

    Args:
        error: predicted minus true velocity, [batch, height, width, 3] RGB, any sides (`block_dct` pads them).
        weights: [3, 8, 8] from `jpeg_weights`.

    Returns:
        float32 [batch].
    """
    coefficients = block_dct(error, colour=RGB_TO_YCBCR)  # [batch, height / 8, width / 8, 8, 8, 3]
    weights = jnp.moveaxis(jnp.asarray(weights, jnp.float32), 0, -1)
    return jnp.mean(weights * jnp.square(coefficients), axis=(1, 2, 3, 4, 5))


@dataclasses.dataclass(frozen=True)
class FrequencyLoss(Loss):
    """The frequency-aware loss at a JPEG quality, 1 to 100."""

    name = "frequency"
    weight: float = 1.0
    quality: float = 85

    def __call__(self, step: Step) -> PerExample:
        return step.error_weight * frequency_loss(step.error, jnp.asarray(jpeg_weights(self.quality)))


def from_config(config: ml_collections.ConfigDict) -> FrequencyLoss | None:
    """Build the loss of config.loss.frequency_*; None if it is off."""
    if not config.loss.frequency_weight:
        return None
    return FrequencyLoss(config.loss.frequency_weight, config.loss.frequency_quality)

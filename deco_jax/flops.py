"""The model's own arithmetic: floating-point operations of a forward pass and of a training step.

A multiply-add counts as two. Only matrix products are counted, as the architecture defines them: what an
implementation computes twice (rematerialisation) or avoids (the folded pixel embedding) doesn't change the figure, so
shares of a chip's peak can be compared between codes. XLA's own cost analysis isn't suitable, because it counts the
body of a loop only once.

A forward pass takes 155 GFLOP per image for DeCo-L at 256², and 245 for DeCo-XL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from deco_jax.conditioning.encoders import abstract_encoder
from deco_jax.data.transforms import image_sides
from deco_jax.models import projector, vgg
from deco_jax.models.network import architecture
from deco_jax.models.teachers import features_width, make_teacher
from deco_jax.sampling.settings import Sampling


def forward(model: Mapping[str, Any], image_size: int | tuple[int, int]) -> dict[str, float]:
    """Count the FLOPs of one image's forward pass, by part.

    Args:
        model: config.model.
        image_size: one side, or (height, width), in pixels.
    """
    parts = architecture(model["name"]).flops(model, *image_sides(image_size))
    return {name: 2.0 * multiply_adds for name, multiply_adds in parts.items()}


def forward_total(model: Mapping[str, Any], image_size: int | tuple[int, int]) -> float:
    """Count the FLOPs of one image's forward pass."""
    return sum(forward(model, image_size).values())


def training(config: ml_collections.ConfigDict) -> float:
    """Count the FLOPs of training on one image: forward, twice that for gradients, and frozen networks' forward."""
    model, size = config.model, config.data.image_size
    total = 3 * forward_total(model, size)
    if config.loss.mean_flow:  # the network's own velocities with and without a condition, and a forward-mode product
        total += 4 * forward_total(model, size)
    if config.loss.repa_weight:
        height, width = image_sides(size)
        tokens, features = (
            height * width // model.patch_size**2,
            features_width(config.teacher.name, config.teacher.size),
        )
        total += 3 * projector.flops(config.loss.repa_projector, model.width, features, tokens)
    # The network of a perceptual loss sees the predicted image, and gradients pass through it.
    if config.loss.lpips_weight:
        total += 3 * vgg.make_lpips(config).flops(image_sides(size))  # and the true image
    if config.loss.dino_weight:
        total += 2 * make_teacher(config).network.flops(*image_sides(size))
    return total + frozen(config)


def frozen(config: ml_collections.ConfigDict) -> float:
    """Count the FLOPs per training image of networks that aren't trained: teacher, text encoder; 0 if none."""
    total, model = 0.0, config.model
    if config.loss.repa_weight or config.loss.dino_weight or config.loss.class_token_weight:
        total += make_teacher(config).network.flops(*image_sides(config.data.image_size))
    if model.text_width and not config.text.features:
        total += abstract_encoder(config).network.flops(model.text_length)
    return total


def sampling(config: ml_collections.ConfigDict) -> float:
    """Count the FLOPs of sampling one image with config.sample; a guided evaluation runs the network twice."""
    return Sampling.of(config).num_evaluations() * forward_total(config.model, config.data.image_size)

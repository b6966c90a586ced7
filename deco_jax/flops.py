"""The model's own arithmetic: floating-point operations of a forward pass and of a training step.

A multiply-add counts as two. Only matrix products are counted, as the architecture defines them: what an
implementation computes twice (rematerialisation) or manages to avoid (the folded pixel embedding) doesn't change
the figure, so that shares of a chip's peak can be compared between codes. XLA's own cost analysis can't serve: it
counts the body of a loop once.

A forward pass of DeCo-L takes 155 GFLOP an image at 256², of DeCo-XL 245.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from deco_jax.conditioning.encoders import encoder_sizes
from deco_jax.data.transforms import image_sides
from deco_jax.models import dinov2, vgg
from deco_jax.models.decoder import POSITION_FEATURES
from deco_jax.models.qwen3 import Sizes
from deco_jax.sampling.settings import Sampling


def forward(model: Mapping[str, Any], image_size: int | tuple[int, int]) -> dict[str, float]:
    """FLOPs of one image's forward pass, by part.

    Args:
        model: config.model.
        image_size: a side, or (height, width), in pixels.
    """
    height, width_px = image_sides(image_size)
    patch, width, depth = model["patch_size"], model["width"], model["depth"]
    tokens, pixels = height * width_px // patch**2, height * width_px
    text = model["text_length"] if model["text_width"] else 0
    hidden = 4 * width if text else int(2 * 4 * width / 3)

    parts = {
        "embeddings": tokens * 3 * patch**2 * width + 256 * width + width**2,  # patches, time
        "modulation": depth * 6 * width**2,
        "projections": depth * tokens * 4 * width**2,
        "attention": depth * 2 * tokens * (tokens + text) * width,
        "mlp": depth * tokens * 3 * width * hidden,
    }
    if text:
        block = text * (4 * width**2 + 2 * text * width + 3 * width * hidden) + 6 * width**2
        parts["embeddings"] += text * model["text_width"] * width
        parts["projections"] += depth * text * 2 * width**2
        parts["text_blocks"] = model["text_depth"] * block
    if model["name"] == "dit":
        parts["head"] = 2 * width**2 + tokens * width * 3 * patch**2
    if model["name"] == "deco":
        inner, query = model["decoder_width"], model["decoder_patch_size"]
        queries, values = pixels // query**2, 3 * query**2
        modulation = 3 * inner**2 if model["decoder_interaction"] == "adaln" else 0
        parts["condition"] = tokens * width * (patch // query) ** 2 * inner
        parts["pixel_embed"] = queries * ((values + POSITION_FEATURES) * inner + inner**2)
        parts["pixel_blocks"] = queries * model["decoder_depth"] * (modulation + 2 * inner**2)
        parts["pixel_output"] = queries * inner * values
    if model["name"] == "pixnerd":
        inner, generated = model["decoder_width"], 2 * model["decoder_ratio"] * model["decoder_width"] ** 2
        parts["condition"] = model["decoder_depth"] * tokens * width * generated
        parts["pixel_embed"] = pixels * (3 + POSITION_FEATURES) * inner
        parts["pixel_blocks"] = model["decoder_depth"] * pixels * generated
        parts["pixel_output"] = pixels * inner * 3
    return {name: 2.0 * multiply_adds for name, multiply_adds in parts.items()}


def forward_total(model: Mapping[str, Any], image_size: int | tuple[int, int]) -> float:
    """FLOPs of one image's forward pass."""
    return sum(forward(model, image_size).values())


def text_encoder(sizes: Sizes, length: int) -> float:
    """FLOPs of Qwen3's forward pass on one caption of `length` tokens; masked products count."""
    inner, kv_inner = sizes.num_heads * sizes.head_width, sizes.num_kv_heads * sizes.head_width
    projections = sizes.width * (2 * inner + 2 * kv_inner + 3 * sizes.mlp_hidden)
    return 2.0 * sizes.depth * length * (projections + 2 * length * inner)


def projector(width: int, teacher_size: str, tokens: int) -> float:
    """FLOPs of REPA's projector on one image."""
    teacher_width, _, _ = dinov2.sizes(teacher_size)
    return 2.0 * tokens * (2 * width**2 + width * teacher_width)


def training(config: ml_collections.ConfigDict) -> float:
    """FLOPs of training on one image: forward and twice that for the gradients, and the frozen networks' forward."""
    model, size = config.model, config.data.image_size
    total = 3 * forward_total(model, size)
    if config.loss.repa_weight:
        height, width = image_sides(size)
        total += 3 * projector(model.width, config.teacher.size, height * width // model.patch_size**2)
    # A perceptual loss's network sees the predicted image, and gradients pass through it.
    if config.loss.lpips_weight:
        total += 3 * vgg.flops(image_sides(size), model.patch_size)  # and the true image
    if config.loss.dino_weight:
        total += 2 * dinov2.flops(config.teacher.size, model.patch_size, *image_sides(size))
    return total + frozen(config)


def frozen(config: ml_collections.ConfigDict) -> float:
    """FLOPs on one training image of the networks that aren't trained: REPA's teacher, the text encoder; 0 without."""
    total, model = 0.0, config.model
    if config.loss.repa_weight or config.loss.dino_weight:
        total += dinov2.flops(config.teacher.size, model.patch_size, *image_sides(config.data.image_size))
    if model.text_width and config.text.encoder == "qwen3" and not config.text.features:
        total += text_encoder(encoder_sizes(config), model.text_length)
    return total


def sampling(config: ml_collections.ConfigDict) -> float:
    """FLOPs of sampling one image by config.sample; a guided evaluation runs the network twice."""
    return Sampling.of(config).num_evaluations() * forward_total(config.model, config.data.image_size)

"""ImageNet 256², class to image: PixelGen (arXiv 2602.02493), JiT's transformer with REPA and perceptual losses.

    python -m deco_jax.main --config=configs/pixelgen256.py --workdir=runs/pixelgen \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth \\
        --config.lpips.vgg=/data/vgg16-397923af.pth --config.lpips.linear=/data/vgg.pth
    python -m deco_jax.main --config=configs/pixelgen256.py:smoke --workdir=/tmp/smoke ...

    variant    blocks, width    parameters     expected FID
    XL         28, 1152         676,699,200    5.11 at 80 epochs without guidance, 1.83 at 160 with 2.25
    L          24, 1024         459,434,720    7.53 at 40 epochs without guidance

Heun in 50 steps, times shifted by 2, guidance in (0.1, 0.9]. As published, the perceptual losses are balanced by their
gradients from step 400,000 on (`loss.balance_start`), and not before. With this code: not measured yet. Hardware and
time: 5 % more than imagenet256.py, as published.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256, jit256
from deco_jax.config import set_model


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Return a variant: XL (default), L, smoke (it needs the two files of LPIPS)."""
    if variant not in ("XL", "L", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose XL, L or smoke")
    config = imagenet256.get_config(variant)
    set_model(config, "jit", context_tokens=32, context_start=8)
    jit256.jit_recipe(config)
    config.loss.lpips_weight, config.loss.dino_weight, config.loss.repa_weight = 0.1, 0.01, 0.5
    config.sample.num_steps, config.sample.shift = 50, 2.0
    config.sample.guidance, config.sample.guidance_interval = 2.25, (0.1, 0.9)
    if variant == "XL":
        config.model.dropout = 0.1
        config.loss.balance_start = 400_000
        config.train.num_steps = 800_000
    elif variant == "L":
        config.model.depth = 24
        config.sample.guidance = 1.0
    else:
        config.model.context_tokens, config.model.context_start = 2, 1
        config.loss.dino_weight = config.loss.repa_weight = 0.0
        config.loss.balance_start, config.loss.balance_every = 2, 2
        config.lpips.dtype, config.lpips.pixels_per_patch = "float32", 0
        config.sample.num_steps = 4
    return config

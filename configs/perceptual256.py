"""ImageNet 256² with perceptual losses in addition to DeCo's own, as in PixelGen (arXiv 2602.02493).

    python -m deco_jax.main --config=configs/perceptual256.py --workdir=runs/perceptual \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth \\
        --config.lpips.vgg=/data/vgg16-397923af.pth --config.lpips.linear=/data/vgg.pth
    python -m deco_jax.main --config=configs/perceptual256.py:smoke --workdir=/tmp/smoke ...

LPIPS on VGG16 (weight 0.1) and the teacher's features (weight 0.01) compare the predicted image with the true one, at
times from 0.3 on. VGG16 comes from torchvision's file, and LPIPS's linear layers from `vgg.pth` of the lpips package,
version 0.1.

    variant    model and prediction                               expected FID
    deco       DeCo-L, velocity; 200k steps                       not known; 31.35 without the perceptual losses
    jit        the transformer alone, clean images; 200k steps    7.53 (PixelGen-L, 40 epochs, no guidance)

With this code: not measured yet. Hardware and time: 5 % more than imagenet256.py:L, as published.
"""

from __future__ import annotations

import ml_collections

from configs import ablation, imagenet256


def get_config(variant: str = "deco") -> ml_collections.ConfigDict:
    """Return a variant: deco (default), jit, smoke (deco, tiny; it needs the two files of LPIPS)."""
    if variant == "jit":
        config = ablation.get_config("jit")
    elif variant in ("deco", "smoke"):
        config = imagenet256.get_config("L" if variant == "deco" else "smoke")
    else:
        raise ValueError(f"there is no variant {variant!r}; choose deco, jit or smoke")
    config.loss.lpips_weight = 0.1
    if variant == "smoke":
        config.lpips.dtype, config.lpips.pixels_per_patch = "float32", 0
    else:
        config.loss.dino_weight = 0.01
    return config

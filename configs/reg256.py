"""ImageNet 256², class to image: DeCo with REG, which also denoises the teacher's class token, as one more token.

    python -m deco_jax.main --config=configs/reg256.py --workdir=runs/reg \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/reg256.py:smoke --workdir=/tmp/smoke \\
        --config.teacher.path=/data/vgg16-397923af.pth

The token is noised along a straight line at the image's time; it enters before the first block and leaves after the
last. Its velocity's squared error has weight 0.03, in addition to REPA. Sampling draws both and shows the image;
guidance acts on both. REG also aligns the token; here REPA only aligns the image's tokens.

    variant    model                            expected FID
    XL         DeCo-XL, imagenet256.py's        not known; 1.90 without REG, which brought SiT-XL/2 (latent) to 1.36
    L          DeCo-L, 200k steps               not known; 31.35 without REG
    jit        JiT-L/16 with REPA, jit256.py's  not known

With this code: not measured yet. Hardware and time: as the same configs without REG, plus one token to 256.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256, irepa256, jit256
from deco_jax.models.teachers import features_width


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Return a variant: XL (default), L, jit, smoke (XL, tiny; its teacher is VGG16)."""
    if variant not in ("XL", "L", "jit", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose XL, L, jit or smoke")
    config = jit256.get_config("L") if variant == "jit" else imagenet256.get_config(variant)
    config.loss.repa_weight, config.loss.class_token_weight = 0.5, 0.03
    if variant == "smoke":
        irepa256.smoke_teacher(config)
    config.model.class_token = features_width(config.teacher.name, config.teacher.size)
    return config

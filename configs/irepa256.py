"""ImageNet 256², class to image: ways to align with a teacher other than REPA.

    python -m deco_jax.main --config=configs/irepa256.py:deco --workdir=runs/irepa \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/irepa256.py:deco --workdir=runs/irepa ... \\
        --config.teacher.name=dinov3 --config.teacher.path=/data/dinov3-vitb16/model.safetensors
    python -m deco_jax.main --config=configs/irepa256.py:smoke --workdir=/tmp/smoke \\
        --config.teacher.path=/data/vgg16-397923af.pth

    variant     what it is                                                                 expected FID
    deco        DeCo-L, 200k steps; iREPA: the teacher's features less 0.8 of their mean,  not known; 31.35 with REPA
                at unit deviation, and one 3×3 convolution as the projector
    jit         JiT-L/16 (jit256.py) with iREPA, weight 0.5                                not known
    haste       DeCo-XL; REPA for the first 250,000 steps only                             not known; 1.90 with REPA
    pixelrepa   JiT-L/16 with PixelREPA: weight 0.1, a fifth of the tokens hidden from a   not known
                projector of two transformer blocks

HASTE also matches attention maps, which isn't implemented here. How PixelREPA hides a token is our interpretation: one
learned vector replaces it, and every token counts. Each variant also exists as NAME-smoke (seconds; its teacher is
VGG16); smoke is deco-smoke.

With this code: not measured yet. Hardware and time: as imagenet256.py and jit256.py; from step 250,000 on, haste
doesn't compute the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import imagenet256, jit256


def _irepa(config: ml_collections.ConfigDict) -> None:
    config.loss.repa_target, config.loss.repa_projector = "spatial", "conv"


def _haste(config: ml_collections.ConfigDict) -> None:
    config.loss.repa_until_step = 250_000


def _pixelrepa(config: ml_collections.ConfigDict) -> None:
    config.loss.repa_weight, config.loss.repa_mask, config.loss.repa_projector = 0.1, 0.2, "transformer"


# variant → (config, its variant, what differs)
VARIANTS: dict[str, tuple[Callable[[str], ml_collections.ConfigDict], str, Callable[..., None]]] = {
    "deco": (imagenet256.get_config, "L", _irepa),
    "jit": (jit256.get_config, "L", _irepa),
    "haste": (imagenet256.get_config, "XL", _haste),
    "pixelrepa": (jit256.get_config, "L", _pixelrepa),
}


def get_config(variant: str = "deco") -> ml_collections.ConfigDict:
    """Return a variant: deco (default), jit, haste, pixelrepa, each also with -smoke; smoke is deco-smoke."""
    name = "deco" if variant == "smoke" else variant.removesuffix("-smoke")
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; choose {', '.join(VARIANTS)} (or one with -smoke)")
    make, size, change = VARIANTS[name]
    smoke = variant.endswith("smoke")
    config = make("smoke" if smoke else size)
    config.loss.repa_weight = 0.5
    change(config)
    if smoke:
        smoke_teacher(config)
        config.loss.repa_until_step = min(config.loss.repa_until_step, 2)
    return config


def smoke_teacher(config: ml_collections.ConfigDict) -> None:
    """Make VGG16's second tap the teacher of a smoke run: it is small, and its file is easy to get."""
    config.loss.repa_layer = 2
    config.teacher.name, config.teacher.size, config.teacher.dtype = "vgg", "2", "float32"

"""CIFAR-10 at 32² for one GPU: DeCo with a 57-million-parameter transformer on 4×4 patches.

    python -m deco_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.path=/data/cifar10/train

Data: class folders of PNGs (`image_folder`, here); or TFDS, which downloads and prepares it:
--config.data.source=tfds --config.data.path=cifar10.

Hardware: meant for one GPU; its memory is not measured yet. Time: not measured yet. FID: not measured yet.
No teacher: DINOv2's patches are too coarse for images of 32².
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256


def get_config(variant: str = "B") -> ml_collections.ConfigDict:
    """Variants: B (default), smoke."""
    if variant not in ("B", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose B or smoke")
    config = imagenet256.get_config()
    config.model.width, config.model.depth, config.model.num_heads = 512, 12, 8
    config.model.patch_size = 4
    config.model.num_classes = 10
    config.model.remat = "none"
    config.data.image_size = 32
    config.data.num_workers = 8
    config.data.flip = True
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.clip_norm = 1.0
    config.loss.repa_weight = 0.0
    config.loss.label_dropout = 0.1
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 100
    config.sample.num_steps = 50
    config.sample.guidance = 1.5
    config.train.num_steps = 200_000
    if variant == "smoke":
        imagenet256.smoke(config)
        config.model.patch_size = 4
    return config

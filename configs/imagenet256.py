"""ImageNet 256², class to image: the paper's DeCo-XL/16, and DeCo-L/16 of its Table 1.

    python -m deco_jax.main --config=configs/imagenet256.py --workdir=runs/xl \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/imagenet256.py:L --workdir=runs/l ...      # 426,938,019 parameters
    python -m deco_jax.main --config=configs/imagenet256.py --workdir=runs/xl --mode=evaluate \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet256_labeled.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/imagenet256.py:smoke --workdir=/tmp/smoke  # seconds, two cores

Data: ImageNet's class folders (`image_folder`), or an ArrayRecord directory that TFDS prepared (`tfds`).
Another number of GPUs needs no change of settings: the batch size is global.

Hardware and time: the paper trains on 8 A800; L takes 0.24 s per step at batch 256, so 200k steps take 13 hours.
XL: 787 GFLOP per image and step; 1.6 M steps are 320 epochs. This code's time and memory there: not measured yet.

Expected FID (the paper's; with this code: not measured yet)
    L, 200k steps, 50 Euler steps, guidance 1                        31.35
    XL, 320 epochs (1.6 M steps), 100 Euler steps, guidance 3.2      1.90
    XL, 800 epochs (4 M steps), 250 Euler steps, guidance 3.0        1.62
"""

from __future__ import annotations

import ml_collections

from deco_jax.config import default_config


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Return a variant: XL (default), L, smoke. XL has every setting at its default."""
    config = default_config()
    if variant == "L":
        config.model.width, config.model.depth = 1024, 22
        config.loss.label_dropout = 0.1  # only DeCo-XL has 0.2
        config.train.num_steps = 200_000
        config.sample.guidance, config.sample.num_steps = 1.0, 50
    elif variant == "smoke":
        smoke(config)
    elif variant != "XL":
        raise ValueError(f"there is no variant {variant!r}; choose XL, L or smoke")
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """Make it tiny, in place: digits at 32², seconds on two cores, no files needed."""
    config.model.width, config.model.depth, config.model.num_heads = 32, 3, 4
    config.model.patch_size = 8
    config.model.num_classes = 10
    if "decoder_width" in config.model:
        config.model.decoder_width, config.model.decoder_depth = 8, 2
    config.model.dtype = "float32"
    config.data.source, config.data.path = "digits", ""
    config.data.image_size = (32, 32)
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.loss.repa_weight = 0.0
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 10
    config.sample.num_steps = 4
    config.train.num_steps = 4
    config.train.log_every = 1
    config.train.save_every = config.train.sample_every = 2
    config.evaluate.batch_size, config.evaluate.during_training_images = 2, 10
    config.spectrum.num_images = config.spectrum.batch_size = 4
    config.benchmark.warmup, config.benchmark.repeats = 1, 3

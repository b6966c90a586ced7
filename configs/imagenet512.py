"""ImageNet 512², class to image: DeCo-XL/16 continued from 256² for 100k steps, as in the paper.

    python -m deco_jax.main --config=configs/imagenet512.py --workdir=runs/xl512 --config.init_from=runs/xl \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/imagenet512.py --workdir=runs/xl512 --mode=evaluate \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet512.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/imagenet512.py:smoke --workdir=/tmp/smoke512

init_from is the folder of a run of `imagenet256.py`, or one of its checkpoints (in the paper, at 320 epochs). Weights
and EMA are taken over; the optimizer starts from scratch.

Hardware and time: 1,080 GFLOP per image in a forward pass, 4.4 times as much as at 256². Memory on TPU slices: see
docs/scaling.md; time, and memory on GPUs: not measured yet.
Expected FID with 100 Euler steps, guidance 5.0: 2.22 (the paper's; with this code: not measured yet).
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Return a variant: XL (default), L, smoke."""
    config = imagenet256.get_config(variant)
    config.data.image_size = (512, 512)
    config.sample.guidance = 5.0
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 16
    config.train.num_steps = 100_000
    if variant == "smoke":
        smoke_steps = imagenet256.get_config("smoke").train.num_steps
        config.data.image_size = (64, 64)
        config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 10
        config.train.num_steps = smoke_steps
    return config

"""Text to image at 512²: the second of the paper's three stages, starting from a run of `t2i_256.py`.

    python -m deco_jax.main --config=configs/t2i_512.py --workdir=runs/t2i512 --config.init_from=runs/t2i \\
        --config.data.path=/data/tars --config.text.path=/data/Qwen3-1.7B \\
        --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/t2i_512.py:smoke --workdir=/tmp/smoke512

Data, text and sampling are as in `t2i_256.py`. Images smaller than 512² are left out and counted, so a folder of
features only fits one image size: use another one for --mode=encode here. Weights, averages and the optimizer's moments
are taken over, as in the paper's stages.

Hardware and time: 80k steps in the paper, 100k in its code (here: 80k) at batch 512; this code's time and
memory: not measured yet.
Expected: the paper only gives figures for the last stage, see t2i_finetune.py.
"""

from __future__ import annotations

import ml_collections

from configs import t2i_256


def get_config(variant: str = "XXL") -> ml_collections.ConfigDict:
    """Return a variant: XXL (default), smoke."""
    config = t2i_256.get_config(variant)
    smoke_steps = config.train.num_steps
    config.init_optimizer = True
    config.data.image_size = (512, 512)
    config.data.batch_size = 512
    config.optimizer.learning_rate = 1e-4
    config.loss.time_shift = 4.0
    config.train.num_steps = 80_000
    if variant == "smoke":
        config.data.image_size = (64, 64)
        config.data.batch_size = 8
        config.train.num_steps = smoke_steps
    return config

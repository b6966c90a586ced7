"""Text to image at 512², fine-tuned on a small set of good images: the last of the paper's three stages.

    python -m deco_jax.main --config=configs/t2i_finetune.py --workdir=runs/t2i_final --config.init_from=runs/t2i512 \\
        --config.data.path=/data/good --config.text.path=/data/Qwen3-1.7B \\
        --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/t2i_finetune.py --workdir=runs/t2i_final --mode=sample \\
        --config.text.path=/data/Qwen3-1.7B --config.sample.prompts=evaluation_metadata.jsonl
    python -m deco_jax.main --config=configs/t2i_finetune.py:smoke --workdir=/tmp/smoke_finetune

Data: about 60k images with captions in the paper. Weights, averages and the optimizer's moments come from a run of
`t2i_512.py`.

Hardware and time: 40k steps at batch 512; this code's time and memory: not measured yet.
Expected after this stage (the paper's): GenEval 0.86, DPG-Bench 81.4. With this code: not measured yet.
"""

from __future__ import annotations

import ml_collections

from configs import t2i_512


def get_config(variant: str = "XXL") -> ml_collections.ConfigDict:
    """Return a variant: XXL (default), smoke."""
    config = t2i_512.get_config(variant)
    if variant != "smoke":  # smoke equals t2i_512's in every constant, so it compiles only once
        config.optimizer.learning_rate = 1e-5
        config.optimizer.b2 = 0.999
        config.train.num_steps = 40_000
    return config

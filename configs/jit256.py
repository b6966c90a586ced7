"""ImageNet 256², class to image: JiT/16 as its authors train it (Li & He 2025): a plain transformer, clean images.

    python -m deco_jax.main --config=configs/jit256.py:L --workdir=runs/jit --config.data.path=/data/imagenet/train
    python -m deco_jax.main --config=configs/jit256.py:L --workdir=runs/jit --mode=evaluate \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet256_labeled.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/jit256.py:smoke --workdir=/tmp/smoke

32 class tokens join the image's tokens between two blocks; a patch is first reduced to 128 channels (H: 256). AdamW
(0.9, 0.95) at 5e-5 per 256 images of the batch, here 1,024; 5 epochs of warm-up, mirrored images, label dropout 0.1,
averages with 0.9999 ("ema") and 0.9996 ("short"), 600 epochs; Heun in 50 steps, guidance in (0.1, 1].

    variant    blocks, width, heads    guidance    expected FID at 600 epochs
    B          12, 768, 12             2.9         not known
    L          24, 1024, 16            2.4         not known
    H          32, 1280, 16            2.2         1.86

The scores are the authors'; with this code: not measured yet. Hardware and time: not measured yet.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256
from deco_jax.config import set_model

# variant → depth, width, heads, the block before which the class tokens join, bottleneck, dropout, guidance
SIZES = {
    "B": (12, 768, 12, 4, 128, 0.0, 2.9),
    "L": (24, 1024, 16, 8, 128, 0.0, 2.4),
    "H": (32, 1280, 16, 10, 256, 0.2, 2.2),
}
STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config(variant: str = "L") -> ml_collections.ConfigDict:
    """Return a variant: B, L (default), H, smoke."""
    config = imagenet256.get_config("smoke" if variant == "smoke" else "XL")
    set_model(config, "jit")
    jit_recipe(config)
    config.data.flip = True
    config.optimizer.averages = "short=0.9996"
    # As in JiT's code, where PixelGen goes by the start of the step.
    config.sample.guidance_interval, config.sample.guidance_times = (0.1, 1.0), "evaluation"
    if variant == "smoke":
        config.model.context_tokens, config.model.context_start, config.model.bottleneck = 2, 1, 16
        config.model.depth, config.model.dropout = 4, 0.1  # it is in the middle half of the blocks
        return config
    if variant not in SIZES:
        raise ValueError(f"there is no variant {variant!r}; choose B, L, H or smoke")
    model = config.model
    model.depth, model.width, model.num_heads, model.context_start, model.bottleneck, model.dropout, guidance = SIZES[
        variant
    ]
    model.context_tokens = 32
    config.data.batch_size = 1024
    config.optimizer.learning_rate = 5e-5 * 1024 / 256
    config.optimizer.warmup_steps = 5 * STEPS_PER_EPOCH
    config.sample.num_steps, config.sample.guidance = 50, guidance
    config.train.num_steps = 600 * STEPS_PER_EPOCH
    return config


def jit_recipe(config: ml_collections.ConfigDict) -> None:
    """Set what JiT and PixelGen share: clean images, their times, no frequency loss, no teacher."""
    config.model.prediction = "x"
    config.loss.frequency_weight = config.loss.repa_weight = 0.0
    config.loss.time_mean, config.loss.time_std = -0.8, 0.8
    config.loss.label_dropout = 0.1
    config.optimizer.b2 = 0.95
    config.sample.sampler = "heun"

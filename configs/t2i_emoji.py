"""Emoji from their names: small text-to-image models, at 64² for one GPU, at 32² for a CPU and some patience.

    python -m deco_jax.main --config=configs/t2i_emoji.py --workdir=runs/emoji --config.data.path=/data/emoji
    python -m deco_jax.main --config=configs/t2i_emoji.py --workdir=runs/emoji --mode=sample \\
        --config.sample.prompts="grinning cat with smiling eyes" --config.sample.images_per_prompt=16
    python -m deco_jax.main --config=configs/t2i_emoji.py:cpu --workdir=runs/emoji_cpu --config.data.path=/data/emoji
    python -m deco_jax.main --config=configs/t2i_emoji.py:smoke --workdir=/tmp/smoke

Data: a folder of images, each with its caption in a .txt beside it (`captioned_folder`); meant for a few thousand emoji
with names such as "grinning face". There is no text encoder: the model gets the letters of a name and learns to read
them as it learns to draw. To use Qwen3 instead: --config.text.encoder=qwen3 --config.text.path=/data/Qwen3-1.7B
--config.model.text_width=2048.

Hardware and time: `:cpu` took 44 minutes for 6k steps of 32 images on two otherwise idle cores of an AMD EPYC with
AVX-512, at 76 images/s, and 66 minutes on another machine. With LPIPS (--config.loss.lpips_weight=0.1, and the weights
as in the README) it has 53 images/s on the former. The default, 60k steps of 64 on one GPU: not measured yet.

docs/emoji.png shows what `:cpu` with LPIPS draws. Some people match the name, flags and skin tones don't reliably;
rarer things only get a shape and a colour, because so few pictures teach no words beyond their own. FID of 1,000
samples for `:cpu`: 102, with LPIPS 88 (docs/results.md).
"""

from __future__ import annotations

import ml_collections

from configs import t2i_256
from deco_jax.config import default_config


def get_config(variant: str = "S") -> ml_collections.ConfigDict:
    """Return a variant: S (default), cpu, smoke."""
    if variant not in ("S", "cpu", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose S, cpu or smoke")
    config = default_config()
    config.model.width, config.model.depth, config.model.num_heads = 256, 8, 4
    config.model.patch_size = 8
    config.model.num_classes = 0
    config.model.text_width, config.model.text_length, config.model.text_depth = 257, 64, 2
    config.model.decoder_width, config.model.decoder_depth = 32, 3
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.text.encoder = "bytes"
    config.data.source = "captioned_folder"
    config.data.image_size = (64, 64)
    config.data.batch_size = 64
    config.data.num_workers = 2
    config.optimizer.learning_rate = 4e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_steps = 500
    config.optimizer.ema_decay = 0.999
    config.loss.repa_weight = 0.0  # no teacher
    config.loss.label_dropout = 0.1
    t2i_256.sampler(config)
    config.train.num_steps = 60_000
    config.train.save_every = config.train.sample_every = 2000
    if variant == "cpu":
        config.model.width, config.model.depth, config.model.num_heads = 192, 6, 6
        config.model.patch_size, config.model.unroll = 4, 6
        config.model.text_length, config.model.text_depth = 48, 1
        config.model.decoder_width, config.model.decoder_depth, config.model.decoder_chunk = 16, 2, 4096
        config.data.image_size, config.data.batch_size = (32, 32), 32
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 100
        config.optimizer.ema_decay = 0.998
        # As in configs/quickstart.py: a small decoder that is trained briefly leaves less noise with the SDE.
        config.sample.sampler, config.sample.num_steps, config.sample.shift = "sde", 40, 0.5
        config.train.num_steps = 6000
        config.train.log_every, config.train.save_every, config.train.sample_every = 50, 500, 1000
        config.lpips.pixels_per_patch = 0  # as in configs/cifar10.py: at 128² it would take most of a step
    if variant == "smoke":
        t2i_256.smoke(config)
    return config

"""Text to image at 256²: DeCo-XXL/16 with Qwen3-1.7B's features, the first of the paper's three stages.

    python -m deco_jax.main --config=configs/t2i_256.py --workdir=runs/t2i --config.data.path=/data/tars \\
        --config.text.path=/data/Qwen3-1.7B --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/t2i_256.py --workdir=runs/t2i --mode=sample \\
        --config.text.path=/data/Qwen3-1.7B --config.sample.prompts="a red fox in the snow"
    python -m deco_jax.main --config=configs/t2i_256.py:smoke --workdir=/tmp/smoke      # seconds, two cores

1,133,759,395 parameters. Data: WebDataset tars (`webdataset`), or a folder of images with a .txt beside each
(`captioned_folder`). Text: the folder of huggingface.co/Qwen/Qwen3-1.7B (config.json, tokenizer.json, *.safetensors)
and pip install tokenizers. Captions are encoded in each step. To encode them only once, run the same command with
--mode=encode and --config.text.features=FOLDER, and train with that setting (512 KiB per caption). Half of the captions
under 30 words get the prefix "A photo of " (config.text.prefix).

Hardware and time: 200k steps at batch 1536; this code's time and memory: not measured yet. Expected: the paper only
gives figures for the last stage, see t2i_finetune.py.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256
from deco_jax.config import default_config


def get_config(variant: str = "XXL") -> ml_collections.ConfigDict:
    """Return a variant: XXL (default), smoke."""
    if variant not in ("XXL", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose XXL or smoke")
    config = default_config()
    config.model.width, config.model.depth, config.model.num_heads = 1536, 16, 24
    config.model.num_classes = 0
    config.model.text_width, config.model.text_length, config.model.text_depth = 2048, 128, 4
    config.text.prefix = "A photo of "
    config.data.source = "webdataset"
    config.data.batch_size = 1536
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0
    config.loss.repa_layer = 6
    config.loss.label_dropout = 0.1
    config.loss.time_shift = 2.0
    sampler(config)
    config.train.num_steps = 200_000
    if variant == "smoke":
        smoke(config)
    return config


def sampler(config: ml_collections.ConfigDict) -> None:
    """Set the paper's sampler: second-order Adams, 25 steps, shift 3, guidance 4."""
    config.sample.sampler = "adams2"
    config.sample.num_steps = 25
    config.sample.shift = 3.0
    config.sample.guidance = 4.0
    config.sample.guidance_interval = (0.0, 1.0)
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 16


def smoke(config: ml_collections.ConfigDict) -> None:
    """Make it tiny and independent of files: digits with captions, whose letters stand in for Qwen3's features."""
    imagenet256.smoke(config)
    config.model.num_classes = 0
    config.model.text_width, config.model.text_length, config.model.text_depth = 257, 24, 1
    config.data.source = "captioned_digits"
    config.text.encoder, config.text.prefix = "bytes", "A "  # a longer prefix would push the digit out

"""Speed benchmark on a CPU: a DeCo with 12 blocks at 256², float32, without the teacher.

    python -m deco_jax.main --config=configs/benchmark_cpu.py --workdir=/tmp/benchmark --mode=benchmark

Data: the embedded digits, enlarged. Hardware: any CPU; a few minutes on two cores, 4 GB.
Figures: see the README's developer section.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256
from deco_jax.config import default_config


def get_config(variant: str = "S") -> ml_collections.ConfigDict:
    """Return a variant: S (default), smoke."""
    if variant not in ("S", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose S or smoke")
    config = default_config()
    config.model.width, config.model.depth, config.model.num_heads = 384, 12, 6
    config.model.num_classes = 10
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.unroll = 12
    config.model.decoder_chunk = 4096
    config.data.source, config.data.path = "digits", ""
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.loss.repa_weight = 0.0  # no teacher
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 8
    config.sample.num_steps = 2
    config.benchmark.warmup, config.benchmark.repeats = 1, 5
    if variant == "smoke":
        imagenet256.smoke(config)
    return config

"""Handwritten digits at 16², on a laptop in five minutes: a DeCo small enough to watch.

    python -m deco_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Data: the 1,797 digits that scikit-learn also has, included in this package; nothing is downloaded.
Writes runs/quickstart/samples/step_*.png, grids with one row per digit.

Hardware and time: one run took 180 s on two idle CPU cores, including compilation; an older machine took 255 s for
1,200 of the 1,500 steps.
Expected: the digits in the last grid are legible, some 8s and 9s only at second glance. FID: not measured yet.
"""

from __future__ import annotations

import ml_collections

from deco_jax.config import default_config


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    """Return a variant: digits (default), smoke."""
    if variant not in ("digits", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose digits or smoke")
    config = default_config()
    config.model.width, config.model.depth, config.model.num_heads = 128, 4, 4
    config.model.patch_size = 4
    config.model.num_classes = 10
    config.model.decoder_width, config.model.decoder_depth = 16, 2
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.unroll = 4
    config.model.decoder_chunk = 1024
    config.data.source = "digits"
    config.data.image_size = (16, 16)
    config.data.batch_size = 64
    config.data.num_workers = 0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_decay = 0.995
    config.loss.repa_weight = 0.0  # no teacher
    config.loss.label_dropout = 0.1
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 100
    # The SDE, because the ODE leaves stray coloured pixels where the initial noise is extreme: a decoder this small,
    # trained this briefly, doesn't remove all of it, and the SDE adds new noise along the way. Its last steps are
    # short.
    config.sample.sampler, config.sample.num_steps, config.sample.shift = "sde", 40, 0.5
    config.sample.guidance = 3.0
    config.evaluate.batch_size = 2
    config.train.num_steps = 1500
    config.train.log_every = 20
    config.train.save_every = config.train.sample_every = 400
    if variant == "smoke":
        config.model.width, config.model.depth, config.model.unroll = 32, 2, 1
        config.data.batch_size = 16
        config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 10
        config.sample.num_steps = 4
        config.train.num_steps = 4
        config.train.log_every = 1
        config.train.save_every = config.train.sample_every = 2
    return config

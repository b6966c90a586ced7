"""ImageNet 512², class to image: JiT/32 as its authors train it (Li & He 2025): as many tokens as at 256².

    python -m deco_jax.main --config=configs/jit512.py:L --workdir=runs/jit512 --config.data.path=/data/imagenet/train
    python -m deco_jax.main --config=configs/jit512.py:L --workdir=runs/jit512 --mode=sample
    python -m deco_jax.main --config=configs/jit512.py:smoke --workdir=/tmp/smoke

Patches are 32 pixels wide, and the noise has standard deviation 2 (`path.noise_scale`), because larger images need more
of it. Everything else is as in jit256.py, including guidance: the published guidance at 512² is not known.

Variants B, L and H have the same sizes as in jit256.py. Expected FID: the published one is not known; with this code,
not measured yet. Hardware and time: a step's arithmetic is that of jit256.py except for the patches' 3,072 values.
"""

from __future__ import annotations

import ml_collections

from configs import jit256


def get_config(variant: str = "L") -> ml_collections.ConfigDict:
    """Return a variant: B, L (default), H, smoke."""
    config = jit256.get_config(variant)
    config.path.noise_scale = 2.0
    if variant != "smoke":
        config.data.image_size, config.model.patch_size = (512, 512), 32
    return config

"""ImageNet 256², class to image: asymmetric prediction (AsymFlow, arXiv 2605.12964) with JiT's transformer or DeCo.

    python -m deco_jax.main --config=configs/asymmetric256.py --workdir=runs/asymmetric \\
        --config.data.path=/data/imagenet/train
    python -m deco_jax.main --config=configs/asymmetric256.py --workdir=runs/asymmetric --mode=evaluate \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet256_labeled.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/asymmetric256.py:smoke --workdir=/tmp/smoke

The network predicts the noise in only 8 of a patch's 768 directions, the data's top ones; in the others it predicts the
image. A new run measures these directions on 10,000 images before its first step (minutes on a host's cores) and stores
them in every checkpoint as `measured_basis`.

    variant    model                                   expected FID, Heun in 50 steps, guidance 2.2 in [0, 0.88]
    H          jit256.py:H, 600 epochs                 1.76, and 1.57 with REPA (the paper's)
    deco       DeCo-L with its losses, 200k steps      not known; predicting velocities 31.35 without guidance (DeCo's)
    energy     the same on the energy-guided path      not known

With this code: not measured yet. Hardware and time: as for jit256.py and imagenet256.py; the projection adds two 768 ×
8 products per patch.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256, jit256


def get_config(variant: str = "H") -> ml_collections.ConfigDict:
    """Return a variant: H (default), deco, energy, smoke (deco on the energy path, tiny)."""
    if variant == "H":
        config = jit256.get_config("H")
    elif variant in ("deco", "energy", "smoke"):
        config = imagenet256.get_config("smoke" if variant == "smoke" else "L")
    else:
        raise ValueError(f"there is no variant {variant!r}; choose H, deco, energy or smoke")
    config.model.prediction, config.model.asymmetric_rank = "asymmetric", 8
    if variant in ("energy", "smoke"):
        config.path.name = "energy"
    config.sample.sampler, config.sample.guidance_interval = "heun", (-1.0, 0.88)
    if variant != "smoke":
        config.sample.num_steps, config.sample.guidance = 50, 2.2
    return config

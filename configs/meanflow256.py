"""ImageNet 256² in one step: MeanFlow with DeCo-XL/16 or JiT-L/16, from scratch or from a trained checkpoint.

    python -m deco_jax.main --config=configs/meanflow256.py:jit --workdir=runs/mf \\
        --config.data.path=/data/imagenet/train
    python -m deco_jax.main --config=configs/meanflow256.py:deco --workdir=runs/mf_deco \\
        --config.init_from=runs/xl --config.data.path=/data/imagenet/train --config.train.num_steps=200000
    python -m deco_jax.main --config=configs/meanflow256.py:jit --workdir=runs/mf --mode=sample \\
        --config.sample.num_steps=2 --config.sample.guidance=4
    python -m deco_jax.main --config=configs/meanflow256.py:smoke --workdir=/tmp/smoke

The network learns the mean velocity over the rest of the path, including guidance, so an image costs one evaluation, or
two for better quality. The scale and interval of guidance are inputs of the network: config.sample.guidance (1 to 8)
and guidance_interval can be chosen when sampling, at no cost. JiT predicts clean images; DeCo keeps its v-prediction,
without its frequency loss. To use LPIPS with the published weight, add --config.loss.lpips_weight=0.4 and its files.

    variant    model        source of the recipe
    jit        JiT-L/16     pixel MeanFlow (pMF), whose B, L and H reach 3.11, 2.50 and 2.11 in one step
    deco       DeCo-XL/16   the same losses, times and guidance on DeCo; no published figure

Differences from pMF: the network also gets the time t, like the checkpoints to start from; there is no ConvNeXt loss. A
step costs an estimated 7/3 of flow matching's: two more passes for guidance and two for the forward-mode derivative.
With this code: not measured yet. Hardware and time: not measured yet.
"""

from __future__ import annotations

import ml_collections

from configs import imagenet256, jit256


def get_config(variant: str = "jit") -> ml_collections.ConfigDict:
    """Return a variant: jit (default), deco, smoke, deco-smoke."""
    name, _, size = {"smoke": "jit-smoke"}.get(variant, variant).partition("-")
    if name not in ("jit", "deco") or size not in ("", "smoke"):
        raise ValueError(f"there is no variant {variant!r}; choose jit, deco, smoke or deco-smoke")
    config = jit256.get_config(size or "L") if name == "jit" else imagenet256.get_config(size or "XL")
    mean_flow(config)
    return config


def mean_flow(config: ml_collections.ConfigDict) -> None:
    """Turn a config into one that trains MeanFlow, in place."""
    config.model.mean_velocity = config.loss.mean_flow = True
    config.loss.frequency_weight = config.loss.repa_weight = 0.0
    config.loss.perceptual_min_time = 0.2
    # The source's times are 1 − t: sigmoid(0.8 + 0.8·N).
    config.loss.time_mean, config.loss.time_std = -0.8, 0.8
    config.loss.label_dropout = 0.1
    config.optimizer.b2 = 0.95
    config.sample.sampler, config.sample.num_steps, config.sample.shift = "mean_flow", 1, 1.0
    config.sample.guidance, config.sample.guidance_interval = 3.0, (0.1, 0.9)
    config.sample.guidance_times = "step"  # it learns guidance instead

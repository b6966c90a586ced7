"""CIFAR-10 at 32² in one step: MeanFlow with the models of configs/cifar10.py.

    python -m deco_jax.main --config=configs/meanflow_cifar10.py:jit --workdir=runs/mf \\
        --config.data.path=/data/cifar10/train
    python -m deco_jax.main --config=configs/meanflow_cifar10.py:jit --workdir=runs/mf --mode=evaluate \\
        --config.evaluate.inception=/data/inception-2015-12-05.pt --config.sample.num_images=10000 \\
        --config.evaluate.guidances=1.0,1.5,2.0,3.0 --config.evaluate.steps=1,2

Variants: jit (default), deco and dit, each also as NAME-cpu (for two cores) and NAME-smoke (seconds); smoke is
jit-smoke. What is trained: see configs/meanflow256.py. To start from a run of configs/cifar10.py of the same variant:
--config.init_from=runs/cifar10.
Hardware and time: not measured yet; a step costs an estimated 7/3 of flow matching's. FID: not measured yet.
"""

from __future__ import annotations

import ml_collections

from configs import cifar10, meanflow256


def get_config(variant: str = "jit") -> ml_collections.ConfigDict:
    """Return a variant: jit, deco, dit, also with -cpu or -smoke; smoke."""
    variant = {"smoke": "jit-smoke"}.get(variant, variant)
    if variant.partition("-")[0] not in ("jit", "deco", "dit"):
        raise ValueError(
            f"there is no variant {variant!r}; choose jit, deco or dit (or one of them with -cpu or -smoke)"
        )
    config = cifar10.get_config(variant)
    meanflow256.mean_flow(config)
    return config

"""The paper's Table 1 (except PixelFlow) and Table 4 at size L, ImageNet 256²: one name per row.

    python -m deco_jax.main --config=configs/ablation.py:dit --workdir=runs/dit \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python launch/sweep.py --config=configs/ablation.py --variants=deco,no_frequency,dit --modes=train,evaluate \\
        --workdir=runs/ablation --sort=fid -- --config.data.path=/data/imagenet/train \\
        --config.teacher.path=/data/dinov2_vitb14_pretrain.pth \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet256_labeled.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/ablation.py:dit-smoke --workdir=/tmp/smoke    # seconds, two cores

Every row: 200k steps at batch 256, then 50 Euler steps without guidance. The FIDs below are the paper's (8 A800,
0.22–0.25 s per step, so 12–14 hours per row). With this code: not measured yet.

    name               FID     what differs from DeCo-L
    deco               31.35   nothing: decoder width 32, depth 3, patch 1, adaLN, frequency weight 1, quality 85
    dit                61.10   Table 1's baseline: no decoder, no frequency loss, no REPA; 24 blocks
    pixnerd            37.49   PixNerd-L with REPA
    jit                39.06   the DiT with x-prediction and REPA (JiT + REPA)
    no_repa            67.55   without REPA
    no_frequency       34.12   without the frequency loss
    width16, width64   37.63, 35.88   decoder width, without the frequency loss (width 32: 34.12)
    depth1, depth6     37.10, 35.46   decoder depth, without the frequency loss (depth 3: 34.12)
    patch4, patch16    34.39, 55.59   side of the decoder's tokens
    add                36.02   condition added instead of adaLN
    weight0.5, weight2 33.54, 32.97   frequency weight
    quality50, quality100  31.54, 33.84   JPEG quality of the frequency weights

There is no official code for decoder patches above 1 and for "add"; these are our interpretation. Patch k: a query is
k² pixels (3k² values and 64 position features on a grid of 16/k), and its condition is one of (16/k)² vectors from the
patch's Linear. Add: h += condition, h += MLP(LN(h)), without adaLN.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import imagenet256
from deco_jax.config import set_model

Change = Callable[[ml_collections.ConfigDict], None]


def _set(**changes: object) -> Change:
    """Return a function that sets config.section.key=value for each section__key=value."""

    def change(config: ml_collections.ConfigDict) -> None:
        for key, value in changes.items():
            section, _, name = key.partition("__")
            config[section][name] = value

    return change


def _transformer(**changes: object) -> Change:
    """Make it the DiT alone, 24 blocks, with as many parameters as DeCo."""

    def change(config: ml_collections.ConfigDict) -> None:
        set_model(config, "dit", depth=24)
        config.loss.frequency_weight = 0.0
        _set(**changes)(config)

    return change


def _pixnerd(config: ml_collections.ConfigDict) -> None:
    set_model(config, "pixnerd", decoder_width=64, decoder_depth=2)
    config.loss.frequency_weight = 0.0


# name → (the paper's FID, what differs from DeCo-L)
ROWS: dict[str, tuple[float, Change]] = {
    "deco": (31.35, _set()),
    "dit": (61.10, _transformer(loss__repa_weight=0.0)),
    "pixnerd": (37.49, _pixnerd),
    "jit": (39.06, _transformer(model__prediction="x")),
    "no_repa": (67.55, _set(loss__repa_weight=0.0)),
    "no_frequency": (34.12, _set(loss__frequency_weight=0.0)),
    "width16": (37.63, _set(model__decoder_width=16, loss__frequency_weight=0.0)),
    "width64": (35.88, _set(model__decoder_width=64, loss__frequency_weight=0.0)),
    "depth1": (37.10, _set(model__decoder_depth=1, loss__frequency_weight=0.0)),
    "depth6": (35.46, _set(model__decoder_depth=6, loss__frequency_weight=0.0)),
    "patch4": (34.39, _set(model__decoder_patch_size=4)),
    "patch16": (55.59, _set(model__decoder_patch_size=16)),
    "add": (36.02, _set(model__decoder_interaction="add")),
    "weight0.5": (33.54, _set(loss__frequency_weight=0.5)),
    "weight2": (32.97, _set(loss__frequency_weight=2.0)),
    "quality50": (31.54, _set(loss__frequency_quality=50)),
    "quality100": (33.84, _set(loss__frequency_quality=100)),
}

# The paper's figures for each row, which launch/sweep.py prints beside ours; Table 1 has more than the FID.
PAPER: dict[str, dict[str, float]] = {name: {"fid": fid} for name, (fid, _) in ROWS.items()}
for _name, (_sfid, _score, _recall) in {
    "deco": (9.34, 48.35, 0.65),
    "dit": (15.86, 16.81, 0.60),
    "pixnerd": (10.65, 43.01, 0.62),
    "jit": (11.45, 39.57, 0.63),
    "no_repa": (10.58, 19.10, 0.56),
    "no_frequency": (10.41, 46.44, 0.64),
}.items():
    PAPER[_name] |= {"sfid": _sfid, "inception_score": _score, "recall": _recall}


def get_config(variant: str = "deco") -> ml_collections.ConfigDict:
    """Return a row by its name, or NAME-smoke; plain "smoke" is deco-smoke."""
    name = "deco" if variant == "smoke" else variant.removesuffix("-smoke")
    if name not in ROWS:
        raise ValueError(f"there is no row {name!r}; choose one of {', '.join(ROWS)} (or one of them with -smoke)")
    config = imagenet256.get_config("L")
    ROWS[name][1](config)
    if variant.endswith("smoke"):
        decoder = {key: value for key, value in config.model.items() if key.startswith("decoder_")}
        imagenet256.smoke(config)
        # Keep what defines the row: the decoder's own settings, on patches of 16 as in the paper.
        config.model.update(decoder)
        config.model.patch_size = 16
    return config

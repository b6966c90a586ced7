"""CIFAR-10 at 32²: a DeCo with 57 million parameters for one GPU, and the paper's comparisons at that size.

    python -m deco_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.path=/data/cifar10/train
    python launch/sweep.py --config=configs/cifar10.py --variants=deco,dit,pixnerd,jit,no_frequency,patch2,patch4,add \\
        --modes=train,evaluate --measure=sample.guidance=1.0,1.5 --workdir=runs/cifar10_study --sort=fid -- \\
        --config.data.path=/data/cifar10/train --config.evaluate.inception=/data/inception-2015-12-05.pt \\
        --config.evaluate.cache=/data/references --config.sample.num_images=10000

Data: class folders of PNGs (`image_folder`, used here); or TFDS, which downloads and prepares the dataset and needs
TensorFlow only for that: pip install tensorflow, then --config.data.source=tfds --config.data.path=cifar10.

Variants, each also as NAME-cpu (1.3 million parameters, for two cores) and NAME-smoke (seconds):

    deco (also "B")  nothing changed: 12 blocks of width 512 on 4×4 patches, decoder width 32, depth 3
    dit              the transformer alone, no frequency loss
    pixnerd          PixNerd's decoder, width 32, 11 blocks to keep the parameters equal; no frequency loss
    jit              the DiT with x-prediction
    no_frequency     without the frequency loss
    patch2, patch4   side of the decoder's tokens
    add              condition added instead of adaLN
    NAME_repa        any of these aligned with a teacher: VGG16's third tap, whose 8×8 grid matches the tokens';
                     --config.teacher.path=/data/vgg16-397923af.pth (torchvision's file)

All have within 2 % of DeCo's number of parameters (6 % for -cpu). The paper's models except "dit" have a teacher,
DINOv2-B: its claim is about dit, jit_repa, no_frequency_repa and deco_repa, in this order. With VGG16 and -cpu, the
order is jit_repa, dit, no_frequency_repa, deco_repa (docs/results.md).
Hardware: meant for one GPU; memory not measured yet. Time: not measured yet. FID: not measured yet. NAME-cpu: 12 to 15
minutes on one of two cores, with FIDs that only serve to compare these models (docs/results.md).
"""

from __future__ import annotations

import ml_collections

from configs import ablation, imagenet256
from deco_jax.config import default_config

ROWS = {name: ablation.ROWS[name][1] for name in ("deco", "dit", "pixnerd", "jit", "no_frequency", "patch4", "add")}

# launch/sweep.py prints the paper's figures (size L, ImageNet 256²) beside ours for the rows that the paper has. The
# paper's teacher is DINOv2 where ours is VGG16.
PAPER = {
    f"{ours}{size}": ablation.PAPER[theirs]
    for ours, theirs in (
        ("deco", "no_repa"),
        ("dit", "dit"),
        ("patch4_repa", "patch16"),  # the decoder's token is a whole patch in both
        *((f"{name}_repa", name) for name in ("deco", "jit", "no_frequency", "pixnerd", "add")),
    )
    for size in ("", "-cpu")
}


def get_config(variant: str = "deco") -> ml_collections.ConfigDict:
    """Return a row by its name, optionally with _repa and with -cpu or -smoke; B is deco, smoke is deco-smoke."""
    row, _, size = {"B": "deco", "smoke": "deco-smoke"}.get(variant, variant).partition("-")
    name, aligned = row.removesuffix("_repa"), row.endswith("_repa")
    if name not in (*ROWS, "patch2") or size not in ("", "cpu", "smoke"):
        names = ", ".join([*ROWS, "patch2"])
        raise ValueError(
            f"there is no variant {variant!r}; choose one of {names} (or one of them with _repa, and then -cpu or "
            "-smoke)"
        )
    config = default_config()
    config.model.width, config.model.depth, config.model.num_heads = 512, 12, 8
    if size == "cpu":
        config.model.width, config.model.depth, config.model.num_heads = 128, 4, 4
        config.model.decoder_width, config.model.decoder_depth = 16, 2
        config.model.dtype = "float32"
    depth, decoder_width = config.model.depth, config.model.decoder_width
    ROWS["patch4" if name == "patch2" else name](config)
    # The rows are written for size L; keep this config's size.
    config.model.depth = depth
    if name == "pixnerd":
        config.model.decoder_width = decoder_width
        config.model.depth = depth - 1
    if name == "patch2":
        config.model.decoder_patch_size = 2
    config.model.patch_size = 4
    config.model.num_classes = 10
    config.model.remat = "none"
    config.data.image_size = (32, 32)
    config.data.num_workers = 8
    config.data.flip = True
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.clip_norm = 1.0
    config.loss.repa_weight = 0.0
    config.loss.label_dropout = 0.1
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 100
    config.sample.num_steps = 50
    config.sample.guidance = 1.5
    config.train.num_steps = 200_000
    if size == "cpu":
        config.model.unroll = config.model.depth
        if config.model.name == "deco":
            config.model.decoder_chunk = 4096
        config.data.batch_size = 64
        config.data.num_workers = 0
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 50
        config.optimizer.ema_decay = 0.995
        config.train.num_steps = 2000
        config.train.log_every, config.train.save_every, config.train.sample_every = 50, 500, 500
        config.lpips.pixels_per_patch = 0  # at 128² LPIPS takes 29 seconds of a core for each step
    if size == "smoke":
        patch = config.model.get("decoder_patch_size", 1)
        imagenet256.smoke(config)
        config.model.patch_size = 4
        if "decoder_patch_size" in config.model:
            config.model.decoder_patch_size = patch
    if aligned:
        config.loss.repa_weight = 0.5
        config.loss.repa_layer = max(2, config.model.depth // 3)
        vgg_teacher(config)
    return config


def vgg_teacher(config: ml_collections.ConfigDict) -> None:
    """Make VGG16 the teacher, with the tap whose grid matches that of the tokens at 32² with patches of 4."""
    config.teacher.name, config.teacher.size = "vgg", "3"
    config.teacher.dtype = config.model.dtype

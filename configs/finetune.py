"""Your 200 photographs: adapts a pretrained model to a folder of pictures with low-rank factors, on one GPU.

    python -m deco_jax.main --config=configs/imagenet256.py --workdir=runs/official --mode=import \\
        --source=imagenet256_epoch800.ckpt --config.loss.repa_weight=0      # or use a run of your own
    python -m deco_jax.main --config=configs/finetune.py:runs/official --workdir=runs/mine \\
        --config.data.path=photos --config.model.num_classes=1              # photos/my_dog/*.jpg
    python -m deco_jax.main --workdir=runs/mine --mode=sample               # and --mode=export: the merged model
    python -m deco_jax.main --config=configs/finetune.py:smoke --workdir=/tmp/smoke     # seconds, two cores

After the colon comes a run's folder. The model, path, losses, image size and caption encoding are taken from that run;
REPA and the perceptual losses are off. A run with REG still needs its teacher's file (--config.teacher.path). Without a
run, they are those of DeCo-XL at 256², and --config.init_from gives the weights. The pretrained average is frozen. Only
factors of rank 16 for the matrices of the transformer's blocks, and the label table, are trained: a class starts from
the pretrained class of the same name, or else from "no class". Checkpoints hold what is trained; frozen weights are
stored once per run. Every mode merges the two. Averages are taken over the factors.

Data: class folders, or captions for a text-to-image model (`--config.data.source=captioned_folder`); pictures are
mirrored and cropped at random. If the model forgets what its class looked like, fill half of each batch with pictures
to remember it by: any of that class, or ones that the pretrained model draws,

    python -m deco_jax.main --workdir=runs/official --mode=sample --config.sample.png=True \\
        --config.sample.classes="golden retriever" --config.sample.num_images=200
    mkdir prior && mv runs/official/samples/images "prior/golden retriever"
        --config.data.prior_path=prior --config.loss.prior_weight=1 --config.model.num_classes=2

The classes are then those of both folders. `--config.lora.whole=label_embed,decoder` also trains the pixel decoder, and
`--config.lora.rank=0` the whole model.

Hardware and time: one GPU. For DeCo-XL at 256², 8.8 million factors train beside 681 million frozen parameters (2.5
GiB, and as much again when merged; training everything takes 12.7 GiB for weights, gradients, moments and average).
1,000 steps of 8 images. Time and memory: not measured yet. Expected FID: none; look at the grids, one with each
checkpoint, every 200 steps.
"""

from __future__ import annotations

import os

import ml_collections

from configs import imagenet256
from deco_jax.config import default_config, saved


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Return a variant: XL (default), smoke, or the folder of a run to start from."""
    config = default_config()
    variant = os.path.expanduser(variant)  # a shell doesn't, after a colon
    if variant not in ("XL", "smoke"):
        place = saved.of_workdir(variant)
        if place is None:
            raise ValueError(
                f"there is no run or variant {variant!r}; choose XL or smoke (or the folder of a run with its config)"
            )
        pretrained = saved.get_config(str(place))
        with config.unlocked():
            for section in ("model", "path", "loss", "teacher", "text", "sample"):
                config[section] = pretrained[section]
        config.loss.dino_weight = config.loss.lpips_weight = 0.0
        config.loss.balance_start = 0
        # What belongs to that run's data, prompts and averages.
        config.sample.classes = config.sample.prompts = config.sample.guidance_average = ""
        config.sample.images_per_prompt, config.sample.average = 0, "ema"
        config.text.features = config.text.validation_features = ""
        config.data.image_size = tuple(pretrained.data.image_size)
        config.data.source = pretrained.data.source if pretrained.model.text_width else "image_folder"
        config.init_from, config.init_optimizer = variant, False
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.lora.whole = "label_embed" if config.model.num_classes else ""
    config.loss.repa_weight = 0.0
    config.loss.label_dropout = 0.1
    config.data.batch_size, config.data.num_workers = 8, 4
    config.data.flip = config.data.random_crop = True
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-4, 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99
    config.sample.num_images = config.sample.grid_images = config.sample.batch_size = 16
    config.train.num_steps, config.train.log_every = 1000, 20
    config.train.save_every = config.train.sample_every = 200
    if variant == "smoke":
        imagenet256.smoke(config)
        config.lora.rank, config.lora.random_base = 4, True
        config.data.flip = config.data.random_crop = False
    return config

"""ImageNet 256², class to image: the paper's DeCo-XL/16, and DeCo-L/16 of its Table 1.

    python -m deco_jax.main --config=configs/imagenet256.py --workdir=runs/xl \\
        --config.data.path=/data/imagenet/train --config.teacher.path=/data/dinov2_vitb14_pretrain.pth
    python -m deco_jax.main --config=configs/imagenet256.py:L --workdir=runs/l ...      # 426,938,019 parameters
    python -m deco_jax.main --config=configs/imagenet256.py --workdir=runs/xl --mode=evaluate \\
        --config.evaluate.inception=/data/pt_inception-2015-12-05-6726825d.pth \\
        --config.evaluate.reference=/data/VIRTUAL_imagenet256_labeled.npz --config.sample.num_images=50000
    python -m deco_jax.main --config=configs/imagenet256.py:smoke --workdir=/tmp/smoke  # seconds, two cores

Data: ImageNet's class folders (`image_folder`), or an ArrayRecord directory that TFDS prepared (`tfds`).
A different number of GPUs needs no other setting: the batch size is global.

Hardware and time. The paper trains on 8 A800: L 0.24 s a step at batch 256, so 200k steps take 13 hours.
XL: 787 GFLOP an image and step, 1.6 M steps are 320 epochs. This code's time and memory there: not measured yet.

Expected FID (the paper's; with this code: not measured yet)
    L, 200k steps, 50 Euler steps, guidance 1                        31.35
    XL, 320 epochs (1.6 M steps), 100 Euler steps, guidance 3.2      1.90
    XL, 800 epochs (4 M steps), 250 Euler steps, guidance 3.0        1.62
"""

from __future__ import annotations

import ml_collections


def get_config(variant: str = "XL") -> ml_collections.ConfigDict:
    """Every setting there is. Variants: XL (default), L, smoke."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.init_from = ""  # a checkpoint whose weights a new run starts from
    config.init_optimizer = False  # and whose optimizer's moments

    config.model = ml_collections.ConfigDict()
    config.model.name = "deco"
    config.model.prediction = "v"
    config.model.width, config.model.depth, config.model.num_heads = 1152, 28, 16
    config.model.patch_size = 16
    config.model.num_classes = 1000
    config.model.decoder_width, config.model.decoder_depth = 32, 3
    config.model.decoder_patch_size = 1  # the decoder works at every pixel
    config.model.decoder_interaction = "adaln"
    config.model.decoder_chunk = 0  # pixels at a time; 0: all at once. 4096 on a CPU
    config.model.text_width = config.model.text_length = config.model.text_depth = 0
    config.model.dtype = "bfloat16"
    config.model.remat = "full"  # none: fastest, most memory; dots; full: least memory
    config.model.unroll = 1
    config.model.attention = "xla"  # "cudnn" on NVIDIA GPUs

    config.data = ml_collections.ConfigDict()
    config.data.source = "image_folder"
    config.data.path = ""
    config.data.split = ""  # a subfolder of path; tfds: the split, train if empty
    # An object, so that the command line takes 256 and (256, 384) alike.
    config.data.image_size = ml_collections.FieldReference(256, field_type=object)
    config.data.batch_size = 256  # global
    config.data.num_workers = 16
    config.data.flip = False  # the recipe has no flip
    config.data.max_unreadable = 0.001

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.999, 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.accumulate_steps = 1
    config.optimizer.ema_decay = 0.9999

    config.loss = ml_collections.ConfigDict()
    config.loss.frequency_weight, config.loss.frequency_quality = 1.0, 85
    config.loss.repa_weight, config.loss.repa_layer = 0.5, 8
    config.loss.label_dropout = 0.2  # DeCo-XL; 0.1 for every other model
    config.loss.time_shift = 1.0
    config.loss.time_mean, config.loss.time_std = 0.0, 1.0

    config.teacher = ml_collections.ConfigDict()  # DINOv2, read only if repa_weight > 0
    config.teacher.path = ""
    config.teacher.size = "B"
    config.teacher.dtype = "bfloat16"

    config.text = ml_collections.ConfigDict()  # Qwen3, read only if model.text_width > 0
    config.text.encoder = "qwen3"  # "bytes": no files and no language, the caption's letters as they are
    config.text.path = ""  # its Hugging Face folder
    config.text.prefix = ""  # put before half of the short captions while training
    config.text.dtype = "bfloat16"
    config.text.features = ""  # a folder that --mode=encode fills; training then needs no encoder

    config.sample = ml_collections.ConfigDict()
    config.sample.num_images = 64
    config.sample.prompts = ""  # text-to-image: a prompt, or a file or folder of them; empty: the data's captions
    config.sample.negative_prompt = ""
    config.sample.images_per_prompt = 0  # 0: as many as GenEval or DPG-Bench asks for, else 1
    config.sample.batch_size = 64
    config.sample.num_steps = 100
    config.sample.sampler = "euler"
    config.sample.guidance = 3.2
    config.sample.guidance_interval = (0.1, 1.0)
    config.sample.shift = 1.0
    config.sample.seed = 0
    config.sample.classes = ""  # numbers or names of those to draw; all
    config.sample.same_noise = False  # the k-th image of every class from the same noise
    config.sample.npz = False
    config.sample.png = False
    config.sample.grid_images = 64
    config.sample.grid_columns = 0

    config.train = ml_collections.ConfigDict()
    config.train.num_steps = 1_600_000
    config.train.log_every = 100
    config.train.save_every = 5000
    config.train.sample_every = 10_000
    config.train.keep_checkpoints = 3
    config.train.max_skipped_steps = 10
    config.train.profile_start = 0  # after so many steps of a process a trace for TensorBoard starts; 0: none
    config.train.profile_steps = 5

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.inception = ""  # inception-2015-12-05.pt, or pt_inception-2015-12-05-6726825d.pth
    config.evaluate.reference = ""  # an ADM reference .npz; empty: the images of config.data
    config.evaluate.samples = ""  # a samples.npz or a folder; empty: config.sample.num_images drawn on the way
    config.evaluate.cache = ""  # a folder for the reference's statistics, that runs share; empty: the workdir
    config.evaluate.num_reference = 0  # images of config.data; 0: all
    config.evaluate.batch_size = 64
    config.evaluate.precision_recall_reference = 10_000  # as many as ADM's reference files hold
    config.evaluate.precision_recall_samples = 50_000
    config.evaluate.save_every = 5000  # images
    config.evaluate.every = 0  # training steps between two quick FIDs; 0: none
    config.evaluate.during_training_images = 5000

    config.spectrum = ml_collections.ConfigDict()
    config.spectrum.checkpoints = ""  # workdirs, comma separated; empty: this one
    config.spectrum.num_images = 64
    config.spectrum.batch_size = 8

    config.report = ml_collections.ConfigDict()
    config.report.workdirs = ""  # runs side by side, comma separated; empty: this one
    config.report.grids = 12  # of the sample grids over time, evenly spread
    config.report.grid_pixels = 768  # larger ones are embedded smaller

    config.benchmark = ml_collections.ConfigDict()
    config.benchmark.warmup = 3
    config.benchmark.repeats = 20

    if variant == "L":
        config.model.width, config.model.depth = 1024, 22
        config.loss.label_dropout = 0.1
        config.train.num_steps = 200_000
        config.sample.guidance, config.sample.num_steps = 1.0, 50
    elif variant == "smoke":
        smoke(config)
    elif variant != "XL":
        raise ValueError(f"there is no variant {variant!r}; choose XL, L or smoke")
    config.lock()
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same program, tiny: digits in 32², seconds on two cores, no files needed."""
    config.model.width, config.model.depth, config.model.num_heads = 32, 3, 4
    config.model.patch_size = 8
    config.model.num_classes = 10
    if "decoder_width" in config.model:
        config.model.decoder_width, config.model.decoder_depth = 8, 2
    config.model.dtype = "float32"
    config.data.source, config.data.path = "digits", ""
    config.data.image_size = 32
    config.data.batch_size = 8
    config.data.num_workers = 0
    config.loss.repa_weight = 0.0
    config.sample.num_images = config.sample.batch_size = config.sample.grid_images = 10
    config.sample.num_steps = 4
    config.train.num_steps = 4
    config.train.log_every = 1
    config.train.save_every = config.train.sample_every = 2
    config.evaluate.batch_size, config.evaluate.during_training_images = 2, 10
    config.spectrum.num_images = config.spectrum.batch_size = 4
    config.benchmark.warmup, config.benchmark.repeats = 1, 3

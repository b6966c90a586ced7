"""What a config may say: every key with its type and range, checked before anything compiles or is written.

A key that is not in the table is an error, and so is one that is missing: no setting is silently ignored.
The tables here are the reference; the files in configs/ are the documents.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from deco_jax.data.sources import SOURCES
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.models.layers import REMAT_POLICIES
from deco_jax.sampling.samplers import SAMPLERS


class Key(NamedTuple):
    """A setting: its type, and what its value has to satisfy, as a test and in words."""

    kind: type | tuple[type, ...]
    test: Callable[[Any], bool] = lambda value: True
    rule: str = ""


def at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: bool(np.isfinite(value) and value >= low), f"at least {low}"


def above(low: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: bool(np.isfinite(value) and value > low), f"above {low}"


def between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: low <= value <= high, f"from {low} to {high}"


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


FLOAT = (int, float)
BYTE_WIDTH = 257  # what a caption's bytes can be, and padding
SEED = Key(int, *between(0, 2**63 - 1))  # what JAX makes keys of
IMAGE_SIZE = Key(
    (int, tuple),
    lambda size: all(isinstance(s, int) and s >= 8 for s in image_sides(size)) and len(image_sides(size)) == 2,
    "a side of at least 8 pixels, or (height, width)",
)

TRUNK = {
    "name": Key(str, *one_of("deco", "dit", "pixnerd")),
    "prediction": Key(str, *one_of("v", "x")),  # the output is the velocity, or the clean image (JiT)
    "width": Key(int, *at_least(4)),
    "depth": Key(int, *at_least(1)),
    "num_heads": Key(int, *at_least(1)),
    "patch_size": Key(int, *at_least(1)),
    "num_classes": Key(int, *at_least(0)),  # 0 for text-to-image
    "text_width": Key(int, *at_least(0)),  # channels of the text features; 0: class-to-image
    "text_length": Key(int, *at_least(0)),
    "text_depth": Key(int, *at_least(0)),
    "dtype": Key(str, *one_of("bfloat16", "float32")),  # of the computation; parameters are float32
    "remat": Key(str, *one_of(*REMAT_POLICIES)),
    "unroll": Key(int, *at_least(1)),
    "attention": Key(str, *one_of("xla", "cudnn")),
}
DECODER = {"decoder_width": Key(int, *at_least(1)), "decoder_depth": Key(int, *at_least(1))}
MODEL = {
    "deco": TRUNK
    | DECODER
    | {
        "decoder_patch_size": Key(int, *at_least(1)),
        "decoder_interaction": Key(str, *one_of("adaln", "add")),
        "decoder_chunk": Key(int, *at_least(0)),  # queries at a time, 0: all; some thousands on a CPU
    },
    "dit": TRUNK,
    "pixnerd": TRUNK | DECODER | {"decoder_ratio": Key(int, *at_least(1))},
}

SECTIONS: dict[str, dict[str, Key]] = {
    "data": {
        "source": Key(str, *one_of(*SOURCES)),
        "path": Key(str),  # the folder; of webdataset also one .tar
        "split": Key(str),  # a subfolder; of tfds its split
        "image_size": IMAGE_SIZE,
        "batch_size": Key(int, *at_least(1)),  # global
        "num_workers": Key(int, *at_least(0)),
        "flip": Key(bool),
        "max_unreadable": Key(FLOAT, *between(0, 1)),  # share of the images
    },
    "mesh": {
        "data": Key(int, lambda n: n == -1 or n >= 1, "at least 1, or -1 for all that is left"),
        "fsdp": Key(int, lambda n: n == -1 or n >= 1, "at least 1, or -1 for all that is left"),
    },
    "optimizer": {
        "learning_rate": Key(FLOAT, *above(0)),
        "b1": Key(FLOAT, lambda b: 0 <= b < 1, "from 0 to below 1"),
        "b2": Key(FLOAT, lambda b: 0 <= b < 1, "from 0 to below 1"),
        "eps": Key(FLOAT, *above(0)),
        "weight_decay": Key(FLOAT, *at_least(0)),
        "clip_norm": Key(FLOAT, *at_least(0)),  # 0: off
        "warmup_steps": Key(int, *at_least(0)),
        "accumulate_steps": Key(int, *at_least(1)),  # parts that a batch is worked through in
        "ema_decay": Key(FLOAT, *between(0, 1)),
    },
    "loss": {
        "frequency_weight": Key(FLOAT, *at_least(0)),
        "frequency_quality": Key(FLOAT, *between(1, 100)),
        "repa_weight": Key(FLOAT, *at_least(0)),
        "repa_layer": Key(int, *at_least(1)),
        "label_dropout": Key(FLOAT, *between(0, 1)),
        "time_shift": Key(FLOAT, *above(0)),
        "time_mean": Key(FLOAT, lambda value: bool(np.isfinite(value)), "a finite number"),
        "time_std": Key(FLOAT, *at_least(0)),
    },
    "teacher": {
        "path": Key(str),
        "size": Key(str, *one_of("S", "B", "L")),
        "dtype": Key(str, *one_of("bfloat16", "float32")),
    },
    "text": {  # text-to-image only
        "encoder": Key(str, *one_of("qwen3", "bytes")),
        "path": Key(str),  # of qwen3: a Hugging Face folder
        "prefix": Key(str),  # put before half of the captions under 30 words while training; "": none
        "dtype": Key(str, *one_of("bfloat16", "float32")),  # of qwen3
        "features": Key(str),  # the folder that --mode=encode fills and training reads; "": encode in each step
    },
    "sample": {
        "num_images": Key(int, *at_least(1)),  # of classes, or of captions of the data; given prompts count themselves
        # A prompt, or a file or folder of them; "": the data's captions, which --mode=evaluate always draws.
        "prompts": Key(str),
        "negative_prompt": Key(str),
        "images_per_prompt": Key(int, *at_least(0)),  # 0: what the prompts' benchmark asks for, else 1
        "classes": Key(str),  # numbers or names, comma separated; "": all
        "same_noise": Key(bool),  # the k-th image of every class starts from the same noise
        "batch_size": Key(int, *at_least(1)),
        "num_steps": Key(int, *at_least(1)),
        "sampler": Key(str, *one_of(*SAMPLERS)),
        "guidance": Key(FLOAT, *at_least(0)),
        "guidance_interval": Key(
            tuple, lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1, "two times (low, high) within 0..1"
        ),
        "shift": Key(FLOAT, *above(0)),
        "seed": SEED,
        "npz": Key(bool),  # also write samples/samples.npz
        "png": Key(bool),  # also write each image as a file in samples/images
        "grid_images": Key(int, *at_least(1)),  # at most this many in a grid
        "grid_columns": Key(int, *at_least(0)),  # 0: a row for each class if they come out even, else near square
    },
    "train": {
        "num_steps": Key(int, *at_least(1)),
        "log_every": Key(int, *at_least(1)),
        "save_every": Key(int, *at_least(1)),
        "sample_every": Key(int, *at_least(0)),  # 0: never
        "keep_checkpoints": Key(int, *at_least(1)),
        "max_skipped_steps": Key(int, *at_least(0)),  # steps with a non-finite loss or gradient to survive
        "profile_start": Key(int, *at_least(0)),  # steps of a process before its trace; 0: no trace
        "profile_steps": Key(int, *at_least(1)),
    },
    "evaluate": {
        "inception": Key(str),  # path of the weights
        "reference": Key(str),  # an ADM .npz; "": the images of config.data
        "samples": Key(str),  # a samples.npz or a folder of images; "": config.sample's, drawn on the way
        "cache": Key(str),  # folder for what is measured of references; "": WORKDIR/evaluation
        "num_reference": Key(int, *at_least(0)),  # images of config.data, evenly spread; 0: all
        "batch_size": Key(int, *at_least(1)),  # of the Inception network
        "precision_recall_reference": Key(int, *at_least(0)),  # at most so many, evenly spread; 0: not measured
        "precision_recall_samples": Key(int, *at_least(0)),
        "save_every": Key(int, *at_least(1)),  # images between two saves of what is measured so far
        "every": Key(int, *at_least(0)),  # training steps between two quick FIDs; 0: none
        "during_training_images": Key(int, *at_least(2)),  # samples of a quick FID
    },
    "spectrum": {
        "checkpoints": Key(str),  # workdirs or checkpoints, comma separated; "": this workdir's newest
        "num_images": Key(int, *at_least(1)),
        "batch_size": Key(int, *at_least(1)),  # images whose states at all sampling steps are held at once
    },
    "report": {
        "workdirs": Key(str),  # runs side by side, comma separated; "": this workdir
        "grids": Key(int, *at_least(1)),  # sample grids over time of a run, at most
        "grid_pixels": Key(int, *at_least(64)),  # longer side of an embedded grid, at most
    },
    "benchmark": {
        "warmup": Key(int, *at_least(1)),  # runs before the timed ones
        "repeats": Key(int, *at_least(1)),  # timed runs
    },
}
TOP = {
    "seed": SEED,
    "init_from": Key(str),  # checkpoint whose weights a new run starts from; "": none
    "init_optimizer": Key(bool),  # and whose optimizer's moments
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, one line with the remedy, if the config says anything that can't be done."""
    values = config.to_dict()
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    _check_keys("config", {k: v for k, v in values.items() if k not in sections}, TOP, more=[*SECTIONS, "model"])
    for name in [*SECTIONS, "model"]:
        if name not in sections:
            raise UserError(f"config.{name} is missing; start from configs/imagenet256.py, which has every section")
    for name in sections:
        if name not in SECTIONS and name != "model":
            raise UserError(f"config.{name} is not a section that anything reads; remove it{_nearest(name, SECTIONS)}")
    model_name = sections["model"].get("name")
    if model_name not in MODEL:
        raise UserError(f"config.model.name={model_name!r} is not a model; choose one of {', '.join(MODEL)}")
    _check_keys("config.model", sections["model"], MODEL[model_name])
    for name, keys in SECTIONS.items():
        _check_keys(f"config.{name}", sections[name], keys)
    _check_together(config)


def settle_paths(config: ml_collections.ConfigDict, **flags: str) -> None:
    """Put the home folder for a leading ~ in settings; UserError for a path that is a URL, in a flag or a setting."""
    named = {f"--{name}": value for name, value in flags.items()}
    named |= {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
    for name, value in named.items():
        if isinstance(value, str) and re.match(r"[a-z][a-z0-9+.-]*://", value):
            raise UserError(f"{name}={value} is no path of this machine; mount it (gcsfuse, s3fs) and give that path")
        if isinstance(value, str) and value.startswith("~/") and name.startswith("config."):
            config.update_from_flattened_dict({name.removeprefix("config."): os.path.expanduser(value)})


def _check_keys(where: str, values: Mapping[str, Any], keys: Mapping[str, Key], more: list[str] | None = None) -> None:
    for name, value in values.items():
        if name not in keys:
            if more and name in more:
                raise UserError(f"{where}.{name}={value!r} must be a section of settings, not a value")
            raise UserError(f"{where}.{name} is not a setting that anything reads; remove it{_nearest(name, keys)}")
        kind, test, rule = keys[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        typed = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if not typed:
            expected = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{where}.{name}={value!r} must be of type {expected}" + (f", {rule}" if rule else ""))
        try:
            allowed = test(value)
        except TypeError:  # an element of a pair
            allowed = False
        if not allowed:
            raise UserError(f"{where}.{name}={value!r} must be {rule}")
    for name in keys:
        if name not in values:
            raise UserError(f"{where}.{name} is missing; configs/imagenet256.py shows every setting")


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_together(config: ml_collections.ConfigDict) -> None:
    model, data, loss = config.model, config.data, config.loss
    height, width = image_sides(data.image_size)
    if height % model.patch_size or width % model.patch_size:
        raise UserError(
            f"config.model.patch_size={model.patch_size} does not divide the image, {height}x{width}; "
            f"change it or config.data.image_size"
        )
    if model.width % model.num_heads:
        raise UserError(f"config.model.num_heads={model.num_heads} does not divide config.model.width={model.width}")
    if model.width // model.num_heads % 4:
        raise UserError(
            f"the head width {model.width // model.num_heads} (config.model.width / config.model.num_heads) must be "
            "a multiple of 4, for a rotary embedding of two axes"
        )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise UserError(f"config.model.attention=cudnn needs config.model.dtype=bfloat16, not {model.dtype}")
    if model.name == "deco" and model.patch_size % model.decoder_patch_size:
        raise UserError(
            f"config.model.decoder_patch_size={model.decoder_patch_size} does not divide "
            f"config.model.patch_size={model.patch_size}"
        )
    if (model.text_width > 0) == (model.num_classes > 0):
        raise UserError(
            "a model is conditioned on classes or on text: set one of config.model.num_classes and "
            "config.model.text_width above 0 and the other to 0"
        )
    if model.text_width and not model.text_length:
        raise UserError("config.model.text_width is set, so config.model.text_length must be at least 1")
    if model.text_width and config.text.encoder == "bytes" and model.text_width < BYTE_WIDTH:
        raise UserError(
            f"config.text.encoder=bytes has {BYTE_WIDTH} symbols; set config.model.text_width={BYTE_WIDTH} or more"
        )
    if not model.text_width and (
        config.sample.prompts or config.sample.negative_prompt or config.sample.images_per_prompt
    ):
        raise UserError(
            "config.sample.prompts, negative_prompt and images_per_prompt are for text-to-image models, and "
            "config.model.text_width is 0; leave them empty and 0"
        )
    if model.text_width and (config.sample.classes or config.sample.same_noise):
        raise UserError(
            "config.sample.classes and same_noise are for class-to-image models, and config.model.num_classes is 0; "
            "leave them empty and false"
        )
    if config.sample.images_per_prompt and not config.sample.prompts:
        raise UserError(
            "config.sample.images_per_prompt is for config.sample.prompts, which is empty; without prompts "
            "config.sample.num_images counts"
        )
    if loss.repa_weight and loss.repa_layer > model.depth:
        raise UserError(f"config.loss.repa_layer={loss.repa_layer} is deeper than config.model.depth={model.depth}")
    if loss.repa_weight and (height * 14 % model.patch_size or width * 14 % model.patch_size):
        raise UserError(
            f"the teacher reads the image at 14/{model.patch_size} of its size, which is not whole for {height}x{width}"
        )
    if config.evaluate.every % config.train.log_every:
        raise UserError(
            f"config.evaluate.every={config.evaluate.every} must be a multiple of "
            f"config.train.log_every={config.train.log_every}: the FID goes into the same line of metrics.jsonl"
        )
    if data.batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"config.optimizer.accumulate_steps={config.optimizer.accumulate_steps} does not divide "
            f"config.data.batch_size={data.batch_size}"
        )


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The resolved config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of nested settings, as overrides name them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


# Settings of a model that say how it is computed: its parameters are the same whatever they are.
COMPUTED = ("dtype", "remat", "unroll", "attention", "decoder_chunk")


def model_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings in which two model sections describe different parameters, as "key: theirs there, ours here"."""
    keys = [key for key in {**ours, **theirs} if key not in COMPUTED and ours.get(key) != theirs.get(key)]
    return [f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys]

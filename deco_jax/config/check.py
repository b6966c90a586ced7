"""Checks a config before anything compiles or is written.

Both unknown and missing settings are errors, so no setting is silently ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from deco_jax.config.sections import MODEL, SECTIONS, TOP
from deco_jax.config.words import suggestion
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.models import blocks, teachers, vgg
from deco_jax.nested import flatten
from deco_jax.run import storage
from deco_jax.schema import Setting, wrong

LISTS_OF_PATHS = ("config.report.workdirs", "config.spectrum.checkpoints", "config.data.path")  # comma-separated
BYTE_WIDTH = 257  # the values of a byte, and padding


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, one line with the remedy, if the config asks for anything that can't be done."""
    values = config.to_dict()
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    _check_keys("config", {k: v for k, v in values.items() if k not in sections}, TOP, more=[*SECTIONS, "model"])
    for name in [*SECTIONS, "model"]:
        if name not in sections:
            raise UserError(f"config.{name} is missing; start from deco_jax.config.default_config()")
    for name in sections:
        if name not in SECTIONS and name != "model":
            suggestion = _suggestion(name, [*SECTIONS, "model"])
            raise UserError(f"config.{name} is not a section of the settings; remove it{suggestion}")
    model_name = sections["model"].get("name")
    if model_name not in MODEL:
        raise UserError(f"config.model.name={model_name!r} is not a model; choose one of {', '.join(MODEL)}")
    _check_keys("config.model", sections["model"], MODEL[model_name])
    for name, keys in SECTIONS.items():
        _check_keys(f"config.{name}", sections[name], keys)
    _check_together(config)


def settle_paths(config: ml_collections.ConfigDict, **flags: str) -> None:
    """Replace a leading ~ or ~user in settings, or in each part of those that list paths, by the home folder.

    Raises:
        UserError: a flag or a setting is a URL that isn't supported, or names a user who doesn't exist.
    """
    named = {f"--{name}": value for name, value in flags.items()}
    named |= {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
    for name, value in named.items():
        if isinstance(value, str) and re.match(r"[a-z][a-z0-9+.-]*://", value) and not storage.is_remote(value):
            raise UserError(
                f"{name}={value} is neither a path nor in a bucket of a supported kind ({', '.join(storage.SCHEMES)}); "
                "mount it and give that path"
            )
        if not isinstance(value, str):
            continue
        parts = value.split(",") if name in LISTS_OF_PATHS else [value]
        for i, part in enumerate(parts):
            if (user := re.match(r"~(\w[\w.-]*)?(/|$)", part)) is None:
                continue
            parts[i] = os.path.expanduser(part)
            if parts[i] == part:
                raise UserError(f"{name}={value}: there is no user {user[1]} with a home folder; give the full path")
        if name.startswith("config.") and ",".join(parts) != value:
            config.update_from_flattened_dict({name.removeprefix("config."): ",".join(parts)})


def _check_keys(
    where: str, values: Mapping[str, Any], declared: Mapping[str, Setting], more: list[str] | None = None
) -> None:
    for name, value in values.items():
        if name not in declared:
            if more and name in more:
                raise UserError(f"{where}.{name}={value!r} must be a section of settings, not a value")
            raise UserError(f"{where}.{name} is not a setting; remove it{_suggestion(name, declared)}")
        if problem := wrong(f"{where}.{name}", value, declared[name]):
            raise UserError(problem)
    for name in declared:
        if name not in values:
            raise UserError(f"{where}.{name} is missing; start from deco_jax.config.default_config(), which has it")


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = suggestion(name, names)
    return f" ({close})" if close else ""


def _check_together(config: ml_collections.ConfigDict) -> None:
    model, data, loss = config.model, config.data, config.loss
    height, width = image_sides(data.image_size)
    if height % model.patch_size or width % model.patch_size:
        raise UserError(
            f"config.model.patch_size={model.patch_size} does not divide the image, {height}x{width}; "
            f"change it or config.data.image_size"
        )
    if data.fast_crop and data.random_crop:
        raise UserError("config.data.fast_crop only crops the centre; don't combine it with config.data.random_crop")
    if loss.balance_start and not (loss.lpips_weight or loss.dino_weight):
        raise UserError(
            "config.loss.balance_start balances the perceptual losses, but config.loss.lpips_weight and dino_weight "
            "are 0; set one of them, or balance_start to 0"
        )
    if loss.lpips_weight:
        vgg.check_size((height, width), model.patch_size, config.lpips.pixels_per_patch)
    if config.lora.rank and loss.balance_start:
        raise UserError(
            "config.loss.balance_start needs the output layer's gradient, but config.lora.rank freezes that layer; set "
            "one of them to 0"
        )
    if model.prediction == "asymmetric" and model.asymmetric_rank > 3 * model.patch_size**2:
        raise UserError(
            f"config.model.asymmetric_rank={model.asymmetric_rank} is more than the {3 * model.patch_size**2} values "
            "of a patch, 3·config.model.patch_size²"
        )
    if model.width % model.num_heads:
        raise UserError(f"config.model.num_heads={model.num_heads} does not divide config.model.width={model.width}")
    head_width = model.width // model.num_heads
    if head_width % 4:
        raise UserError(
            f"the head width {head_width} (config.model.width / config.model.num_heads) must be "
            "a multiple of 4, for the rotary embedding of two axes"
        )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise UserError(f"config.model.attention=cudnn needs config.model.dtype=bfloat16, not {model.dtype}")
    if model.attention == "cudnn" and not blocks.cudnn_takes(head_width, hopper=True):
        raise UserError(
            f"the head width {head_width} (config.model.width / config.model.num_heads) must be a multiple of 8 and at "
            "most 256 for config.model.attention=cudnn; choose auto"
        )
    if model.mean_velocity and model.attention == "cudnn":
        raise UserError("config.model.attention=cudnn has no forward-mode derivative, which model.mean_velocity needs")
    if model.mean_velocity != loss.mean_flow:
        raise UserError("config.model.mean_velocity and config.loss.mean_flow need each other: set both or neither")
    if config.sample.sampler == "mean_flow" and not model.mean_velocity:
        raise UserError(
            "config.sample.sampler=mean_flow is for models with config.model.mean_velocity=True; choose another"
        )
    if model.mean_velocity:
        _check_mean_flow(config)
    sample = config.sample
    if sample.guidance_rule == "zero_star" and sample.guidance != 1 and sample.guidance_zero_steps >= sample.num_steps:
        raise UserError(
            f"config.sample.guidance_zero_steps={sample.guidance_zero_steps} leaves none of config.sample.num_steps="
            f"{sample.num_steps} to draw in; set fewer, or more steps"
        )
    if config.path.name == "energy" and config.sample.sampler == "sde":
        raise UserError(
            "config.sample.sampler=sde needs the score, which only the straight path's velocity gives; on "
            "config.path.name=energy choose another, such as heun"
        )
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
    if model.context_tokens and model.text_width:
        raise UserError(
            "config.model.context_tokens are tokens of a class, but this model reads text; set it or "
            "config.model.text_width to 0"
        )
    if model.context_start > model.depth:
        raise UserError(
            f"config.model.context_start={model.context_start} is deeper than config.model.depth={model.depth}"
        )
    if model.context_tokens and model.context_start == model.depth:
        raise UserError(
            f"config.model.context_start={model.context_start} leaves the config.model.context_tokens no block to act "
            f"in; choose one below config.model.depth={model.depth}"
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
            "config.sample.prompts, negative_prompt and images_per_prompt are for text-to-image models, but "
            "config.model.text_width is 0; leave them at their defaults"
        )
    if model.text_width and (config.sample.classes or config.sample.same_noise):
        raise UserError(
            "config.sample.classes and same_noise are for class-to-image models, but config.model.num_classes is 0; "
            "leave them at their defaults"
        )
    if config.sample.negative_prompt and (config.sample.guidance_model or config.sample.guidance_average):
        raise UserError(
            "config.sample.negative_prompt has no effect where guidance leads away from a weaker model "
            "(config.sample.guidance_model, guidance_average); set only one of them"
        )
    if config.sample.images_per_prompt and not config.sample.prompts:
        raise UserError(
            "config.sample.images_per_prompt applies to config.sample.prompts, which is empty; without prompts, use "
            "config.sample.num_images"
        )
    if loss.repa_weight and loss.repa_layer > model.depth:
        raise UserError(f"config.loss.repa_layer={loss.repa_layer} is deeper than config.model.depth={model.depth}")
    if bool(model.class_token) != bool(loss.class_token_weight):
        raise UserError(
            "config.model.class_token and config.loss.class_token_weight need each other: set both or neither"
        )
    if model.class_token and model.mean_velocity:
        raise UserError("config.model.class_token can't be combined with config.model.mean_velocity; set only one")
    if model.class_token and model.class_token != teachers.features_width(config.teacher.name, config.teacher.size):
        raise UserError(
            f"config.model.class_token={model.class_token} doesn't match the teacher's width; set it to "
            f"{teachers.features_width(config.teacher.name, config.teacher.size)}, or choose another config.teacher"
        )
    if loss.repa_weight or loss.dino_weight or loss.class_token_weight:
        teachers.features_width(config.teacher.name, config.teacher.size)  # it raises if there is no such teacher
    if loss.repa_schedule != "constant" and not loss.repa_until_step:
        raise UserError(
            f"config.loss.repa_schedule={loss.repa_schedule} falls to 0 at config.loss.repa_until_step, which is 0; "
            "set it"
        )
    if loss.repa_weight and loss.repa_target == "spatial" and (height, width) == (model.patch_size,) * 2:
        raise UserError(
            "config.loss.repa_target=spatial compares an image's tokens with their mean, and this image is one token; "
            "make config.model.patch_size smaller"
        )
    if config.evaluate.every % config.train.log_every:
        raise UserError(
            f"config.evaluate.every={config.evaluate.every} must be a multiple of "
            f"config.train.log_every={config.train.log_every}: the FID goes into the same line of metrics.jsonl"
        )
    optimizer = config.optimizer
    if optimizer.schedule != "constant" and optimizer.decay_end <= optimizer.decay_start:
        raise UserError(
            f"config.optimizer.schedule={optimizer.schedule} falls from config.optimizer.decay_start="
            f"{optimizer.decay_start} to decay_end={optimizer.decay_end}, which must be later; set decay_end, for "
            f"instance to config.train.num_steps={config.train.num_steps}"
        )
    if data.batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"config.optimizer.accumulate_steps={config.optimizer.accumulate_steps} does not divide "
            f"config.data.batch_size={data.batch_size}"
        )


def _check_mean_flow(config: ml_collections.ConfigDict) -> None:
    sample = config.sample
    unused = {"rule": "plain", "rescale": 0.0, "times": "step", "model": "", "average": ""}
    for name, plain in unused.items():
        if sample[f"guidance_{name}"] != plain:
            raise UserError(
                f"config.sample.guidance_{name} has no effect on a model that learnt guidance (config.loss.mean_flow); "
                f"set it to {plain!r}"
            )
    if sample.negative_prompt:
        raise UserError(
            "config.sample.negative_prompt has no effect on a model that learnt guidance (config.loss.mean_flow); "
            "leave it out"
        )
    if not 1 <= sample.guidance <= config.loss.mean_flow_guidance:
        raise UserError(
            f"config.sample.guidance={sample.guidance} is outside of what this model learns, 1 to "
            f"{config.loss.mean_flow_guidance:g} (config.loss.mean_flow_guidance)"
        )
    if sample.guidance_interval[0] < 0:
        raise UserError(
            f"config.sample.guidance_interval={tuple(sample.guidance_interval)} begins before 0, which a model with "
            "config.loss.mean_flow doesn't learn; begin at 0"
        )
    low, high = sample.guidance_interval
    if low > 0.5 or high < 0.5:
        raise UserError(
            f"config.sample.guidance_interval={(low, high)} is outside of what a model with config.loss.mean_flow "
            "learns: begin at 0.5 or earlier, and end at 0.5 or later"
        )

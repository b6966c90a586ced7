"""Checks what a caller of `Model` asks for (what to draw, and how) before anything compiles."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax import config as config_lib
from deco_jax.conditioning import requests as requests_lib
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import Requests
from deco_jax.conditioning.texts import Texts
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.sampling.guidance import Guidance
from deco_jax.sampling.settings import Sampling


class Settings(TypedDict, total=False):
    """How images are drawn; anything left out is taken from config.sample of the run.

    negative_prompt: what guidance leads away from, text to image only.
    guidance: the scale, at least 0 (1: none), or a guidance rule.
    guidance_interval: (low, high), the times within 0..1 at which guidance acts; low = -1: from the first step on.
    guidance_times: "step" or "evaluation", whose time decides.
    guidance_rule: "plain" or "zero_star".
    guidance_rescale: share of the guided velocity that gets the conditional one's spread, from 0 to 1.
    guidance_model: run or checkpoint of a weaker model that guidance leads away from (autoguidance).
    guidance_average: the weaker model's average of the weights, or one of this run's.
    num_steps: number of sampling steps, at least 1.
    sampler: a name in `sampling.samplers.SAMPLERS`, such as "euler", "heun", "adams2" or "sde".
    shift: of the sampling times, above 0; a larger shift spends more steps near the noise.
    seed: of the noise, at least 0.
    size: one side or (height, width) in pixels, multiples of the model's patch size.
    noise: states to start from instead of the seed's noise, float32 [n, height, width, 3].
    """

    negative_prompt: str
    guidance: float | Guidance
    guidance_interval: Sequence[float]
    guidance_times: str
    guidance_rule: str
    guidance_rescale: float
    guidance_model: str | os.PathLike[str]
    guidance_average: str
    num_steps: int
    sampler: str
    shift: float
    seed: int
    size: int | Sequence[int]
    noise: np.ndarray


class Snapshot(NamedTuple):
    """The images after a step of a sampler.

    step: steps done, from 0 (the noise) to `num_steps` (the images).
    time: of the state, from 0 (noise) to 1 (images).
    images: the state as uint8 [n, height, width, 3].
    """

    step: int
    num_steps: int
    time: float
    images: np.ndarray


class Inputs:
    """Turns classes, prompts and settings into `Requests` and a `Sampling`, according to a model's config.

    Args:
        condition: classes or texts, if already open; otherwise it is opened when it is first needed.
        class_names: in the order of the labels, or None.
        sampling_of: makes a `Sampling` from a config, with the weaker model that it may name.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        condition: Condition | None,
        class_names: list[str] | None,
        sampling_of: Callable[[ml_collections.ConfigDict], Sampling],
    ) -> None:
        self.config, self.mesh, self.class_names = config, mesh, class_names
        self._given, self._sampling_of = condition, sampling_of

    @functools.cached_property
    def condition(self) -> Condition:
        """The condition, classes or texts. Opening texts reads a text encoder; UserError if its files are missing."""
        if self._given is not None:
            return self._given
        return open_condition(self.config, self.mesh, None, self.class_names)

    @functools.cached_property
    def frozen(self) -> Mapping[str, Any]:
        """The condition's arrays, such as a text encoder's weights, on the mesh."""
        return self.condition.load()

    def prepare(self, classes: Any, prompts: Any, context: Any, settings: Settings) -> tuple[Requests, Sampling]:
        """Return what to draw and how, from the arguments of `Model.sample`; UserError if they are invalid."""
        rest: dict[str, Any] = {**settings}
        noise, negative = rest.pop("noise", None), rest.pop("negative_prompt", None)
        if unknown := rest.keys() - Settings.__annotations__.keys():
            raise UserError(f"there is no setting {min(unknown)!r}; choose from {', '.join(Settings.__annotations__)}")
        sampling = self.sampling(**rest, negative_prompt=negative if self.config.model.text_width else None)
        requests = self.requests(classes, prompts, context, negative)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.shape != (requests.count, *sampling.size, 3):
                raise UserError(
                    f"the noise has shape {noise.shape}; {requests.count} images of {sampling.size[0]}×"
                    f"{sampling.size[1]} need {(requests.count, *sampling.size, 3)}"
                )
            requests = dataclasses.replace(requests, start=noise)
        return requests, sampling

    def sampling(
        self, guidance: float | Guidance | None = None, size: int | Sequence[int] | None = None, **given: Any
    ) -> Sampling:
        """Replace config.sample's settings by the given ones, and check them like a config."""
        values = self.config.to_dict()
        rule = guidance if isinstance(guidance, Guidance) else None
        given["guidance"] = None if rule else guidance
        values["sample"] |= {name: _plain(value) for name, value in given.items() if value is not None}
        if size is not None:
            sides = _plain(size)
            if not isinstance(sides, (int, tuple)):
                raise UserError(f"size={size} must be one side or (height, width), in whole pixels")
            values["data"]["image_size"] = image_sides(sides)
        config = config_lib.make_config(values)
        config_lib.check(config)
        config_lib.settle_paths(config)
        if rule is None:
            return self._sampling_of(config)
        if config.model.mean_velocity:
            raise UserError("this model learnt its guidance (config.loss.mean_flow); give guidance as a number")
        for name in ("rule", "rescale", "times"):
            if given.get(f"guidance_{name}") is not None:
                raise UserError(f"guidance is a rule here, which has its own numbers; leave out guidance_{name}")
        sampling = self._sampling_of(config) if rule.weaker is None else Sampling.of(config)
        rule = rule if rule.weaker else dataclasses.replace(rule, weaker=sampling.guidance.weaker)
        if given.get("guidance_interval") is not None:
            rule = dataclasses.replace(rule, interval=sampling.guidance.interval)
        return dataclasses.replace(sampling, guidance=rule)

    def requests(self, classes: Any, prompts: Any, context: Any, negative_prompt: str | None) -> Requests:
        """Return what to draw; exactly one of classes, prompts and context must be given, the one the model takes."""
        ways = {"classes": classes, "prompts": prompts, "context": context}
        given = [name for name, value in ways.items() if value is not None]
        wanted = "prompts" if self.config.model.text_width else "classes"
        if len(given) != 1 or given[0] not in (wanted, "context"):
            raise UserError(
                f"this model draws {wanted}; give {wanted}=..." + (f", not {' and '.join(given)}" if given else "")
            )
        if negative_prompt and wanted == "classes":
            raise UserError("a negative prompt is for text-to-image models; this one draws classes")
        if context is not None:
            context = self._checked(np.asarray(context))
            return Requests(len(context), context.__getitem__, self._null(negative_prompt))
        if wanted == "prompts":
            texts = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
            if not texts or not all(text.strip() for text in texts):
                raise UserError("a prompt is empty; write what the image should show")
            assert isinstance(self.condition, Texts)
            negative = self.config.sample.negative_prompt if negative_prompt is None else negative_prompt
            return requests_lib.prompt_requests(self.condition, [text.strip() for text in texts], negative, self.frozen)
        labels = requests_lib.find_classes(classes, self.config.model.num_classes, self.class_names)
        if not labels:
            raise UserError("no classes are given; classes=[0] draws one image of the first class")
        return requests_lib.class_requests(labels, self.config.model.num_classes)

    def _checked(self, context: Any) -> Any:
        """Return labels or text features if they are some of this model's; UserError otherwise."""
        model = self.config.model
        shape = (model.text_length, model.text_width) if model.text_width else ()
        if not context.size or context.ndim != 1 + len(shape) or context.shape[1:] != shape:
            wanted = f"features [n, {shape[0]}, {shape[1]}]" if shape else "labels [n]"
            raise UserError(f"the context has shape {context.shape}; give {wanted}, with n at least 1")
        inside = context.dtype.kind in "iu" and np.all((context >= 0) & (context <= model.num_classes))
        if not shape and not inside:
            raise UserError(
                f"the context has other labels than 0 to {model.num_classes} (no class); give some of these"
            )
        return context

    def _null(self, negative_prompt: str | None) -> np.ndarray:
        if not self.config.model.text_width:
            return np.asarray(self.config.model.num_classes, np.int32)
        assert isinstance(self.condition, Texts)
        negative = self.config.sample.negative_prompt if negative_prompt is None else negative_prompt
        return requests_lib.prompt_requests(self.condition, [""], negative, self.frozen).null

    def context(self, condition: Any, count: int) -> Any:
        """Turn classes or prompts into labels int32 [count], or text features [count, length, text_width].

        Labels in an array may be num_classes, no class, and a prompt may be empty.
        """
        text = bool(self.config.model.text_width)
        is_array = isinstance(condition, (jax.Array, np.ndarray)) and condition.dtype.kind not in "US"
        if is_array and (condition.ndim == 3 if text else condition.ndim == 1):
            traced = isinstance(condition, jax.core.Tracer)
            context: Any = condition if text or traced else np.asarray(condition)
            if text or not traced:
                self._checked(context)
        elif text:
            prompts = [condition] if isinstance(condition, str) else [str(prompt) for prompt in condition]
            assert isinstance(self.condition, Texts)
            asked = requests_lib.prompt_requests(self.condition, [text.strip() for text in prompts], "", self.frozen)
            context = asked.context(np.arange(len(prompts)))
        else:
            context = np.asarray(requests_lib.find_classes(condition, self.config.model.num_classes, self.class_names))
        if len(context) == 1 and count > 1:
            context = np.broadcast_to(context, (count, *context.shape[1:]))
        if len(context) != count:
            raise UserError(f"{len(context)} conditions for {count} states; give one, or one for each state")
        return context if text else context.astype(np.int32)


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python's, which the config's checks know, and paths to text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value

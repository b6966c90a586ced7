"""The optimizer: AdamW as in the paper, or Muon; clipping, and learning-rate schedules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, MuonState

from deco_jax.errors import UserError
from deco_jax.method import lora

Schedule = Callable[[Any], Any]  # steps done → value


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Build the optimizer of config.optimizer: clip by global norm (0: off), then AdamW or Muon.

    Weight decay applies to every parameter, as torch.optim.AdamW does by default. The state's structure only depends on
    config.optimizer.name, so a run can be resumed with other settings.

    Raises:
        UserError: config.optimizer.stages can't be read.
    """
    config = _completed(config)
    stages = parse_stages(config.stages)
    rate = learning_rate(config)
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    if config.name == "muon":
        step = _without_coefficients(
            optax.contrib.muon(
                rate,
                beta=config.muon_momentum,
                eps=config.eps,
                weight_decay=config.weight_decay,
                adam_b1=config.b1,
                adam_b2=config.b2,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=matrices,
            )
        )
    else:
        step = optax.adamw(rate, **moments, weight_decay=config.weight_decay)
    if all(clip is None for *_, clip in stages):
        return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), step)
    limits = [config.clip_norm, *(config.clip_norm if clip is None else clip for *_, clip in stages)]
    return _clipped_by_stage(step, limits, [start for start, *_ in stages])


def learning_rate(config: ml_collections.ConfigDict) -> Schedule:
    """Build the learning rate as a function of the steps done.

    It rises linearly over warmup_steps and then stays constant; with schedule cosine or linear, it falls to
    final_learning_rate from step decay_start to decay_end. From the step of a stage on, that stage's rate applies.
    """
    config = _completed(config)
    peak, final = config.learning_rate, config.final_learning_rate
    start, length = config.decay_start, max(1, config.decay_end - config.decay_start)
    stages = parse_stages(config.stages)

    def rate(count: Any) -> Array:
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - start) / length, 0.0, 1.0)
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[config.schedule]
        # The first step already moves: (i + 1) / warmup.
        warmed = jnp.minimum(1.0, (count + 1) / max(1, config.warmup_steps))
        value = warmed * (final + (peak - final) * share)
        for step, stage_rate, _ in stages:
            value = jnp.where(count >= step, stage_rate, value)
        return value

    return rate


def updates_done(state: Any) -> Any:
    """Return an optimizer state's number of updates, by which schedules go.

    It differs from the run's step after a step that wasn't finite, and in a run that continues imported weights, which
    warms up again because they come without moments.
    """
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _completed(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fill in the paper's values for missing settings, so that AdamW's own are enough."""
    paper = {
        "name": "adamw",
        "schedule": "constant",
        "stages": "",
        "decay_start": 0,
        "decay_end": 0,
        "final_learning_rate": 0.0,
    }
    return ml_collections.ConfigDict({**paper, **config.to_dict()})


def parse_stages(stages: str) -> list[tuple[int, float, float | None]]:
    """Parse config.optimizer.stages: (first step, learning rate, clip norm or None for the general one), ascending.

    Raises:
        UserError: an entry can't be read, or the steps don't ascend.
    """
    number = r"\d*\.?\d+(?:e[-+]?\d+)?"
    found: list[tuple[int, float, float | None]] = []
    for entry in filter(None, (part.strip() for part in stages.split(","))):
        match = re.fullmatch(rf"(\d+):({number})(?::({number}))?", entry)
        if not match or (found and int(match[1]) <= found[-1][0]):
            raise UserError(
                f"config.optimizer.stages: {entry!r} is not a stage; write STEP:LEARNING_RATE or "
                "STEP:LEARNING_RATE:CLIP_NORM, with ascending steps, such as 800000:1e-5:0.5"
            )
        found.append((int(match[1]), float(match[2]), None if match[3] is None else float(match[3])))
    return found


def matrices(params: Any) -> Any:
    """Return which parameters Muon orthogonalises: matrices, by their last two axes (each block of a stack separately).

    Matrices are kernels and LoRA's factors. Embeddings and vectors get None and use AdamW, with optax's Nesterov
    momentum.
    """

    def axes(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
        is_matrix = getattr(path[-1], "key", None) in ("kernel", lora.A, lora.B)
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _without_coefficients(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the coefficients of Muon's iteration, which are constants, out of its state and so out of checkpoints."""

    def replaced(state: Any, coefficients: Any) -> Any:
        def replace(node: Any) -> Any:
            return node._replace(ns_coeffs=coefficients) if isinstance(node, MuonState) else node

        return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, MuonState))

    def init(params: Any) -> Any:
        return replaced(muon.init(params), ())

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        coefficients = optax.contrib.scale_by_muon().init({}).ns_coeffs
        updates, state = muon.update(gradients, replaced(state, coefficients), params)
        return updates, replaced(state, ())

    return optax.GradientTransformation(init, update)


def _clipped_by_stage(
    step: optax.GradientTransformation, limits: list[float], starts: list[int]
) -> optax.GradientTransformation:
    """Clip by the stage's limit; the state is that of `optax.chain(clip, step)`, which also provides the step count."""

    def init(params: Any) -> Any:
        return (optax.EmptyState(), step.init(params))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, inner = state
        count = updates_done(inner)
        limit = jnp.asarray(limits)[jnp.sum(count >= jnp.asarray(starts))]
        norm = optax.tree.norm(gradients)
        scale = jnp.where((limit > 0) & (norm > limit), limit / norm, 1.0)
        gradients, inner = step.update(jax.tree.map(lambda g: g * scale, gradients), inner, params)
        return gradients, (optax.EmptyState(), inner)

    return optax.GradientTransformation(init, update)

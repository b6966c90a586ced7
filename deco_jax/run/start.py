"""The weights that a new run starts from: config.init_from."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from deco_jax.method.averages import EMA
from deco_jax.models.network import build
from deco_jax.run import checkpoint
from deco_jax.run.state import State


def start_from(config: ml_collections.ConfigDict, state: State, mesh: Mesh) -> State:
    """Return a new run's state with the weights of config.init_from, its averages and, if asked, its moments.

    Averages that the checkpoint lacks start from its "ema". A label table for another number of classes stays newly
    initialised. So does what MeanFlow adds to a model that learnt the velocity, except the second head, which starts as
    a copy of the first.
    """
    where = checkpoint.find(config.init_from)
    like = as_stored(where, config)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state["params"])
    anew = like.model.num_classes != config.model.num_classes
    shapes = {**shapes, "denoiser": build(like.model.to_dict()).shapes}
    params = checkpoint.load_params(where, shapes, like, mesh)
    there = checkpoint.average_names(where)
    averages = {
        name: checkpoint.load_average(where, shapes["denoiser"], like, mesh, name if name in there else EMA)
        for name in state["averages"]
    }
    if anew:
        params["denoiser"]["label_embed"] = state["params"]["denoiser"]["label_embed"]
        for name, average in averages.items():
            average["label_embed"] = state["averages"][name]["label_embed"]
    params["denoiser"] = completed(params["denoiser"], state["params"]["denoiser"])
    averages = {name: completed(average, state["averages"][name]) for name, average in averages.items()}
    started = {**state, "params": params, "averages": averages}
    if config.init_optimizer:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state["opt_state"]
        )
        started["opt_state"] = checkpoint.load_optimizer(where, shapes)
    return started


def completed(params: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return `params`, with missing ones taken from `fresh`; a second head, velocity_NAME, copies the first."""
    there = dict(params)
    for name, new in fresh.items():
        if name not in there:
            first = params.get(name.removeprefix("velocity_"))
            there[name] = new if first is None else jax.tree.map(jnp.copy, first)
    return there


def as_stored(where: pathlib.Path, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config as the checkpoint was trained: with its number of classes, and without MeanFlow if it lacks it.

    The number of classes stays unchanged if either of them is a text-to-image model.
    """
    there = checkpoint.num_classes(where)
    like = config.copy_and_resolve_references()
    like.model.mean_velocity &= checkpoint.load_config(where)["model"].get("mean_velocity", False)
    if there and config.model.num_classes:
        like.model.num_classes = there
    return like

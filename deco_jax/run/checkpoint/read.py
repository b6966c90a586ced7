"""Reads weights, averages and the training state from a checkpoint onto any mesh."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from jax.sharding import Mesh

from deco_jax.errors import UserError
from deco_jax.method.averages import EMA
from deco_jax.method.lora import adapter_of
from deco_jax.run import checksums, distributed, orbax_s3
from deco_jax.run.checkpoint.base import read_merged
from deco_jax.run.checkpoint.folder import (
    MEASURED_ITEM,
    average_item,
    average_names,
    check_model,
    check_projector,
    has_projector,
    load_config,
    readable,
)
from deco_jax.run.sharding import replicated, state_shardings
from deco_jax.run.state import State


def load_average(
    path: pathlib.Path, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh, name: str | None = None
) -> Any:
    """Load an average of the weights in a checkpoint onto the mesh.

    Args:
        name: of the average; None: config.sample.average.

    Raises:
        UserError: the checkpoint has no such average, belongs to another model, or is damaged.
    """
    name = config.sample.average if name is None else name
    if name not in average_names(path):
        raise UserError(
            f"{path} has no average {name!r} of the weights; choose --config.sample.average from "
            + ", ".join(average_names(path))
        )
    return _load(path, average_item(name), shapes, config, mesh)


def load_measured(path: pathlib.Path, shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Load what a run measured on its data, by name, whole on every device.

    Raises:
        UserError: the checkpoint lacks some of `shapes`, or is damaged.
    """
    if not shapes:
        return {}
    whole = replicated(mesh)
    with readable(path):
        distributed.on_every_host(lambda: checksums.check(path, *(f"{MEASURED_ITEM}{name}" for name in shapes)))
        found = _read_measured(
            path, {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for name, a in shapes.items()}
        )
    check_measured(path, found, shapes)
    return found


def check_measured(path: pathlib.Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise UserError if a checkpoint lacks something that its prediction depends on."""
    if lost := set(wanted) - set(found):
        raise UserError(f"the checkpoint {path} has no {MEASURED_ITEM}{min(lost)}; it is damaged: choose another")


def load_step(path: pathlib.Path) -> int:
    """Return the number of steps done when the checkpoint was written."""
    counter = jax.ShapeDtypeStruct((), np.int32, sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return int(_read(path / "counters", {"step": counter, "skipped": counter})["step"])


def load_params(path: pathlib.Path, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """Load the raw weights {"denoiser", "projector"} of a checkpoint onto the mesh; errors as for `load_average`.

    Args:
        shapes: of the networks to load; a projector that isn't among them is left out.
    """
    left_out: dict[str, Any] = {}
    if "projector" not in shapes and has_projector(path):
        with readable(path):
            left_out = {"projector": _stored_shapes(path / "params")["projector"]}
    found = _load(path, "params", {**shapes, **left_out}, config, mesh)
    return {name: tree for name, tree in found.items() if name not in left_out}


def load_optimizer(path: pathlib.Path, shapes: Any) -> Any:
    """Load optax's state from a checkpoint; zeros if it has none (imported weights).

    Args:
        shapes: of the state, with shardings.
    """
    with readable(path):
        distributed.on_every_host(lambda: checksums.check(path, "optimizer"))
        return _restore_optimizer(path, shapes)


def _load(path: pathlib.Path, item: str, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    with readable(path):
        _check(path, config, item)
        stored = load_config(path)
        if adapter_of(stored) is not None:
            if item != "params":
                return read_merged(path, shapes, stored, mesh, lambda placed: _read(path / item, placed))

            def denoiser(placed: Any) -> Any:
                return _read(path / item, {"denoiser": placed})["denoiser"]

            return {"denoiser": read_merged(path, shapes["denoiser"], stored, mesh, denoiser)}
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(mesh, shapes),
        )
        return _read(path / item, placed)


def load_state(path: pathlib.Path, shapes: State, config: ml_collections.ConfigDict) -> State:
    """Load the whole state of a checkpoint onto the mesh; errors as for `load_average` and `check_projector`.

    Args:
        shapes: of the state, with shardings (`state.state_shapes`).
    """
    with readable(path):
        return checked_state(path, shapes, config)


def checked_state(path: pathlib.Path, shapes: State, config: ml_collections.ConfigDict) -> State:
    _check(path, config)
    return _restore_state(path, shapes)


def _check(path: pathlib.Path, config: ml_collections.ConfigDict, *items: str) -> None:
    """Check a checkpoint, or some of its items, before Orbax reads it."""

    def check() -> None:
        check_model(path, config)
        if not items:
            check_projector(path, config)
        checksums.check(path, *items)

    distributed.on_every_host(check)


def _restore_state(path: pathlib.Path, shapes: State) -> State:
    counters = _read(path / "counters", {key: shapes[key] for key in ("step", "skipped")})
    state = {
        **counters,
        "params": _read(path / "params", shapes["params"]),
        "averages": _restore_averages(path, shapes["averages"]),
        "opt_state": _restore_optimizer(path, shapes["opt_state"]),
    }
    if "measured" in shapes:
        state["measured"] = _read_measured(path, shapes["measured"])
    return state


def _read_measured(path: pathlib.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    there = {name: shape for name, shape in shapes.items() if (path / f"{MEASURED_ITEM}{name}").is_dir()}
    return {name: _read(path / f"{MEASURED_ITEM}{name}", {"value": shape})["value"] for name, shape in there.items()}


def _restore_averages(path: pathlib.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    there = average_names(path)
    for name in shapes:
        if name not in there:
            logging.warning("%s has no average %r; it starts from %r", path, name, EMA)
    if left := [name for name in there if name not in shapes]:
        logging.warning(
            "%s has averages that config.optimizer.averages no longer names, so they are dropped: %s",
            path,
            ", ".join(left),
        )
    return {name: _read(path / average_item(name if name in there else EMA), tree) for name, tree in shapes.items()}


def _restore_optimizer(path: pathlib.Path, shapes: Any) -> Any:
    opt_shapes = serialization.to_state_dict(shapes)
    if (path / "optimizer").exists():
        stored = _read(path / "optimizer", without_empty(opt_shapes))
    elif _had_optimizer(path):
        raise LostOptimizerError("its optimizer state is missing")
    else:
        logging.warning("%s has no optimizer state (imported weights); its moments start at zero", path)
        stored = jax.tree.map(_zeros, without_empty(opt_shapes))
    return serialization.from_state_dict(shapes, _with_empty(opt_shapes, stored))


class LostOptimizerError(ValueError):
    """A checkpoint was written with an optimizer state and has none now."""


def _had_optimizer(path: pathlib.Path) -> bool:
    """Return whether Orbax's note of the checkpoint names an optimizer state; imported ones never had one."""
    try:
        return "optimizer" in json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, KeyError):
        return True


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def without_empty(tree: Any) -> Any:
    """Return nested dictionaries without empty ones, optax's stateless parts, which Orbax can't store."""
    if not isinstance(tree, dict):
        return tree
    pruned = {key: without_empty(value) for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if not (isinstance(value, dict) and not value)}


def _with_empty(like: Any, tree: Any) -> Any:
    """Undo `without_empty`."""
    if not isinstance(like, dict):
        return tree
    return {key: _with_empty(value, tree.get(key, {})) for key, value in like.items()}


def _stored_shapes(path: pathlib.Path) -> Any:
    """Return the shapes of an item's arrays as they are stored."""
    if orbax_s3.stands_for(path):
        orbax_s3.enable()
    with _reader() as reader:
        stored = reader.metadata(path).item_metadata.tree
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), stored)


def _read(path: pathlib.Path, shapes: Any) -> Any:
    if orbax_s3.stands_for(path):
        orbax_s3.enable()
    with _reader() as reader:
        return reader.restore(path, shapes)


def _reader() -> ocp.StandardCheckpointer:
    """Make a reader that doesn't wait for the other hosts: if reading fails on one, they couldn't agree on that."""
    here = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    )

"""Loads a `Model` from files: a run, a checkpoint, an exported folder, or an official .ckpt."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax import config as config_lib
from deco_jax.api.model import Model
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.config import saved
from deco_jax.convert import deco, infer, jit_files, torch_files
from deco_jax.data.sources import Source
from deco_jax.errors import NPZ_ERRORS, UserError
from deco_jax.run import checkpoint, fetch, hardware, sharding, storage
from deco_jax.sampling import generate

MEASURED = "measured.npz"  # in an exported folder: what a prediction goes by
CLASSES = "classes.json"  # in a run: the names of its classes, in the order of their labels


def load(
    path: str | os.PathLike[str], *, average: str = "ema", config: ml_collections.ConfigDict | None = None
) -> Model:
    """Open a model with its weights, on all devices of this machine.

    Args:
        path: a run's workdir (its newest checkpoint), the folder of a checkpoint, the folder that --mode=export wrote,
            or an official .ckpt file (JiT: .pth).
        average: which average of the weights, by its name in config.optimizer.averages; for a .ckpt "ema" or "raw", for
            a .pth also "second".
        config: only for a .ckpt file, which has no config: the one it belongs to. By default, the architecture is
            inferred from the tensors' shapes, the image size is 256, and everything else is at its default.

    Raises:
        UserError: there is nothing of that kind at `path`, it is damaged, or it has no such average.

    Examples:
        >>> model = deco_jax.load("runs/quickstart")
        >>> images = model.sample(classes=7, num_steps=40)
    """
    path = storage.path(os.path.expanduser(path))
    mesh = sharding.make_mesh(-1, 1)
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path} is one average of an exported model; give its folder, {path.parent}")
    if path.is_file():
        return _load_official(path, average, config, mesh)
    if config is not None:
        raise UserError(f"{path} has its own config; leave out config=, which is for official .ckpt files")
    if list(path.glob("*.safetensors")) and not (path / checkpoint.FOLDER).is_dir():
        return _load_exported(path, average, mesh)
    where = checkpoint.find(str(path))
    stored = config_lib.make_config(saved.known(checkpoint.load_config(where), where))
    return _load_checkpoint(where, stored, average, mesh)


def open_model(
    config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "", source: Source | None = None
) -> Model:
    """Open the model of a run with a config's mesh, compute dtype and settings.

    Args:
        checkpoint_path: a checkpoint, or another run's newest, instead of the workdir's newest.
        source: the data, if its captions are to be drawn.

    Raises:
        UserError: there is no checkpoint, it belongs to another model, or the condition's files are missing.
    """
    where = checkpoint.find(workdir, checkpoint_path, config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    condition = open_condition(config, mesh, source, class_names(where))
    return _load_checkpoint(where, config, config.sample.average, mesh, condition)


def _for_this_machine(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return a config with an attention that this machine has; all of them compute the same."""
    model = config.model
    if model.attention != "cudnn" or hardware.has_cudnn_attention(model.width // model.num_heads):
        return config
    changed = config.copy_and_resolve_references()
    changed.model.attention = "auto"
    return changed


def class_names(where: pathlib.Path) -> list[str] | None:
    """Read the class names that a checkpoint's run, or an exported folder, stored; None if it didn't."""
    for folder in (where, where.parent.parent):
        if (folder / CLASSES).is_file():
            try:
                return [str(name) for name in json.loads((folder / CLASSES).read_text())]
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{folder / CLASSES} can't be read ({error}); remove it to go on without names"
                ) from error
    return None


def _load_checkpoint(
    where: pathlib.Path, config: ml_collections.ConfigDict, average: str, mesh: Mesh, condition: Condition | None = None
) -> Model:
    config = _for_this_machine(config)
    denoiser = generate.make_denoiser(config)
    params = checkpoint.load_average(where, denoiser.network.shapes, config, mesh, average)
    denoiser = denoiser.given(checkpoint.load_measured(where, denoiser.prediction.measured, mesh))
    return Model(config, params, mesh, str(where), condition, class_names(where), denoiser)


def _load_exported(folder: pathlib.Path, average: str, mesh: Mesh) -> Model:
    weights = folder / f"{average}.safetensors"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json beside its weights; export it again")
    if not weights.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors")))
        raise UserError(f"{folder} has no average {average!r}; it has {there}")
    try:
        values = config_lib.complete(json.loads((folder / "config.json").read_text()))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} can't be read ({error}); export it again") from error
    config = config_lib.make_config(saved.known(values, folder / "config.json"))
    tensors, measured = torch_files.read_safetensors(fetch.local(weights)), {}
    if (folder / MEASURED).is_file():
        try:
            with np.load(fetch.local(folder / MEASURED)) as file:
                measured = dict(file)
        except NPZ_ERRORS as error:
            raise UserError(f"{folder / MEASURED} can't be read ({error}); export it again") from error
    return _of_tensors(weights, tensors, config, mesh, class_names(folder), measured)


def _load_official(path: pathlib.Path, average: str, config: ml_collections.ConfigDict | None, mesh: Mesh) -> Model:
    file = jit_files.read_official(fetch.local(path))
    found = {"ema": file.ema, "raw": file.denoiser, "second": file.second_ema}
    if not found.get(average):
        raise UserError(
            f"{path} has no average {average!r}; it has {', '.join(name for name, a in found.items() if a)}"
        )
    if config is None:
        config = config_lib.make_config({"model": infer.model_of(found[average], str(path))})
    return _of_tensors(path, found[average], config, mesh)


def _of_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    names: Sequence[str] | None = None,
    measured: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Make a model from tensors under their official names, and from what its prediction depends on."""
    config = _for_this_machine(config)
    denoiser = generate.make_denoiser(config)
    if lost := set(denoiser.prediction.measured) - set(measured or {}):
        raise UserError(f"{path.parent} has no {min(lost)} in {MEASURED}; export it again")
    denoiser = denoiser.given(measured or {})
    shapes = sharding.placed_shapes(mesh, {"params": denoiser.network.shapes})["params"]
    arrays = deco.from_torch(config.model, tensors, like=denoiser.network.shapes, what=str(path))
    params = jax.tree.map(lambda a, leaf: jax.device_put(np.asarray(a, leaf.dtype), leaf.sharding), arrays, shapes)
    return Model(config, params, mesh, str(path), class_names=names, denoiser=denoiser)

"""--mode=import and --mode=export: converts the official code's checkpoints to ours, and back.

Arrays stay on the host: nothing here needs an accelerator, and files are read tensor by tensor.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import ml_collections
import numpy as np

from deco_jax import api
from deco_jax.config import make_config, to_json
from deco_jax.convert import deco, jit_files, torch_files
from deco_jax.data import imagenet
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.method.averages import EMA, parse_averages
from deco_jax.method.losses.repa import projector_of
from deco_jax.method.predictions import make_prediction
from deco_jax.models import network
from deco_jax.run import checkpoint, fetch, files, sharding, storage
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json

IMAGENET_CLASSES = 1000


def import_checkpoint(config: ml_collections.ConfigDict, workdir: str, source: str) -> None:
    """Make WORKDIR a run that continues from an official checkpoint; every other mode accepts it.

    Args:
        source: a Lightning `.ckpt` of DeCo or PixelGen with `denoiser.*`, `ema_denoiser.*` and, for REPA,
            `diffusion_trainer.proj.*`, or a `.pth` of JiT's code. If one of the two denoisers is missing, the other
            one is used for both.

    Raises:
        UserError: the file can't be read, belongs to another model, or the workdir already holds a run.
    """
    if not source:
        raise UserError("--mode=import needs --source=FILE, the checkpoint to import: a .ckpt, or JiT's .pth")
    if checkpoint.complete_steps(workdir):
        raise UserError(f"--workdir={workdir} already has checkpoints; choose an empty folder for the imported one")
    if config.lora.rank:
        raise UserError(
            "an official checkpoint has whole weights, but config.lora.rank stores what adapts others; import it with "
            "--config.lora.rank=0, and give that run as config.init_from"
        )
    if source.endswith(".safetensors"):
        raise UserError(
            f"--source={source}: --mode=import reads .ckpt and .pth; deco_jax.load opens an exported folder"
        )
    prediction = make_prediction(config)
    if prediction.measured:
        raise UserError(
            f"config.model.prediction={config.model.prediction} depends on measurements of the data, which official "
            "checkpoints don't have; import with the prediction that the file was trained with"
        )
    file = jit_files.read_official(fetch.local(source))
    for tensors in (file.denoiser, file.ema, file.second_ema):
        deco.check_fixed(config.model, image_sides(config.data.image_size), tensors, source)
    like = network.build(config.model.to_dict()).shapes
    # Read twice, one parameter at a time: first to check all of them, then to write them.
    denoiser, average = (
        deco.unread(config.model, tensors, like=like, dtype=np.float32, what=source)
        for tensors in (file.denoiser or file.ema, file.ema or file.denoiser)
    )
    for leaf in jax.tree.leaves([denoiser, *([average] if file.denoiser and file.ema else [])]):
        leaf.read()
    params: dict[str, Any] = {"denoiser": denoiser}
    averages: dict[str, Any] = {EMA: average}
    if file.second_ema:
        others = [name for name in parse_averages(config.optimizer.ema_decay, config.optimizer.averages) if name != EMA]
        if others:
            averages[others[0]] = deco.from_torch(
                config.model, file.second_ema, like=like, dtype=np.float32, what=source
            )
        print(
            f"the second average of {source} is "
            + (f"called {others[0]!r} here" if others else "left out because config.optimizer.averages is empty"),
            flush=True,
        )
    if config.loss.repa_weight:
        if not file.projector:
            raise UserError(f"{source} has no REPA projector; import it with --config.loss.repa_weight=0")
        if why := _no_official_projector(config):
            raise UserError(f"{source} can't be imported with this projector: {why}; import with repa_weight=0 instead")
        shapes = projector_of(config).shapes
        params["projector"] = deco.projector_from_torch(file.projector, like=shapes, dtype=np.float32, what=source)
    elif file.projector:
        print(f"{source} has a REPA projector, which is left out because config.loss.repa_weight=0", flush=True)

    folder = storage.path(workdir)
    make_workdir(folder)
    state = {"step": np.int32(file.step), "skipped": np.int32(0), "params": params, "averages": averages}
    checkpoints = checkpoint.Checkpoints(folder, config.train.keep_checkpoints, copy=False)
    try:
        with contextlib.closing(checkpoints):
            checkpoints.save(file.step, state, config)
            checkpoints.wait()
    except BaseException:
        checkpoints.remove_unfinished()
        raise
    write_json(folder / "config.json", to_json(config))
    if config.model.num_classes == IMAGENET_CLASSES:
        write_json(folder / "classes.json", imagenet.class_names())
    moments = "PyTorch's optimizer state in it is not imported" if file.has_optimizer else "it has no optimizer state"
    print(f"imported {source}: step {file.step}, in {folder}; {moments}, so training continues with zero moments")


def export_checkpoint(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write a checkpoint in the official layout, and each average of its weights as safetensors.

    The files are WORKDIR/export/{deco.ckpt, ema.safetensors and one for each other average, config.json, classes.json}.
    Names in the safetensors files are the official ones, and deco.ckpt has config.sample.average as its EMA. A JiT with
    a bottleneck is JiT's, not PixelGen's, so it is written as checkpoint-last.pth instead, with another average as its
    second EMA. classes.json is there if the run knows the names of its classes.

    Raises:
        UserError: there is no checkpoint, or it belongs to another model.
    """
    where = checkpoint.find(workdir, checkpoint_path)
    stored = checkpoint.load_config(where)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    denoiser = network.build(config.model.to_dict())
    shapes: dict[str, Any] = {"denoiser": denoiser.shapes}
    if stored["loss"]["repa_weight"]:
        theirs = make_config(stored)
        shapes["projector"] = projector_of(theirs).shapes
    folder = storage.path(workdir) / "export"
    step = checkpoint.load_step(where)

    def read(name: str) -> dict[str, np.ndarray]:
        # Only one network is in memory at a time, without the parameters that are already converted.
        params = checkpoint.load_average(where, denoiser.shapes, config, mesh, name)
        return deco.to_torch(config.model, params, consume=True)

    chosen = config.sample.average
    ema = read(chosen)
    make_workdir(folder)
    torch_files.write_safetensors(folder / f"{chosen}.safetensors", ema, {"step": str(step)})
    others = [name for name in checkpoint.average_names(where) if name != chosen]
    for name in others:
        torch_files.write_safetensors(folder / f"{name}.safetensors", read(name), {"step": str(step)})
    written = [f"{name}.safetensors" for name in (chosen, *others)]
    weights = ", ".join(written)
    stored["lora"]["rank"] = 0  # merged
    if names := make_prediction(config).measured:
        found = checkpoint.load_measured(where, names, mesh)
        arrays: dict[str, Any] = {name: np.asarray(a) for name, a in found.items()}
        # An open file: given a path, NumPy would add .npz to its name.
        with files.whole(folder / api.MEASURED) as part, part.open("wb") as file:
            np.savez(file, **arrays)
        written.append(api.MEASURED)
    write_json(folder / "config.json", stored)
    if class_names := api.class_names(where):
        write_json(folder / api.CLASSES, class_names)
        written.append(api.CLASSES)
    if why := _no_official_module(config.model):
        _remove_earlier(folder, written)
        print(f"exported {where} to {folder}: {weights}, config.json; no deco.ckpt: {why}")
        return
    params = checkpoint.load_params(where, shapes, config, mesh)
    if stored["loss"]["repa_weight"] and (why := _no_official_projector(theirs)):
        print(f"the projector is left out of deco.ckpt: {why}")
        del params["projector"]
    projector = deco.projector_to_torch(params.pop("projector")) if "projector" in params else {}
    fixed = deco.fixed(config.model, image_sides(config.data.image_size))
    raw = deco.to_torch(config.model, params.pop("denoiser"), consume=True) | fixed
    official = torch_files.Checkpoint(raw, ema | fixed, projector, step=step)
    if config.model.name == "jit" and config.model.bottleneck:
        official.second_ema = (read(others[0]) if others else ema) | fixed
        name = jit_files.FILE
        jit_files.write_jit(folder / name, official)
    else:
        name = "deco.ckpt"
        torch_files.write_lightning(folder / name, official)
    _remove_earlier(folder, [*written, name])
    print(f"exported {where} to {folder}: {name}, {weights}, config.json")


def _remove_earlier(folder: pathlib.Path, written: Collection[str]) -> None:
    """Remove what an earlier export left that this one hasn't written: it would look like a part of it."""
    kinds = {"deco.ckpt", jit_files.FILE, api.MEASURED, api.CLASSES}
    for path in [*folder.glob("*.safetensors"), *(folder / name for name in sorted(kinds))]:
        if path.name not in written and path.exists():
            path.unlink()
            print(f"removed {path} of an earlier export")


def _no_official_projector(config: ml_collections.ConfigDict) -> str:
    """Return why the official code has no such projector; "" if it has one."""
    loss = config.loss
    if loss.repa_projector != "mlp" or loss.repa_mask:
        return f"the official one is an mlp that sees all tokens, not {loss.repa_projector} with mask {loss.repa_mask}"
    return ""


def _no_official_module(model: ml_collections.ConfigDict) -> str:
    """Return why no module of the official code can hold the weights; "" if one can."""
    official_values: dict[str, Any] = {
        "decoder_patch_size": 1,
        "decoder_interaction": "adaln",
        "mean_velocity": False,
        "class_token": 0,
    }
    for setting, official in official_values.items():
        if model.get(setting, official) != official:
            return f"the official code has no model with config.model.{setting}={model[setting]}"
    if model.name != "jit" and model.context_tokens:
        return f"the official code has no model {model.name} with class tokens (config.model.context_tokens)"
    if model.prediction not in ("v", "x"):
        return f"the official code has no config.model.prediction={model.prediction}"
    return ""

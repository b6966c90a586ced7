"""Finds checkpoints and reads everything in their folders except weights: config, averages, which model they hold."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
import orbax.checkpoint as ocp

from deco_jax import config as config_lib
from deco_jax.errors import UserError
from deco_jax.method.averages import EMA
from deco_jax.run import storage

FOLDER = "checkpoints"
AVERAGE_ITEM = "average_"
MEASURED_ITEM = "measured_"
COMMITTED = "commit_success.txt"


def find(workdir: str, checkpoint: str = "", config: ml_collections.ConfigDict | None = None) -> pathlib.Path:
    """Find the checkpoint to read: `checkpoint` (a step's folder, or a run's newest), or else the workdir's newest.

    Raises:
        UserError: there is none, or it holds another model than `config`, if that is given.
    """
    where = storage.absolute(checkpoint or workdir)
    if (where / "ema").is_dir() and (where / "config").is_dir():
        path = where
    else:
        run = where.parent if where.name == FOLDER else where
        steps = complete_steps(run)
        if not steps:
            raise UserError(f"there is no checkpoint in {where}; train first, or name one with --checkpoint")
        path = run / FOLDER / str(steps[-1])
    if config is not None:
        with readable(path):
            check_model(path, config)
    return path


def complete_steps(workdir: str | pathlib.Path) -> list[int]:
    """Return the steps with a complete checkpoint, ascending.

    Orbax renames a finished one to its number; in a bucket, it writes COMMITTED last.
    """
    folder = storage.path(workdir) / FOLDER
    remote = storage.is_remote(folder)
    if not folder.is_dir():
        return []
    entries = [entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
    return sorted(int(entry.name) for entry in entries if not remote or (entry / COMMITTED).exists())


def written(path: pathlib.Path) -> str:
    """Return a text that differs between a checkpoint and a later one at the same path: Orbax's note, if any."""
    note = path / "_CHECKPOINT_METADATA"
    return note.read_text() if note.exists() else ""


def check_model(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raise UserError if a checkpoint holds another model than the config describes."""
    stored = load_config(path)
    differences = config_lib.model_differences(config.model.to_dict(), stored["model"])
    if config.model.text_width and "text" in stored and stored["text"]["encoder"] != config.text.encoder:
        differences.append(f"text.encoder: {stored['text']['encoder']} there, {config.text.encoder} here")
    if differences:
        raise UserError(
            f"{path} is a checkpoint of another model ({'; '.join(differences)}); "
            "use its config, or another --workdir or --checkpoint"
        )


def has_projector(path: pathlib.Path) -> bool:
    """Return whether a checkpoint was trained with REPA."""
    return bool(load_config(path)["loss"]["repa_weight"])


def check_projector(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raise UserError unless a checkpoint to continue from has the same REPA projector as the config, or both none."""
    stored = load_config(path)
    theirs, ours = stored["loss"]["repa_weight"], config.loss.repa_weight
    if bool(theirs) != bool(ours):
        raise UserError(
            f"{path} was trained {'with' if theirs else 'without'} REPA (config.loss.repa_weight={theirs}), but here "
            f"it is {ours}; a projector can only continue from a checkpoint with one: make both 0, or both positive"
        )
    if not ours:
        return
    for section, name in (("teacher", "name"), ("teacher", "size"), ("loss", "repa_projector")):
        theirs, here = stored[section][name], config[section][name]
        if theirs != here:
            raise UserError(
                f"{path} was trained with config.{section}.{name}={theirs}, but here it is {here}, which its projector "
                "doesn't fit; make them equal, or use another --workdir"
            )
    if bool(stored["loss"]["repa_mask"]) != bool(config.loss.repa_mask):
        raise UserError(
            f"{path} was trained with config.loss.repa_mask={stored['loss']['repa_mask']}, but here it is "
            f"{config.loss.repa_mask}; a projector only has a vector for hidden tokens if it is above 0: make both 0, "
            "or both positive, or use another --workdir"
        )


def load_config(path: pathlib.Path) -> dict[str, Any]:
    """Read the resolved config in a checkpoint, as plain values; settings of later versions get their defaults."""
    # Not with a Checkpointer, which waits for the other hosts, also for one that couldn't read the file.
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        return config_lib.complete(reader.restore(path / "config"))


def num_classes(path: pathlib.Path) -> int:
    """Return the number of classes of a checkpoint's model; 0 for text to image. UserError if it can't be read."""
    with readable(path):
        return int(load_config(path)["model"]["num_classes"])


def average_item(name: str) -> str:
    """Return the name of an average's part of a checkpoint; "ema" has kept the name of the first version."""
    return name if name == EMA else f"{AVERAGE_ITEM}{name}"


def average_names(path: pathlib.Path) -> list[str]:
    """Return the names of the averages in a checkpoint, "ema" first."""
    others = sorted(entry.name for entry in path.glob(f"{AVERAGE_ITEM}*") if entry.is_dir())
    return [EMA, *(name.removeprefix(AVERAGE_ITEM) for name in others)]


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
    """Turn any error while reading `path` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the checkpoint {path} can't be read: {first_line(error)}; choose another") from error


def first_line(error: BaseException) -> str:
    # TensorStore's chained messages end with the system's reason.
    if reason := re.search(r"([^:\[\]]+) \[os_error_code='\d+'", str(error)):
        return reason[1].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

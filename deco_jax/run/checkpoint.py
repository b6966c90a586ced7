"""Checkpoints by Orbax: written in the background, atomically; read back onto any mesh.

    workdir/checkpoints/STEP/{counters, params, ema, average_NAME for each other average, optimizer, config}

Sampling reads one average alone. A checkpoint imported from the official code has no `optimizer`. All of it is plain
dictionaries of arrays, readable without this package.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import logging as logging_lib
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization
from jax.sharding import Mesh

from deco_jax import config as config_lib
from deco_jax.errors import UserError
from deco_jax.method.averages import EMA
from deco_jax.run import checksums, distributed, lock, orbax_s3, storage
from deco_jax.run.sharding import state_shardings
from deco_jax.run.state import State

FOLDER = "checkpoints"
AVERAGE_ITEM = "average_"
COMMITTED = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one workdir, to write: from making it to `close`, no other process may.

    Args:
        keep: so many, the newest.
        keep_every: and those whose step is a multiple of this, for good; 0: no others.
        copy: host arrays before they are written in the background; False where nobody changes them meanwhile.

    Raises:
        UserError: another run is in the workdir.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int, copy: bool = True, keep_every: int = 0) -> None:
        _hush_orbax()
        storage.limit_checkpoint_retries()
        self.folder = storage.absolute(workdir) / FOLDER
        if orbax_s3.stands_for(self.folder):
            orbax_s3.enable()
        self._lock = lock.RunLock(self.folder.parent)
        # All hosts of a run share the first one's. Before Orbax, which removes what others have begun to write.
        distributed.on_main_host(self._lock.acquire)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._note_checksums),
            atomicity_options=orbax_s3.atomicity() if storage.is_remote(self.folder) else None,
        )
        self._writing = -1
        if not copy:
            ocp.type_handlers.register_type_handler(np.ndarray, _OneByOne(deepcopy_host_arrays=False), override=True)
        self._manager = ocp.CheckpointManager(_without_patterns(self.folder), options=options)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, config: ml_collections.ConfigDict) -> None:
        """Copy the state to the host and write it in the background; raises what the previous write ran into."""
        if step in self._manager.all_steps():
            return
        self._guarded(None, self._manager.wait_until_finished)  # as Orbax would: `_writing` is one at a time
        self._writing = step
        self._guarded(step, lambda: self._manager.save(step, args=_save_args(state, config)))

    def _note_checksums(self) -> None:
        """Called by Orbax in the background when all is written, before the folder gets its name or COMMITTED."""
        if jax.process_index() == 0:
            names = (str(self._writing), f"{self._writing}.orbax-checkpoint-tmp")
            for folder in self.folder.iterdir():
                if folder.name == names[0] or folder.name.startswith(names[1]):
                    checksums.write(folder)

    def wait(self) -> None:
        """Until the last write is complete."""
        self._guarded(None, self._manager.wait_until_finished)

    def _guarded(self, step: int | None, action: Any) -> None:
        try:
            action()
            self._manager.check_for_errors()
        except Exception as error:  # Orbax and TensorStore raise many kinds, from their own threads
            what = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before)"
            kept = complete_steps(self.folder.parent)
            rest = f"step {kept[-1]} is intact and the run resumes from it" if kept else "none is complete yet"
            raise UserError(
                f"writing {what} to {self.folder} failed: {_first_line(error)}; free space there; {rest}"
            ) from error

    def restore(self, shapes: State, config: ml_collections.ConfigDict) -> State | None:
        """The newest readable state, or None if there is none yet; those that can't be read are named and passed over.

        Args:
            shapes: of the state, with shardings (`train_state.state_shapes`).

        Raises:
            UserError: the checkpoint is another model's.
        """
        weights: pathlib.Path | None = None  # the newest that lacks its moments alone
        for step in reversed(self.steps()):
            path, state = self.folder / str(step), None
            try:
                state = _checked_state(path, shapes, config)
            except UserError:
                raise
            except Exception as error:
                weights = path if isinstance(error, LostOptimizerError) and weights is None else weights
                logging.error("the checkpoint %s is damaged and passed over: %s", path, _first_line(error))
            # Each host reads its own part: what one can't read, none may go on from.
            if distributed.all_hosts(state is not None):
                return state
        if self.steps():
            remedy = f", with --config.init_from={weights} for its weights" if weights else ""
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read (see above); put that right, or give another "
                f"--workdir to start anew{remedy}"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step` to STEP.damaged: the resumed run writes these steps again, and what one
        host could not read for a moment is not lost."""
        later = [s for s in self.steps() if s > step]

        def rename() -> None:
            for number in later:
                aside = self.folder / f"{number}.damaged"
                storage.remove_tree(aside)
                (self.folder / str(number)).rename(aside)
                logging.error("the checkpoint of step %s is kept as %s", number, aside)

        if later:
            distributed.on_main_host(rename)
            self._manager.reload()

    def close(self) -> None:
        self._manager.close()
        self._lock.release()


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes host arrays one after the other: all at once, their compressed copies need as much memory again."""

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for i, (value, info) in enumerate(zip(values, infos, strict=True)):
            await super()._background_serialize([value], [info], [args[i] if args else ocp.SaveArgs()])


def _without_patterns(folder: pathlib.Path) -> pathlib.Path:
    """A name of the folder that Orbax doesn't take for a pattern: it looks for what each host wrote with `glob`."""
    if storage.is_remote(folder) or glob.escape(str(folder)) == str(folder):
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]  # the same on every host
    link = pathlib.Path(tempfile.gettempdir()) / f"deco_jax_{os.getuid()}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or pathlib.Path(os.readlink(link)) != folder:
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    return link


def _save_args(state: State, config: ml_collections.ConfigDict) -> ocp.args.Composite:
    items = {
        "counters": {key: state[key] for key in ("step", "skipped")},
        "params": state["params"],
        **{_average_item(name): tree for name, tree in state["averages"].items()},
    }
    if "opt_state" in state:
        items["optimizer"] = _without_empty(serialization.to_state_dict(state["opt_state"]))
    return ocp.args.Composite(
        config=ocp.args.JsonSave(config_lib.to_json(config)),
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
    )


def _checked_state(path: pathlib.Path, shapes: State, config: ml_collections.ConfigDict) -> State:
    check_model(path, config)
    check_projector(path, config)
    checksums.check(path)
    return _restore_state(path, shapes)


def _restore_state(path: pathlib.Path, shapes: State) -> State:
    counters = _read(path / "counters", {key: shapes[key] for key in ("step", "skipped")})
    return {
        **counters,
        "params": _read(path / "params", shapes["params"]),
        "averages": _restore_averages(path, shapes["averages"]),
        "opt_state": _restore_optimizer(path, shapes["opt_state"]),
    }


def _average_item(name: str) -> str:
    """The name of an average's part of a checkpoint; that of "ema" is as old as checkpoints are."""
    return name if name == EMA else f"{AVERAGE_ITEM}{name}"


def average_names(path: pathlib.Path) -> list[str]:
    """The averages in a checkpoint, "ema" first."""
    others = sorted(entry.name for entry in path.glob(f"{AVERAGE_ITEM}*") if entry.is_dir())
    return [EMA, *(name.removeprefix(AVERAGE_ITEM) for name in others)]


def _restore_averages(path: pathlib.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    there = average_names(path)
    for name in shapes:
        if name not in there:
            logging.warning("%s has no average %r; it starts from %r", path, name, EMA)
    if left := [name for name in there if name not in shapes]:
        logging.warning(
            "%s has averages that config.optimizer.averages no longer names, and that end here: %s",
            path,
            ", ".join(left),
        )
    return {name: _read(path / _average_item(name if name in there else EMA), tree) for name, tree in shapes.items()}


def _restore_optimizer(path: pathlib.Path, shapes: Any) -> Any:
    opt_shapes = serialization.to_state_dict(shapes)
    if (path / "optimizer").exists():
        stored = _read(path / "optimizer", _without_empty(opt_shapes))
    elif _had_optimizer(path):
        raise LostOptimizerError("its optimizer state is missing")
    else:
        logging.warning("%s has no optimizer state (imported weights); its moments start at zero", path)
        stored = jax.tree.map(_zeros, _without_empty(opt_shapes))
    return serialization.from_state_dict(shapes, _with_empty(opt_shapes, stored))


class LostOptimizerError(ValueError):
    """A checkpoint was written with an optimizer state and has none now."""


def _had_optimizer(path: pathlib.Path) -> bool:
    """Whether Orbax's note of its writing names an optimizer state; imported checkpoints never had one."""
    try:
        return "optimizer" in json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, KeyError):
        return True


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def _without_empty(tree: Any) -> Any:
    """Nested dictionaries without empty ones: optax's stateless parts, which Orbax can't store."""
    if not isinstance(tree, dict):
        return tree
    pruned = {key: _without_empty(value) for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if not (isinstance(value, dict) and not value)}


def _with_empty(like: Any, tree: Any) -> Any:
    """Undo `_without_empty`."""
    if not isinstance(like, dict):
        return tree
    return {key: _with_empty(value, tree.get(key, {})) for key, value in like.items()}


def _read(path: pathlib.Path, shapes: Any) -> Any:
    if orbax_s3.stands_for(path):
        orbax_s3.enable()
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path, shapes)


def load_config(path: pathlib.Path) -> dict[str, Any]:
    """The resolved config in a checkpoint, as plain values; settings of later versions are at their defaults."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return config_lib.complete(reader.restore(path / "config"))


def num_classes(path: pathlib.Path) -> int:
    """How many classes the model of a checkpoint tells apart; 0 of text to image. UserError if it can't be read."""
    with _readable(path):
        return int(load_config(path)["model"]["num_classes"])


def load_state(path: pathlib.Path, shapes: State, config: ml_collections.ConfigDict) -> State:
    """All of a named checkpoint, on the mesh; errors as `load_average`, and those of `check_projector`.

    Args:
        shapes: of the state, with shardings (`train_state.state_shapes`).
    """
    with _readable(path):
        return _checked_state(path, shapes, config)


def find(workdir: str, checkpoint: str = "", config: ml_collections.ConfigDict | None = None) -> pathlib.Path:
    """The checkpoint to read: `checkpoint` (a step's folder, or a run's newest), else the workdir's newest.

    Raises:
        UserError: there is none; or it isn't of the model of `config`, if that is given.
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
        with _readable(path):
            check_model(path, config)
    return path


def complete_steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending.

    Orbax renames a finished one to its number; in a bucket it puts COMMITTED last.
    """
    folder = storage.path(workdir) / FOLDER
    remote = storage.is_remote(folder)
    if not folder.is_dir():
        return []
    entries = [entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
    return sorted(int(entry.name) for entry in entries if not remote or (entry / COMMITTED).exists())


def written(path: pathlib.Path) -> str:
    """What tells a checkpoint from a later one at the same path: Orbax's note of its writing, if there."""
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


def check_projector(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raise UserError unless a checkpoint to train on has REPA's projector just where, and as, the config has."""
    stored = load_config(path)
    theirs, ours = stored["loss"]["repa_weight"], config.loss.repa_weight
    if bool(theirs) != bool(ours):
        raise UserError(
            f"{path} was trained {'with' if theirs else 'without'} REPA (config.loss.repa_weight={theirs}) and here it "
            f"is {ours}; training goes on with a projector only from one: make both 0, or both above"
        )
    if ours and stored["teacher"]["size"] != config.teacher.size:
        raise UserError(
            f"{path} was trained with the teacher {stored['teacher']['size']} and here it is {config.teacher.size}, "
            "whose features the projector doesn't fit; use the same config.teacher.size, or another --workdir"
        )


def load_average(
    path: pathlib.Path, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh, name: str | None = None
) -> Any:
    """An average of the weights in a checkpoint, on the mesh.

    Args:
        name: of the average; None: config.sample.average.

    Raises:
        UserError: the checkpoint has no such average, is another model's, or damaged.
    """
    name = config.sample.average if name is None else name
    if name not in average_names(path):
        raise UserError(
            f"{path} has no average {name!r} of the weights; choose --config.sample.average from "
            + ", ".join(average_names(path))
        )
    return _load(path, _average_item(name), shapes, config, mesh)


def load_step(path: pathlib.Path) -> int:
    """Steps done when the checkpoint was written."""
    counter = jax.ShapeDtypeStruct((), np.int32, sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return int(_read(path / "counters", {"step": counter, "skipped": counter})["step"])


def load_params(path: pathlib.Path, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    """The raw weights {"denoiser", "projector"} of a checkpoint, on the mesh; errors as `load_average`."""
    return _load(path, "params", shapes, config, mesh)


def load_optimizer(path: pathlib.Path, shapes: Any) -> Any:
    """optax's state of a checkpoint; zeros where it has none (imported weights).

    Args:
        shapes: of the state, with shardings.
    """
    with _readable(path):
        checksums.check(path, "optimizer")
        return _restore_optimizer(path, shapes)


def _load(path: pathlib.Path, item: str, shapes: Any, config: ml_collections.ConfigDict, mesh: Mesh) -> Any:
    with _readable(path):
        check_model(path, config)
        checksums.check(path, item)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(mesh, shapes),
        )
        return _read(path / item, placed)


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Whatever reading `path` runs into, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the checkpoint {path} can't be read: {_first_line(error)}; choose another") from error


@functools.cache
def _hush_orbax() -> None:
    """Keep what Orbax logs, with a stack trace for each thread and array, out of sight: it raises all of that too.

    A failed write also leaves TensorStore with callbacks into an event loop that is closed; they say so one by one.
    """
    logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging_lib.getLogger("asyncio").setLevel(logging_lib.CRITICAL)

    def without_closed_loop(report: Any) -> Any:
        def hook(*details: Any) -> None:
            error = details[1] if len(details) > 1 else details[0].exc_value
            if str(error) != "Event loop is closed":
                report(*details)

        return hook

    sys.unraisablehook = without_closed_loop(sys.unraisablehook)
    sys.excepthook = without_closed_loop(sys.excepthook)


def _first_line(error: BaseException) -> str:
    # TensorStore's chains of messages end with the system's reason.
    if reason := re.search(r"([^:\[\]]+) \[os_error_code='\d+'", str(error)):
        return reason[1].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

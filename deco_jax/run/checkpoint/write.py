"""The checkpoints of a run: written in the background, kept, and found again when the run resumes."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization

from deco_jax import config as config_lib
from deco_jax.errors import UserError
from deco_jax.run import checksums, distributed, lock, orbax_s3, storage
from deco_jax.run.best import Best
from deco_jax.run.checkpoint.folder import FOLDER, MEASURED_ITEM, average_item, complete_steps, first_line
from deco_jax.run.checkpoint.orbax import Manager, OneByOne, hush_orbax, settle_failed_writes, without_patterns
from deco_jax.run.checkpoint.read import LostOptimizerError, checked_state, without_empty
from deco_jax.run.state import State

policies = ocp.checkpoint_managers.preservation_policy


class Checkpoints:
    """Writes the checkpoints of one workdir; until `close`, no other process may.

    Args:
        keep: number of newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this, for good; 0: no others.
        best: also keep the one with the best score.
        copy: copy host arrays before they are written in the background; False if nobody changes them meanwhile.

    Raises:
        UserError: another run is in the workdir.
    """

    def __init__(
        self, workdir: str | pathlib.Path, keep: int, copy: bool = True, keep_every: int = 0, best: Best | None = None
    ) -> None:
        hush_orbax()
        settle_failed_writes()
        storage.limit_checkpoint_retries()
        self.folder = storage.absolute(workdir) / FOLDER
        if orbax_s3.stands_for(self.folder):
            orbax_s3.enable()
        self._lock = lock.RunLock(self.folder.parent)
        # All hosts share the first one's lock. It is taken before Orbax starts, which removes others' unfinished
        # writes.
        distributed.on_main_host(self._lock.acquire)
        kept: list[Any] = [policies.LatestN(keep)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        kept += [best] if best else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._note_checksums),
            atomicity_options=orbax_s3.atomicity() if storage.is_remote(self.folder) else None,
        )
        self._writing = -1
        if not copy:
            ocp.type_handlers.register_type_handler(np.ndarray, OneByOne(deepcopy_host_arrays=False), override=True)
        self._manager = Manager(without_patterns(self.folder), options=options)

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, config: ml_collections.ConfigDict) -> None:
        """Copy the state to the host and write it in the background; raises the previous write's error, if any."""
        if step in self._manager.all_steps():
            return
        self._guarded(None, self._manager.wait_until_finished)  # as Orbax would: `_writing` holds one write at a time
        self._writing = step
        self._guarded(step, lambda: self._manager.save(step, args=_save_args(state, config)))

    def free(self, wait: float) -> bool:
        """Wait for at most this many seconds; return whether all hosts have finished writing."""
        end = time.monotonic() + wait
        while self._manager.is_saving_in_progress() and time.monotonic() < end:
            time.sleep(0.01)
        return distributed.all_hosts(not self._manager.is_saving_in_progress())

    def _note_checksums(self) -> None:
        """Store the checksums; Orbax calls this in the background before the folder gets its name or COMMITTED."""
        if jax.process_index() == 0:
            names = (str(self._writing), f"{self._writing}.orbax-checkpoint-tmp")
            for folder in self.folder.iterdir():
                if folder.name == names[0] or folder.name.startswith(names[1]):
                    checksums.write(folder)

    def wait(self) -> None:
        """Wait until the last write is complete."""
        self._guarded(None, self._manager.wait_until_finished)

    def _guarded(self, step: int | None, action: Any) -> None:
        try:
            action()
            self._manager.check_for_errors()
        except Exception as error:  # Orbax and TensorStore raise many kinds, from their own threads
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # another host is gone
            what = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before)"
            kept = complete_steps(self.folder.parent)
            rest = f"step {kept[-1]} is intact and the run resumes from it" if kept else "none is complete yet"
            raise UserError(
                f"writing {what} to {self.folder} failed: {first_line(error)}; free space there; {rest}"
            ) from error

    def restore(self, shapes: State, config: ml_collections.ConfigDict) -> State | None:
        """Return the newest readable state, or None if there is none yet; unreadable ones are named and skipped.

        Args:
            shapes: of the state, with shardings (`train_state.state_shapes`).

        Raises:
            UserError: the checkpoint is another model's.
        """
        weights: pathlib.Path | None = None  # the newest that only lacks its moments
        for step in reversed(self.steps()):
            path, state = self.folder / str(step), None
            try:
                state = checked_state(path, shapes, config)
            except (UserError, jax.errors.JaxRuntimeError):  # the latter: another host is gone, or memory is full
                raise
            except Exception as error:
                weights = path if isinstance(error, LostOptimizerError) and weights is None else weights
                logging.error("the checkpoint %s is damaged and passed over: %s", path, first_line(error))
            # Each host reads its own part; if one of them can't read a checkpoint, none may continue from it.
            if distributed.all_hosts(state is not None):
                return state
        if self.steps():
            remedy = f", with --config.init_from={weights} for its weights" if weights else ""
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read (see above); fix that, or give another "
                f"--workdir to start again{remedy}"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step` to STEP.damaged.

        The resumed run writes these steps again, and a checkpoint that one host only failed to read for a moment isn't
        lost.
        """
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

    def remove_unfinished(self) -> None:
        """Remove what a failed write has left; a resumed run does this when it starts."""
        # The first array that can't be written ends the write, but others may still be on their way to the folder.
        for _ in range(25):
            left = list(self.folder.glob("*.orbax-checkpoint-tmp*"))
            if not left:
                break
            for entry in left:
                storage.remove_tree(entry)
            time.sleep(0.2)

    def close(self) -> None:
        """Wait for the last write and release the folder; raises that write's error, if any."""
        try:
            self._guarded(None, self._manager.close)
        finally:
            self._lock.release()


def _save_args(state: State, config: ml_collections.ConfigDict) -> ocp.args.Composite:
    items = {
        "counters": {key: state[key] for key in ("step", "skipped")},
        "params": state["params"],
        **{average_item(name): tree for name, tree in state["averages"].items()},
        **{f"{MEASURED_ITEM}{name}": {"value": array} for name, array in state.get("measured", {}).items()},
    }
    if "opt_state" in state:
        items["optimizer"] = without_empty(serialization.to_state_dict(state["opt_state"]))
    return ocp.args.Composite(
        config=ocp.args.JsonSave(config_lib.to_json(config)),
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
    )

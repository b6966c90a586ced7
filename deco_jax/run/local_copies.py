"""Copies of the state on each host's own disk, from which a killed process continues if its machine is still there.

    FOLDER/RUN/process_I_of_N/STEP.npz

Each host writes what its own devices hold, in the background and without asking the others, which is cheap enough to do
often. A step is only restored if all hosts have it, in the layout that the run has now; otherwise the workdir's newest
checkpoint is used. RUN is a number of the run, stored in its workdir, so that a new run in an old folder finds no copy.

Orbax's emergency checkpoints aren't used: they need a whole copy of the state in each of several slices.
"""

from __future__ import annotations

import json
import pathlib
import threading
import uuid
import zipfile
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from deco_jax.config import to_json
from deco_jax.errors import UserError
from deco_jax.run import distributed, files, sharding, storage
from deco_jax.run.state import State
from deco_jax.run.writer import write_atomically

NOTE = "local_copies.json"  # in the workdir
KEPT = 2  # so that hosts that are killed at different moments have a step in common
_NOTE_KEY = "note"


class LocalCopies:
    """The copies that this process writes and reads.

    Args:
        folder: the workdir.

    Raises:
        UserError: config.train.local_copies is remote or can't be written.
    """

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
        name = config.train.local_copies
        if storage.is_remote(name):
            raise UserError(f"config.train.local_copies={name} must be a folder on the hosts' own disks")
        self._model = json.dumps(to_json(config)["model"], sort_keys=True)
        distributed.on_main_host(lambda: _number_run(folder))
        run = json.loads((folder / NOTE).read_text())["run"]
        process, count = jax.process_index(), jax.process_count()
        self.folder = pathlib.Path(name).expanduser() / run / f"process_{process}_of_{count}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"config.train.local_copies={name} can't be written: {error.strerror}; choose another folder"
            ) from error
        self._writer: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Return the steps of which this host has a copy, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.npz") if path.stem.isdigit())

    def save(self, step: int, state: State) -> bool:
        """Copy what this host's devices hold, to be written in the background; False if the last copy still is."""
        if self._writer is not None and self._writer.is_alive():
            return False
        leaves = [(sharding.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)]
        for _, leaf in leaves:
            leaf.copy_to_host_async()
        arrays = {}
        for name, leaf in leaves:
            for shard in leaf.addressable_shards:
                key = _key(name, shard.index, leaf.shape)
                if key not in arrays:
                    arrays[key] = np.array(shard.data)  # a copy, because the next step reuses the devices' memory
        # Not a daemon thread, so that a run that ends normally finishes writing.
        self._writer = threading.Thread(target=self._write, args=(step, arrays))
        self._writer.start()
        return True

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        note = json.dumps({"step": step, "model": self._model}).encode()
        # As bytes: NumPy's files don't know every type of JAX.
        members: dict[str, Any] = {key: array.reshape(-1).view(np.uint8) for key, array in arrays.items()}
        members[_NOTE_KEY] = np.frombuffer(note, np.uint8)
        try:
            with files.whole(self.folder / f"{step}.npz") as part, part.open("wb") as file:
                np.savez(file, **members)
            for old in self.steps()[:-KEPT]:
                (self.folder / f"{old}.npz").unlink(missing_ok=True)
        except OSError as error:
            logging.error("no copy of step %d in %s: %s", step, self.folder, error.strerror)

    def wait(self) -> None:
        """Wait until the last copy is written."""
        if self._writer is not None:
            self._writer.join()

    def restore(self, shapes: State, newer_than: int) -> State | None:
        """Return the newest state of which every host has a copy; None if there is none newer than a step.

        Args:
            shapes: of the state, with shardings.
        """
        for step in reversed(_common(self.steps())):
            if step <= newer_than:
                break
            state = None
            try:
                state = self._read(step, shapes)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logging.error("the copy of step %d in %s can't be used: %s", step, self.folder, error)
            if distributed.all_hosts(state is not None):
                logging.warning("continuing from the copies of step %d on the hosts' own disks", step)
                return state
        return None

    def _read(self, step: int, shapes: State) -> State:
        with np.load(self.folder / f"{step}.npz") as stored:  # checks the CRC of what it reads
            if json.loads(stored[_NOTE_KEY].tobytes())["model"] != self._model:
                raise ValueError("it belongs to another model")

            def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
                name, placed = sharding.path_name(path), shape.sharding
                assert placed is not None
                pieces, read = [], {}
                for device, index in placed.addressable_devices_indices_map(shape.shape).items():
                    key = _key(name, index, shape.shape)
                    if key not in read:
                        read[key] = stored[key].view(shape.dtype).reshape(placed.shard_shape(shape.shape))
                    pieces.append(jax.device_put(read[key], device))
                return jax.make_array_from_single_device_arrays(shape.shape, placed, pieces)

            return jax.tree_util.tree_map_with_path(leaf, shapes)

    def clear(self) -> None:
        """Remove this host's copies so far."""
        for step in self.steps():
            (self.folder / f"{step}.npz").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the copies of a run that has ended."""
        self.wait()
        storage.remove_tree(self.folder)


def _number_run(folder: pathlib.Path) -> None:
    if not (folder / NOTE).exists():
        write_atomically(folder / NOTE, json.dumps({"run": uuid.uuid4().hex}).encode())


def _key(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Return the name of a part of an array, such as "params/x/kernel|0:4,0:16"."""
    ranges = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return f"{name}|" + ",".join(f"{start}:{stop}" for start, stop in ranges)


def _common(steps: list[int]) -> list[int]:
    """Return the steps that all hosts have, ascending."""
    if jax.process_count() == 1:
        return steps
    ours = np.full(KEPT + 1, -1, np.int32)
    newest = steps[-len(ours) :]
    ours[: len(newest)] = newest
    theirs = multihost_utils.process_allgather(ours)
    return sorted(set.intersection(*(set(row.tolist()) for row in theirs)) - {-1})

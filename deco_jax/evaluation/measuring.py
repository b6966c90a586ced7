"""Reads a set of images once for all measurements, and continues where it was interrupted.

    images ─ batches ─┬─ Inception ─ Accumulator ─ FID, KID, …
                      ├─ DINOv2 ──── Rows ──────── FD-DINOv2
                      └─ …

Each reader keeps its measurements in a file, with a fingerprint of everything that they depend on. So an evaluator
finds them finished when it asks for them, and nothing is drawn twice.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from deco_jax.errors import NPZ_ERRORS, UserError
from deco_jax.evaluation.image_sets import ImageSet, rebatched
from deco_jax.evaluation.statistics import save_npz
from deco_jax.run import distributed, preemption, sharding, storage
from deco_jax.run.progress import Progress

FOLDER = "evaluation"  # in a run's folder, for its measurements
SECONDS_BETWEEN_LINES = 10.0


class State(Protocol):
    """Measurements of the first `count` images of a set."""

    fingerprint: str

    @property
    def count(self) -> int: ...

    def save(self, path: pathlib.Path) -> None: ...

    @classmethod
    def load(cls, path: pathlib.Path) -> State: ...


S = TypeVar("S", bound=State)


class Reader(Generic[S]):
    """Measures the images of a set as they arrive.

    Args:
        empty: the state before the first image; its fingerprint says what is measured, and how.
        add: (state, uint8 [n, height, width, 3], their indices in the set int [n]) → None; measures the next images.
        path: where the state is kept; None: nowhere.
        save_every: images between two saves.
    """

    def __init__(
        self,
        empty: S,
        add: Callable[[S, np.ndarray, np.ndarray], None],
        path: pathlib.Path | None,
        save_every: int = 5000,
    ) -> None:
        self.state = _load(empty, path) or empty
        self._add, self._path, self._save_every, self._saved = add, path, save_every, self.state.count

    @property
    def count(self) -> int:
        """Images so far."""
        return self.state.count

    def __call__(self, batch: np.ndarray, first: int, total: int) -> None:
        """Measure those images of a batch, which begins with image `first`, that aren't measured yet."""
        batch = batch[max(self.count - first, 0) :]
        if not len(batch):
            return
        self._add(self.state, batch, np.arange(self.count, self.count + len(batch)))
        done = self.count == total
        if self._path is not None and (done or self.count - self._saved >= self._save_every):
            if jax.process_index() == 0:
                self.state.save(self._path)
            self._saved = self.count


class Newest(Generic[S]):
    """Keeps the reader of the newest set: another host may not see yet what the first one wrote, so a new reader of it
    would start again."""

    def __init__(self) -> None:
        self._reader: Reader[S] | None = None

    def __call__(self, fingerprint: str, make: Callable[[], Reader[S]]) -> Reader[S]:
        """Return the kept reader if it measures what the fingerprint says; or else make it, and keep that."""
        if self._reader is None or self._reader.state.fingerprint != fingerprint:
            self._reader = make()
        return self._reader


def _load(empty: S, path: pathlib.Path | None) -> S | None:
    """Load earlier measurements of the same thing, if there are any; with several hosts, if all of them can read it."""
    state: Any = type(empty).load(path) if path is not None and path.exists() else None
    if state is not None and state.fingerprint != empty.fingerprint:
        state = None
    count = 0 if state is None else state.count
    return state if distributed.all_hosts(distributed.from_main_host(count) == count) else None


def read(images: ImageSet, readers: Sequence[Reader], batch_size: int, quiet: bool = False) -> None:
    """Let the readers measure the rest of a set, in batches of `batch_size` images; the last one may be smaller.

    Args:
        quiet: print nothing.
    """
    speaks = jax.process_index() == 0 and not quiet
    waiting = [reader for reader in dict.fromkeys(readers) if reader.count < images.total]
    first = min((reader.count for reader in waiting), default=images.total)
    if first and speaks:
        print(f"{images.name}: {first:,} of {images.total:,} images are already measured", flush=True)
    if not waiting:
        return
    done, after = first, f", {images.name}"
    progress = Progress(images.total, done, "images measured", every=SECONDS_BETWEEN_LINES, after=after, active=speaks)
    for batch in rebatched(images.batches(batch_size, first), batch_size):
        preemption.check()
        for reader in waiting:
            reader(batch, done, images.total)
        done += len(batch)
        progress(done)


class Rows:
    """A row of numbers for each image, float32 [images, width]."""

    def __init__(self, width: int, fingerprint: str = "") -> None:
        self.fingerprint = fingerprint
        self._parts = [np.zeros((0, width), np.float32)]

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self._parts))

    def add(self, rows: np.ndarray) -> None:
        """Append the next images' rows [n, width]."""
        self._parts.append(np.asarray(rows, np.float32))

    def array(self) -> np.ndarray:
        """Return all rows."""
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz, whole or not at all."""
        save_npz(path, {"fingerprint": np.array(self.fingerprint), "rows": self.array()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rows:
        """Read what `save` wrote; raise UserError if it is damaged."""
        try:
            with storage.path(path).open("rb") as handle, np.load(handle) as file:
                rows, fingerprint = file["rows"], str(file["fingerprint"])
            if rows.ndim != 2:
                raise ValueError(f"rows of shape {rows.shape}")
        except NPZ_ERRORS as error:
            raise UserError(
                f"{path}: damaged, or not ours ({type(error).__name__}); delete it to start again"
            ) from error
        self = cls(rows.shape[1], fingerprint)
        self.add(rows)
        return self


class Extractor:
    """Applies a frozen network to batches of images, split over the devices.

    Args:
        apply: (params, uint8 [n, height, width, 3], …) → float32 [n, width]; further arguments have a row per image.
        params: on the host; every device gets all of them.
        batch_size: a multiple of the number of devices.
    """

    def __init__(self, apply: Callable[..., jax.Array], params: Any, batch_size: int, mesh: Mesh) -> None:
        self.batch_size = batch_size
        self._rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._params = jax.tree.map(lambda a: sharding.place(np.asarray(a), whole), params)
        arguments = (sharding.WHOLE, sharding.BATCH, sharding.BATCH)

        def run(params: Any, images: jax.Array, more: tuple[jax.Array, ...]) -> jax.Array:
            def local(params: Any, images: jax.Array, more: tuple[jax.Array, ...]) -> jax.Array:
                return apply(params, images, *more)

            return sharding.each_device(local, mesh, arguments, sharding.BATCH)(params, images, more)

        self._run = jax.jit(run, out_shardings=whole)

    def __call__(self, images: np.ndarray, *more: np.ndarray) -> np.ndarray:
        """Return the rows of any number of images; each new size of images compiles once."""
        found = []
        for start in range(0, len(images), self.batch_size):
            parts = [np.asarray(a[start : start + self.batch_size]) for a in (images, *more)]
            used = len(parts[0])
            # A shorter batch would need another compilation.
            parts = [np.concatenate([a, np.repeat(a[:1], self.batch_size - used, 0)]) for a in parts]
            images_there, *more_there = (sharding.place(a, self._rows) for a in parts)
            found.append(np.asarray(self._run(self._params, images_there, tuple(more_there)))[:used])
        return np.concatenate(found)


def fingerprint_of(images: ImageSet, *what: Any) -> str:
    """Return a text that names everything a measurement depends on: the images, and how they are measured."""
    return ", ".join([f"{images.identity} x {images.total}", *map(str, what)])


def file_identity(path: pathlib.Path) -> str:
    """Return a text that changes with the weights: path, size and time of a file, or of a folder's safetensors."""
    if path.is_dir():
        return " ".join(file_identity(each) for each in sorted(path.glob("*.safetensors")))
    status = path.stat()
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"

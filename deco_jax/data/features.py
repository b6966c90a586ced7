"""Features of a dataset's captions on disk, encoded once by --mode=encode and read by data workers.

    FOLDER/store.json               how many captions, of what length and width, by which encoder
    FOLDER/null.npy                 the empty prompt's
    FOLDER/features_00000.npy, ...  bfloat16 as uint16 [captions, length, width], memory-mapped
    FOLDER/captions_00000.npy, ...  uint64 [captions]: a hash of each caption, so that changed ones are noticed

Every file appears whole or not at all, and an interrupted --mode=encode continues.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from deco_jax.data.source import Source, choose_caption
from deco_jax.errors import UserError, reason
from deco_jax.run import files, storage

T = TypeVar("T")
SHARD_BYTES = 2**28
# Number of evenly spaced captions that are compared before training starts; the others are compared when they are read.
CHECKED = 1000
REMEDY = "remove the folder and run --mode=encode again, or name another with config.text.features"


def caption_hash(caption: str) -> np.uint64:
    """Hash a caption, to the same value on every machine."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def read_caption(source: Source, index: int) -> str:
    """Return the caption of a sample, of several the heaviest. UserError if its file can no longer be read."""
    return _reading(source, index, lambda: source.caption(index))


def caption_of_number(source: Source, number: int) -> str:
    """Return one of all captions, image by image; "" for one that its image hasn't. UserError as `read_caption`."""
    index, which = divmod(number, source.num_captions)
    return _reading(source, index, lambda: source.captions(index)[which])


def number_of_caption(source: Source, index: int) -> int:
    """Return the number among all captions of the one that `read_caption` returns. UserError as `read_caption`."""
    if source.num_captions == 1:
        return index
    which = _reading(source, index, lambda: choose_caption(source.captions(index), source.caption_weights))
    return index * source.num_captions + which


def _reading(source: Source, index: int, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise UserError(f"the caption of {source.name(index)} can't be read: {error}; restore or remove it") from error


class Features:
    """The features in a folder, by the caption's number in its source; complete or, while they are made, in part.

    Args:
        folder: of the store.
        key: what the features depend on besides the captions: "captions" (how many), "length", "width", "prefix",
            and "encoder", a fingerprint. Without "encoder" any encoder will do.

    Raises:
        UserError: there is no store, or it belongs to something else.
    """

    def __init__(self, folder: str | pathlib.Path, key: dict[str, Any]) -> None:
        self.folder = storage.path(os.path.expanduser(folder))
        path = self.folder / "store.json"
        try:
            stored = json.loads(path.read_text())
            different = [
                f"{name}: {stored[name]} there, {value} here" for name, value in key.items() if stored[name] != value
            ]
            self.count, self.shard = int(stored["captions"]), int(stored["shard"])
            self.shape = (int(stored["length"]), int(stored["width"]))
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no features (config.text.features); run --mode=encode with the same settings first"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} can't be read ({error!r}); {REMEDY}") from error
        if different:
            different = [line if len(line) < 60 else "another encoder" for line in different]
            raise UserError(f"the features in {folder} belong to something else ({'; '.join(different)}); {REMEDY}")

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard)

    @functools.cached_property
    def _open(self) -> dict[str, np.ndarray]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def _file(self, name: str) -> np.ndarray:
        if name not in self._open:
            path = self.folder / f"{name}.npy"
            try:
                self._open[name] = storage.open_rows(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} can't be read ({reason(error, 200)}); {REMEDY}") from error
        return self._open[name]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        """Return uint16 [length, width], the bits of bfloat16."""
        shard, row = divmod(int(index), self.shard)
        return np.asarray(self._file(f"features_{shard:05d}")[row])

    def __call__(self, index: int, caption: str) -> dict[str, np.ndarray]:
        """Add the features to a sample, in a data worker. UserError if its caption isn't the one that was encoded."""
        self.check_caption(index, caption)
        return {"text": self[index]}

    def check_caption(self, index: int, caption: str) -> None:
        shard, row = divmod(int(index), self.shard)
        if self._file(f"captions_{shard:05d}")[row] != caption_hash(caption):
            raise UserError(
                f"the features in {self.folder} belong to other captions (number {index} is now "
                f"{caption[:60]!r}); {REMEDY}"
            )

    @property
    def null(self) -> np.ndarray:
        """Return the empty prompt's features, uint16 [length, width]."""
        return np.asarray(storage.load_array(self.folder / "null.npy"))

    def indices(self, shard: int) -> range:
        """Return the indices of the captions in a shard."""
        return range(shard * self.shard, min(self.count, (shard + 1) * self.shard))

    def has(self, shard: int) -> bool:
        """Return whether a shard is there; its captions' hashes are written after its features."""
        return (self.folder / f"captions_{shard:05d}.npy").exists()

    def check(self, source: Source) -> None:
        """Raise UserError unless all is there and CHECKED of the captions are those of `source`."""
        missing = [shard for shard in range(self.num_shards) if not self.has(shard)]
        if missing or not (self.folder / "null.npy").exists():
            raise UserError(
                f"{self.folder} is incomplete: {len(missing)} of {self.num_shards} files of features are missing; "
                "run --mode=encode again, which continues from there"
            )
        self.check_some(source)

    def check_some(self, source: Source) -> None:
        """Compare CHECKED captions, evenly spread over the shards that are there."""
        for i in np.unique(np.linspace(0, self.count - 1, min(CHECKED, self.count)).astype(np.int64)).tolist():
            if self.has(i // self.shard):
                self.check_caption(i, caption_of_number(source, i))

    def write(self, shard: int, features: np.ndarray, hashes: np.ndarray) -> None:
        """Add a shard: uint16 [captions, length, width] and uint64 [captions]."""
        files.save_array(self.folder / f"features_{shard:05d}.npy", features)
        files.save_array(self.folder / f"captions_{shard:05d}.npy", hashes)

    def write_null(self, features: np.ndarray) -> None:
        files.save_array(self.folder / "null.npy", features)


def create(folder: str | pathlib.Path, key: dict[str, Any]) -> None:
    """Start a store for `key`, with its encoder; one that is there already is left as it is."""
    folder = storage.path(folder)
    path = folder / "store.json"
    if path.exists():
        return
    shard = max(1, SHARD_BYTES // (2 * key["length"] * key["width"]))
    with files.whole(path) as part:
        part.write_text(json.dumps({**key, "shard": shard}, indent=2) + "\n")

"""What every source of images is; `sources.py`, `captioned_folder.py` and `webdataset.py` hold those that there are."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """Labelled or captioned images by index, 0 to len(source) − 1."""

    class_names: list[str]  # empty where the images have captions

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image`: encoded bytes, a path, or uint8 `[height, width(, 3)]`; `label`: 0 to num_classes − 1, or 0.

        Where the images have captions also `caption`, a text that is not empty. A file that can't be read raises.
        """
        ...

    def caption(self, index: int) -> str:
        """The caption alone, without reading the image where that can be had."""
        return self[index]["caption"]

    def name(self, index: int) -> str:
        """What to call the sample in a message, for instance its file."""
        ...

    @property
    def blocks(self) -> np.ndarray | None:
        """Where each part ends that is read as a whole, ascending, the last at len(source); None: by single samples."""
        return None

    def next_of_class(self, index: int) -> int:
        """The next sample with the same label, after the last one the first; `index` itself if there is no other."""
        ...

    def notes(self) -> str:
        """A line for the person watching: what was found, and what was left out and why. Empty: nothing to say."""
        return ""


WINDOW = 4  # blocks whose samples are mixed


def shuffled_blocks(ends: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every sample once: the blocks in random order, and the samples of each WINDOW of them mixed.

    Returns:
        int64 [samples], which depends on the arguments alone.
    """
    random = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], ends[:-1]])
    order = random.permutation(len(ends))
    windows = [order[i : i + WINDOW] for i in range(0, len(order), WINDOW)]
    return np.concatenate(
        [random.permutation(np.concatenate([np.arange(starts[b], ends[b]) for b in window])) for window in windows]
    )


class BlockOrder:
    """Position in the endless stream → index of the sample, by `shuffled_blocks` of each epoch."""

    def __init__(self, ends: np.ndarray, seed: int) -> None:
        self._ends, self._seed = ends, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process makes the orders itself.
        return {**self.__dict__, "_epochs": {}}

    def __call__(self, position: int) -> int:
        epoch, at = divmod(int(position), int(self._ends[-1]))
        order = self._epochs.get(epoch)
        if order is None:
            order = shuffled_blocks(self._ends, self._seed, epoch)
            # Where epochs meet, batches of both are under way.
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1} | {epoch: order}
        return int(order[at])


def printable(path: str) -> str:
    """A path as it can be printed, whatever bytes are in it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

"""What every source of images is; `sources.py`, `captioned_folder.py` and `webdataset.py` hold those that there are."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deco_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """Labelled or captioned images by index, 0 to len(source) − 1."""

    class_names: list[str]  # empty where the images have captions
    caption_weights: tuple[float, ...] = ()  # of several captions of an image; empty: each has one

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image`: encoded bytes, a path, or uint8 `[height, width(, 3)]`; `label`: 0 to num_classes − 1, or 0.

        Where the images have captions also `caption`, a text that is not empty; where they have several, `captions`
        instead, as the method of that name. A file that can't be read raises.
        """
        ...

    @property
    def num_captions(self) -> int:
        """Return how many captions an image has at most."""
        return max(1, len(self.caption_weights))

    def captions(self, index: int) -> list[str]:
        """Return the captions in the order of their weights, "" for one that the image hasn't; one at least is there.

        Without reading the image where that is possible.
        """
        return [self.caption(index)]

    def caption(self, index: int) -> str:
        """Return the caption alone, of several that with the largest weight."""
        if self.caption_weights:
            captions = self.captions(index)
            return captions[choose_caption(captions, self.caption_weights)]
        return self[index]["caption"]

    def name(self, index: int) -> str:
        """Return what to call the sample in a message, for instance its file."""
        ...

    @property
    def blocks(self) -> np.ndarray | None:
        """Return where each part that is read as a whole ends, ascending to len(source); None: single samples."""
        return None

    def next_of_class(self, index: int) -> int:
        """Return the next sample with the same label, cyclically; `index` itself if there is no other."""
        ...

    def notes(self) -> str:
        """Return a line for the user: what was found, what was left out and why. Empty: nothing to say."""
        return ""


def parse_weights(text: str, setting: str = "config.data.captions") -> dict[str, float]:
    """Read NAME=WEIGHT, comma separated, as {name: weight}. UserError if it isn't that."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = (word.strip() for word in part.rpartition("="))
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not name or name in found or not (0 < value < math.inf):
            raise UserError(f"{setting}={text} must be names with weights above 0, each once, as in txt=3,short=1")
        found[name] = value
    return found


def choose_caption(captions: Sequence[str], weights: Sequence[float], rng: np.random.Generator | None = None) -> int:
    """Choose among the captions that are not empty: at random by weight, without `rng` the first of the heaviest.

    Raises:
        ValueError: all are empty.
    """
    there = [i for i, caption in enumerate(captions) if caption]
    if not there:
        raise ValueError("none of its captions is there")
    if rng is None:
        return max(there, key=lambda i: weights[i])
    ends = np.cumsum([weights[i] for i in there])
    return there[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


WINDOW = 4  # blocks whose samples are mixed


def shuffled_blocks(ends: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Order every sample once: the blocks at random, and the samples of each WINDOW of blocks mixed.

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
    """Return a path as it can be printed, whatever bytes are in it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

"""What every source of images is; `sources.py`, `captioned_folder.py` and `webdataset.py` hold those that there are."""

from __future__ import annotations

import os
from typing import Any, Protocol

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

    def next_of_class(self, index: int) -> int:
        """The next sample with the same label, after the last one the first; `index` itself if there is no other."""
        ...

    def notes(self) -> str:
        """A line for the person watching: what was found, and what was left out and why. Empty: nothing to say."""
        return ""


def printable(path: str) -> str:
    """A path as it can be printed, whatever bytes are in it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

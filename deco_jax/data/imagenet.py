"""The names of ImageNet's 1,000 classes, whose folders are called by their WordNet numbers."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence

FILE = pathlib.Path(__file__).with_name("imagenet_classes.json")


@functools.cache
def _names() -> dict[str, str]:
    return json.loads(FILE.read_text())


def class_names() -> list[str]:
    """Return the 1,000 names in the order of the labels, which is that of the folders' names."""
    return list(_names().values())


def readable(names: Sequence[str]) -> list[str]:
    """Put words for WordNet numbers, such as "tench" for "n01440764"; other names stay."""
    return [_names().get(name, name) for name in names]

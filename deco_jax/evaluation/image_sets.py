"""Sets of images to measure, in a fixed order and read in batches: an .npz, a folder, the data, or drawn by a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class ImageSet(NamedTuple):
    """Images to measure: as many as `total`, in a fixed order."""

    name: str  # for people
    identity: str  # equal for equal images
    total: int
    size: tuple[int, int]  # (height, width)
    batches: Callable[[int, int], Iterator[np.ndarray]]  # (batch size, first) → uint8 [n, height, width, 3]
    parameters: int | None = None  # of the model that draws them

"""Several datasets as one, each with its own share of the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deco_jax.data.source import Source
from deco_jax.errors import UserError


class Mixture(Source):
    """The samples of all parts, one part after the other; training draws from part i with share weights[i] / Σ weights.

    `pipeline` mixes the parts' own orders at these shares, so a part may be seen several times while another is seen
    once. Whatever goes through the data once, such as a FID's reference, takes every sample as often as it is there.

    Raises:
        UserError: the parts have other classes, or a weight is not above 0.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        if len(parts) != len(weights) or not all(math.isfinite(w) and w > 0 for w in weights):
            raise UserError(
                f"config.data.weights has {len(weights)} numbers for {len(parts)} paths; give a number above 0 for each"
            )
        self.parts, self.weights = list(parts), [float(weight) for weight in weights]
        self.class_names, self.caption_weights = parts[0].class_names, parts[0].caption_weights
        for part in parts:
            if part.class_names != self.class_names:
                raise UserError(
                    f"the datasets of config.data.path have different classes: {len(self.class_names)} and "
                    f"{len(part.class_names)}, or different names; give all of them the same classes, or captions"
                )
        self._ends = np.cumsum([len(part) for part in parts])

    def starts(self) -> list[int]:
        """Where each part begins among the samples."""
        return [0, *(int(end) for end in self._ends[:-1])]

    def _find(self, index: int) -> tuple[Source, int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = self.starts()[number]
        return self.parts[number], index - start, start

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, at, _ = self._find(index)
        return part[at]

    def caption(self, index: int) -> str:
        part, at, _ = self._find(index)
        return part.caption(at)

    def captions(self, index: int) -> list[str]:
        part, at, _ = self._find(index)
        return part.captions(at)

    def name(self, index: int) -> str:
        part, at, _ = self._find(index)
        return part.name(at)

    def next_of_class(self, index: int) -> int:
        part, at, start = self._find(index)
        return start + part.next_of_class(at)

    def notes(self) -> str:
        total = sum(self.weights)
        shares = ", ".join(
            f"{len(part):,} images at {weight / total:.1%}"
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        return "; ".join([f"{len(self.parts)} data sets: {shares}", *(p.notes() for p in self.parts if p.notes())])

"""A second dataset that keeps a model from forgetting what it knew while it learns from the first."""

from __future__ import annotations

from typing import Any

import numpy as np

from deco_jax.data.mixture import Mixture
from deco_jax.data.source import Source
from deco_jax.errors import UserError


class WithPrior(Mixture):
    """A dataset and its prior: pictures of the same kind of thing, or pictures that the pretrained model drew.

    Each makes up half of the stream. The classes are those of both, sorted by name; a class may be in one or both. A
    sample of the prior is marked by `prior`, for its own weight in the loss.

    Source: Ruiz et al. 2023 (arXiv 2208.12242), §3.2, prior preservation.

    Raises:
        UserError: one has classes and the other captions.
    """

    def __init__(self, mine: Source, prior: Source) -> None:
        if bool(mine.class_names) != bool(prior.class_names):
            raise UserError("config.data.prior_path and config.data.path need both classes, or both captions")
        names = sorted({*mine.class_names, *prior.class_names})
        self.parts, self.weights, self.class_names = [mine, prior], [1.0, 1.0], names
        self.caption_weights = mine.caption_weights  # config.data.captions, for both
        self._labels = [[names.index(name) for name in part.class_names] for part in self.parts]
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, at, start = self._find(index)
        number = int(start > 0)
        sample = part[at]
        labels = self._labels[number]
        label = np.int32(labels[int(sample["label"])]) if labels else sample["label"]
        return {**sample, "label": label, "prior": np.bool_(number)}

    def notes(self) -> str:
        mine, prior = (f"{len(part):,}" for part in self.parts)
        return f"{mine} images and {prior} of the prior, each half of the batches"

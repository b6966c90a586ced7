"""The one interface of everything that scores a model or its samples, in training and in --mode=evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.models.network import Params


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated: samples, and the weights that draw them where there is a model.

    samples: drawn from the weights batch by batch when an evaluator asks for them, or read from files.
    params: one average of the denoiser's weights, on the mesh; None where only samples are given.
    frozen: arrays that never train (teacher, text encoder, null features), by name, on the mesh.
    """

    samples: ImageSet | None = None
    params: Params | None = None
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluator found.

    values: scores by name, as they stand in metrics.jsonl and evaluation.json.
    missing: for each score that can't be had, why not.
    notes: whatever else belongs in evaluation.json, such as how many images there were.
    """

    values: dict[str, float]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """One family of metrics, made once from the config and called with one subject after another.

    Whatever a call needs besides the subject (the network, held-out batches, reference statistics) is given when the
    evaluator is made, which also checks that all of it is there, so that nothing is found missing after an hour.
    A compiled function is made once, so that only the first call compiles.
    """

    titles: Mapping[str, str]  # name of a score in files → its name in tables

    def __call__(self, subject: Subject) -> Scores:
        """Scores of one subject.

        Raises:
            UserError: the subject has not what these metrics need, such as weights or enough images.
        """
        ...

"""The one interface of everything that scores a model or its samples, in training and in --mode=evaluate."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ml_collections
from jax.sharding import Mesh

from deco_jax.evaluation import EVALUATORS
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.evaluation.inception_features import InceptionFeatures
from deco_jax.evaluation.measuring import Reader
from deco_jax.models.network import Params

if TYPE_CHECKING:
    from deco_jax.api import Model


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated: samples, and the weights that draw them where there is a model.

    samples: drawn from the weights batch by batch when an evaluator asks for them, or read from files.
    params: one average of the denoiser's weights, on the mesh; None where only samples are given.
    frozen: arrays that never train (teacher, text encoder, null features), by name, on the mesh.
    model: the weights with what it takes to apply them, in --mode=evaluate; None on the way of a training.
    """

    samples: ImageSet | None = None
    params: Params | None = None
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Model | None = None


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

    def readers(self, samples: ImageSet) -> Sequence[Reader]:
        """Return what reads samples for these metrics, so that several evaluators can share one pass over them.

        A call with samples that its readers have read doesn't read them again.
        """
        ...

    def __call__(self, subject: Subject) -> Scores:
        """Scores of one subject.

        Raises:
            UserError: the subject has not what these metrics need, such as weights or enough images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """What evaluators are made from.

    folder: a run's, below which measurements are kept.
    most: samples that a subject will have, at most.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    mesh: Mesh
    most: int

    @property
    def batch_size(self) -> int:
        """Images that networks take at once: an even number that the devices divide."""
        size, unit = min(self.config.evaluate.batch_size, self.most), math.lcm(2, self.mesh.size)
        return -(-size // unit) * unit

    @functools.cached_property
    def inception(self) -> InceptionFeatures:
        """Inception's features, shared by all metrics that are of them."""
        return InceptionFeatures(self.config, self.folder, self.mesh, self.most)


def check_evaluators(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if files that config.evaluate.metrics need are missing, with where to get them."""
    for name in metric_names(config):
        importlib.import_module(EVALUATORS[name]).check(config)


def make_evaluators(setup: Setup) -> list[Evaluator]:
    """Make the evaluators of config.evaluate.metrics, in their order.

    Raises:
        UserError: what one of them needs is missing.
    """
    return [importlib.import_module(EVALUATORS[name]).make(setup) for name in metric_names(setup.config)]


def metric_names(config: ml_collections.ConfigDict) -> list[str]:
    """The names in config.evaluate.metrics, each once."""
    return list(dict.fromkeys(config.evaluate.metrics.split(",")))

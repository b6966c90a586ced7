"""The common interface of everything that scores a model or its samples, in training and in --mode=evaluate."""

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
    """What is evaluated: samples, and the weights that draw them if there is a model.

    samples: drawn from the weights batch by batch when an evaluator asks for them, or read from files.
    params: one average of the denoiser's weights, on the mesh; None if there are only samples.
    frozen: during training, arrays that aren't trained (teacher, text encoder, null features), by name, on the mesh.
    model: in --mode=evaluate, the weights with everything needed to apply them, read when it is asked for; None during
        training.
    """

    samples: ImageSet | None = None
    params: Params | None = None
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Model | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluator found.

    values: scores by name, as in metrics.jsonl and evaluation.json.
    missing: for each score that couldn't be computed, the reason.
    notes: anything else that belongs in evaluation.json, such as the number of images.
    """

    values: dict[str, float]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """A family of metrics, made once from the config and called with one subject after another.

    Everything else that a call needs (the network, held-out batches, reference statistics) is given when the evaluator
    is made. That is also when it checks that everything exists, so that nothing turns out to be missing after an hour.
    Compiled functions are made once, so only the first call compiles.
    """

    titles: Mapping[str, str]  # name of a score in files → its name in tables

    def readers(self, samples: ImageSet) -> Sequence[Reader]:
        """Return the readers of samples for these metrics, so that several evaluators can share one pass over them.

        A later call of the evaluator doesn't read samples again that its readers have already read.
        """
        ...

    def __call__(self, subject: Subject) -> Scores:
        """Return the scores of one subject.

        Raises:
            UserError: the subject lacks what these metrics need, such as weights or enough images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """What evaluators are made from.

    folder: the run's folder, below which measurements are kept.
    most: the largest number of samples that a subject will have.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    mesh: Mesh
    most: int

    @property
    def batch_size(self) -> int:
        """Images per batch of the networks: an even number that the number of devices divides."""
        size, unit = min(self.config.evaluate.batch_size, self.most), math.lcm(2, self.mesh.size)
        return -(-size // unit) * unit

    @functools.cached_property
    def inception(self) -> InceptionFeatures:
        """Inception's features, shared by all metrics that use them."""
        return InceptionFeatures(self.config, self.folder, self.mesh, self.most)


def check_evaluators(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, with where to get them, if files that config.evaluate.metrics needs are missing."""
    for name in metric_names(config):
        importlib.import_module(EVALUATORS[name]).check(config)


def make_evaluators(setup: Setup) -> list[Evaluator]:
    """Make the evaluators of config.evaluate.metrics, in their order.

    Raises:
        UserError: something that one of them needs is missing.
    """
    return [importlib.import_module(EVALUATORS[name]).make(setup) for name in metric_names(setup.config)]


def metric_names(config: ml_collections.ConfigDict) -> list[str]:
    """Return the names in config.evaluate.metrics, each only once."""
    return list(dict.fromkeys(config.evaluate.metrics.split(",")))

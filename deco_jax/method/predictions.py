"""What a network's output stands for: the velocity, the clean image, or something of both.

A prediction is bound to its path. A new one is a class with the methods of `Prediction`, and a line in `PREDICTIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from jax import Array

from deco_jax.errors import UserError
from deco_jax.method.paths import Path, Point, make_path
from deco_jax.shapes import Images, Times


class Prediction(Protocol):
    """Reads a network's output at a state; images [batch, height, width, 3], times [batch] or one for all.

    Subclass it and say what differs.

    Attributes:
        measured: arrays that it goes by and that are measured of the data once, before a run's first step; by name.
    """

    measured: Mapping[str, jax.ShapeDtypeStruct] = {}

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        """Return the velocity v̂ that the output stands for."""
        ...

    def image(self, output: Images, state: Images, t: Times) -> Images:
        """Return the clean image x̂ that the output stands for."""
        ...

    def target(self, x: Images, point: Point, t: Times) -> Images:
        """Return the velocity that v̂ is compared with, given the true image and its point on the path."""
        ...

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        """Return the image that x̂ is compared with, given the true image and its point on the path."""
        ...

    def weight(self, t: Array) -> Array | float:
        """Return what the squared error of v̂ is multiplied by, [batch] or one for all."""
        ...

    def in_sampling(self) -> Prediction:
        """Return the prediction that samplers use, for those that floor 1 − t otherwise there than in training."""
        return self

    def measure(self, images: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the arrays of `measured` from batches of images in ±1."""
        return {}

    def given(self, measured: Mapping[str, Any]) -> Prediction:
        """Return the prediction with the arrays of `measured`, without which those that have any compute nothing."""
        return self


@dataclasses.dataclass(frozen=True)
class VPrediction(Prediction):
    """The output is the velocity."""

    path: Path

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        return output

    def image(self, output: Images, state: Images, t: Times) -> Images:
        return self.path.image_of(output, state, t)

    def target(self, x: Images, point: Point, t: Times) -> Images:
        return point.velocity

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        return self.path.image_of(point.velocity, point.state, t)

    def weight(self, t: Array) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class XPrediction(Prediction):
    """The output is the clean image (JiT, Li & He 2025); compared where it becomes a velocity."""

    path: Path

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        return self.path.velocity_of(output, state, t)

    def image(self, output: Images, state: Images, t: Times) -> Images:
        return output

    def target(self, x: Images, point: Point, t: Times) -> Images:
        # Both sides through the same conversion, so that its floor is in both.
        return self.path.velocity_of(x, point.state, t)

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        return x

    def weight(self, t: Array) -> float:
        return 1.0


def _asymmetric(config: ml_collections.ConfigDict, path: Path) -> Prediction:
    from deco_jax.method.asymmetric import AsymmetricPrediction

    return AsymmetricPrediction(path, config.model.asymmetric_rank, config.model.patch_size)


PREDICTIONS: dict[str, Callable[[ml_collections.ConfigDict, Path], Prediction]] = {
    "v": lambda config, path: VPrediction(path),
    "x": lambda config, path: XPrediction(path),
    "asymmetric": _asymmetric,
}


def make_prediction(config: ml_collections.ConfigDict) -> Prediction:
    """Build the prediction that config.model.prediction names, on the config's path.

    Raises:
        UserError: there is no such prediction.
    """
    name = config.model.prediction
    if name not in PREDICTIONS:
        raise UserError(f"There is no prediction type {name!r}; choose one of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[name](config, make_path(config))

"""Prediction of the velocity, as in DeCo."""

from __future__ import annotations

import dataclasses

from jax import Array

from deco_jax.method.paths import Path, Point
from deco_jax.method.predictions.prediction import Prediction
from deco_jax.shapes import Images, Times


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

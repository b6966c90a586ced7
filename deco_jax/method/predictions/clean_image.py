"""Prediction of the clean image, as in JiT."""

from __future__ import annotations

import dataclasses

from jax import Array

from deco_jax.method.paths import Path, Point
from deco_jax.method.predictions.prediction import Prediction
from deco_jax.shapes import Images, Times


@dataclasses.dataclass(frozen=True)
class XPrediction(Prediction):
    """The output is the clean image (JiT, Li & He 2025); it is compared after conversion to a velocity."""

    path: Path

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        return self.path.velocity_of(output, state, t)

    def image(self, output: Images, state: Images, t: Times) -> Images:
        return output

    def target(self, x: Images, point: Point, t: Times) -> Images:
        # Both sides go through the same conversion, so that both have its floor.
        return self.path.velocity_of(x, point.state, t)

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        return x

    def weight(self, t: Array) -> float:
        return 1.0

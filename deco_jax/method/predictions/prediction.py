"""The protocol of a prediction: what a network's output means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from deco_jax.method.paths import Point
from deco_jax.shapes import Images, Times


class Prediction(Protocol):
    """Interprets a network's output at a state; images [batch, height, width, 3], times [batch] or one for all.

    Subclass it and override what differs.

    Attributes:
        measured: arrays that it depends on, by name; they are measured once on the data, before a run's first step.
    """

    measured: Mapping[str, jax.ShapeDtypeStruct] = {}

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        """Return the velocity v̂ that the output implies."""
        ...

    def image(self, output: Images, state: Images, t: Times) -> Images:
        """Return the clean image x̂ that the output implies."""
        ...

    def target(self, x: Images, point: Point, t: Times) -> Images:
        """Return the velocity that v̂ is compared with, given the true image and its point on the path."""
        ...

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        """Return the image that x̂ is compared with, given the true image and its point on the path."""
        ...

    def weight(self, t: Array) -> Array | float:
        """Return the factor for the squared error of v̂, [batch] or one for all."""
        ...

    def in_sampling(self) -> Prediction:
        """Return the prediction for samplers, which may floor 1 − t differently than training does."""
        return self

    def measure(self, images: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the arrays of `measured` from batches of images in ±1."""
        return {}

    def given(self, measured: Mapping[str, Any]) -> Prediction:
        """Return the prediction with the arrays of `measured`; predictions that have any can't be used without them."""
        return self

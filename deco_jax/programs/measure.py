"""Measures what a prediction needs to know about the data, before a new run's first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.data import pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.method.predictions import Prediction
from deco_jax.run import distributed, sharding


def measure(
    config: ml_collections.ConfigDict, mesh: Mesh, source: sources.Source, prediction: Prediction
) -> dict[str, jax.Array]:
    """Measure the arrays of `prediction.measured`, whole on every device; if it has none, read nothing.

    The first host reads the first config.data.measured_images images in training's order, cropped as for training,
    without mirroring. So the result depends only on the seed and the data, not on hosts or devices.

    Raises:
        UserError: too many images can't be read.
    """
    if not prediction.measured:
        return {}
    found: dict[str, np.ndarray] = {}
    with distributed.stage("measuring the images"):
        distributed.on_main_host(lambda: found.update(prediction.measure(first_images(config, source))))
        arrays = {
            name: distributed.array_from_main_host(found.get(name, np.zeros(leaf.shape, leaf.dtype)))
            for name, leaf in prediction.measured.items()
        }
    return place(arrays, mesh)


def place(arrays: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Place arrays that every host has whole on every device."""
    return {name: sharding.place(np.asarray(array), sharding.replicated(mesh)) for name, array in arrays.items()}


def first_images(config: ml_collections.ConfigDict, source: sources.Source) -> Iterator[np.ndarray]:
    """Yield batches of images in ±1, float32 [batch, height, width, 3]; each image at most once."""
    data = config.data
    left = min(data.measured_images, len(source))
    size = min(left, 64)
    batches = pipeline.train_batches(
        source,
        image_size=image_sides(data.image_size),
        batch_size=size,
        seed=config.seed,
        num_workers=data.num_workers,
        max_unreadable=data.max_unreadable,
        fast_crop=data.fast_crop,
    )
    try:
        while left > 0:
            images = next(batches)["image"][:left]
            left -= len(images)
            yield images.astype(np.float32) / 127.5 - 1
    finally:
        batches.close()

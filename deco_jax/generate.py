"""Batches of images by index: the one path on which train, sample and evaluate draw pictures.

Image i depends on the seed, i and its class alone: not on the batch it is drawn in, nor on the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.config import image_sides
from deco_jax.diffusion import guidance, path, samplers
from deco_jax.images import to_uint8
from deco_jax.models.network import Network, Params
from deco_jax.sharding import batch_sharding, place_everywhere, replicated

# (params, {"index": int32 [batch], "label": int32 [batch]}) → uint8 [batch, height, width, 3]
Generator = Callable[[Params, dict[str, jax.Array]], jax.Array]


def class_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int32 [num_images] in class order, as many of each class as of any other (to within one)."""
    return (np.arange(num_images, dtype=np.int64) * num_classes // num_images).astype(np.int32)


def make_generator(network: Network, config: ml_collections.ConfigDict, mesh: Mesh) -> Generator:
    """The jitted sampler of config.sample for batches placed by `place_everywhere`.

    Raises:
        UserError: settings that no sampler can take.
    """
    settings, prediction = config.sample, config.model.prediction
    height, width = image_sides(config.data.image_size)
    times = samplers.timesteps(settings.num_steps, settings.shift)
    guided = guidance.guided_steps(times, settings.guidance, settings.guidance_interval)

    def generate(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(settings.seed), index))(batch["index"])

        def normal(stream: int | jax.Array) -> jax.Array:
            """[batch, height, width, 3]; stream 0 is the initial noise, 1 + i the noise of step i."""
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), (height, width, 3)))(keys)

        def velocity(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
            output, _ = network.apply(params, x, t, labels)
            return path.to_velocity(output, x, t, prediction)

        null = jnp.asarray(config.model.num_classes, jnp.int32)
        images = samplers.sample(
            guidance.guided_velocity(velocity, batch["label"], null, settings.guidance),
            normal(0), sampler=settings.sampler, times=times, guided=guided, step_noise=lambda i: normal(1 + i),
        )  # fmt: skip
        return to_uint8(images)

    return jax.jit(generate, out_shardings=batch_sharding(mesh))


def generate_images(
    generator: Generator, params: Params, labels: np.ndarray, batch_size: int, mesh: Mesh, start: int = 0
) -> Iterator[np.ndarray]:
    """Images start..len(labels) − 1, batch by batch, as uint8 [at most batch_size, height, width, 3] on every host.

    The last batch is filled up with images that are thrown away, so that one compilation serves all.
    """
    gather = _gather(mesh)
    devices = mesh.size
    batch_size = -(-min(batch_size, len(labels)) // devices) * devices
    for first in range(start, len(labels), batch_size):
        index = np.arange(first, first + batch_size, dtype=np.int32)
        batch: dict[str, Any] = {"index": index, "label": labels[np.minimum(index, len(labels) - 1)]}
        images = gather(generator(params, place_everywhere(mesh, batch)))
        yield np.asarray(images)[: len(labels) - first]


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """All of an array onto every device; made once a mesh, so that it is compiled once."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))

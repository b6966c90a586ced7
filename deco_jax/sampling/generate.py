"""Batches of images by index: the one path on which train, sample and evaluate draw pictures.

Image i depends on the seed, i and its class or caption alone: not on the batch it is drawn in, nor on the devices.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning.requests import Requests
from deco_jax.config import to_json
from deco_jax.data.transforms import image_sides
from deco_jax.images import to_uint8
from deco_jax.method.predictions import Prediction, make_prediction
from deco_jax.models.network import Network, Params
from deco_jax.run import checkpoint, preemption
from deco_jax.run.sharding import BATCH, WHOLE, batch_sharding, each_device, place_everywhere, replicated, specs
from deco_jax.sampling import guidance, samplers

# (params, {"index": int32 [batch], "context": labels or text features}, null) → uint8 [batch, height, width, 3]
Generator = Callable[[Params, dict[str, jax.Array], Any], jax.Array]


def make_generator(network: Network, config: ml_collections.ConfigDict, mesh: Mesh) -> Generator:
    """The jitted sampler of config.sample for batches placed by `place_everywhere`.

    Raises:
        UserError: settings that no sampler can take.
    """
    settings, prediction = config.sample, make_prediction(config).in_sampling()
    height, width = image_sides(config.data.image_size)
    times = samplers.timesteps(settings.num_steps, settings.shift)
    guided = guidance.guided_steps(times, settings.guidance, settings.guidance_interval)

    def of_rows(params: Params, batch: dict[str, jax.Array], null: jax.Array) -> jax.Array:
        params = network.whole(params)
        normal = noise_of(settings.seed, batch["index"], (height, width))
        images = samplers.sample(
            guidance.guided_velocity(
                velocity_of(network, prediction, params), batch["context"], null, settings.guidance
            ),
            normal(0),
            sampler=settings.sampler,
            times=times,
            guided=guided,
            step_noise=lambda i: normal(1 + i),
        )
        return to_uint8(images)

    def generate(params: Params, batch: dict[str, jax.Array], null: jax.Array) -> jax.Array:
        return each_device(of_rows, mesh, (specs(mesh, params), BATCH, WHOLE), BATCH)(params, batch, null)

    return jax.jit(generate, out_shardings=batch_sharding(mesh))


def noise_of(seed: int | jax.Array, index: jax.Array, sides: tuple[int, int]) -> Callable[[int | jax.Array], jax.Array]:
    """The images' own noise: stream → [batch, height, width, 3]; 0 is the initial noise, 1 + i the noise of step i."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)

    def normal(stream: int | jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), (*sides, 3)))(keys)

    return normal


def velocity_of(network: Network, prediction: Prediction, params: Params) -> Callable[..., jax.Array]:
    """(x [n, height, width, 3], t [n], context) → velocity, whatever the network predicts."""

    def velocity(x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        output, _ = network.apply(params, x, t, context)
        return prediction.velocity(output, x, t)

    return velocity


def generate_images(
    generator: Generator, params: Params, requests: Requests, batch_size: int, mesh: Mesh, start: int = 0
) -> Iterator[np.ndarray]:
    """Images start..requests.count − 1, batch by batch, as uint8 [at most batch_size, height, width, 3] on every host.

    The last batch is filled up with images that are thrown away, so that one compilation serves all.
    """
    gather = _gather(mesh)
    devices, count = mesh.size, requests.count
    batch_size = -(-min(batch_size, count) // devices) * devices
    for first in range(start, count, batch_size):
        preemption.check()
        images = gather(generator(params, place_everywhere(mesh, requests.batch(first, batch_size)), requests.null))
        yield np.asarray(images)[: count - first]


# ---------------------------------------------------------------------------------------- what to draw


def fingerprint(config: ml_collections.ConfigDict, where: pathlib.Path, names: Sequence[str] | None = None) -> str:
    """Names everything that the images depend on; `names` are their captions."""
    values = to_json(config)
    drawn_from = {
        "checkpoint": [str(where), checkpoint.written(where)],
        "model": values["model"],
        "size": values["data"]["image_size"],
        "sample": {k: v for k, v in values["sample"].items() if k not in ("npz", "grid_images", "batch_size")},
    }
    if names is not None:
        drawn_from |= {"captions": list(names), "text": values["text"]}
    return hashlib.sha256(json.dumps(drawn_from, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- to look on


class Look(NamedTuple):
    """After an evaluation of the network."""

    done: int  # evaluations
    total: int
    images: np.ndarray | None  # where a step ends: its state as uint8 [batch, height, width, 3]; after the last: images


class Watcher:
    """The same images as `make_generator`'s, one evaluation a call, so that one can look on.

    Compiled for an image size, a number of images, a number of past velocities, and for guided and unguided steps;
    steps, times, shift, guidance, seed and conditions are data.
    """

    def __init__(self, network: Network, prediction: Prediction, mesh: Mesh) -> None:
        self._mesh, by_batch = mesh, batch_sharding(mesh)

        def begin(seed: jax.Array, index: jax.Array, sides: tuple[int, int]) -> jax.Array:
            return noise_of(seed, index, sides)(0)

        def evaluate(
            params: Params,
            carry: samplers.Carry,
            row: dict[str, jax.Array],
            batch: dict[str, jax.Array],
            null: jax.Array,
            scale: jax.Array,
            seed: jax.Array,
            guided: bool,
            noisy: bool,
        ) -> samplers.Carry:
            def of_rows(
                params: Params, carry: samplers.Carry, batch: dict[str, jax.Array], *whole: Any
            ) -> samplers.Carry:
                row, null, scale, seed = whole
                velocity = guidance.guided_velocity(
                    velocity_of(network, prediction, params), batch["context"], null, scale
                )
                _, height, width, _ = carry.state.shape
                noise = noise_of(seed, batch["index"], (height, width))(1 + row["step"]) if noisy else None
                return samplers.update(carry, velocity(carry.point, row["time"], guided), row, noise)

            arguments = (specs(mesh, params), BATCH, BATCH, *[WHOLE] * 4)
            return each_device(of_rows, mesh, arguments, BATCH)(params, carry, batch, row, null, scale, seed)

        self._begin = jax.jit(begin, static_argnums=2, out_shardings=by_batch)
        self._evaluate = jax.jit(evaluate, static_argnums=(7, 8), out_shardings=by_batch)
        self._shown = jax.jit(to_uint8, out_shardings=replicated(mesh))

    def __call__(
        self, params: Params, requests: Requests, settings: ml_collections.ConfigDict, sides: tuple[int, int]
    ) -> Iterator[Look]:
        """Draw all of `requests` at once: the noise first, then a look after each evaluation.

        Args:
            settings: as config.sample; read are num_steps, shift, sampler, guidance, guidance_interval and seed.
            sides: (height, width).

        Raises:
            UserError: settings that no sampler can take.
        """
        times = samplers.timesteps(settings.num_steps, settings.shift)
        guided = guidance.guided_steps(times, settings.guidance, settings.guidance_interval)
        table = samplers.make_table(settings.sampler, times)
        rows = jax.device_get(samplers.rows(table)) | {"step": table.step.astype(np.int32)}
        total, ends = len(table.step), {*table.ends.tolist(), len(table.step) - 1}

        filled = -(-requests.count // self._mesh.size) * self._mesh.size
        batch = place_everywhere(self._mesh, requests.batch(0, filled))
        seed, scale = np.asarray(settings.seed, np.uint32), np.asarray(settings.guidance, np.float32)

        def shown(x: jax.Array) -> np.ndarray:
            return np.asarray(self._shown(x))[: requests.count]

        noise = self._begin(seed, batch["index"], sides)
        carry = jax.device_put(samplers.start(noise, table), batch_sharding(self._mesh))
        yield Look(0, total, shown(noise))
        for i in range(total):
            carry = self._evaluate(
                params,
                carry,
                {name: column[i] for name, column in rows.items()},
                batch,
                requests.null,
                scale,
                seed,
                bool(guided[table.step[i]]),
                bool(table.noise[i]),
            )
            last = i == total - 1
            yield Look(i + 1, total, shown(carry.point if last else carry.state) if i in ends else None)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """All of an array onto every device; made once a mesh, so that it is compiled once."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))

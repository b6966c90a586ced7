"""Draws batches of images by index; everything that draws, whole images or the states on the way, uses this.

Image i only depends on the seed, i and its class or caption, not on the batch it is drawn in or on the devices.

    Requests ─ batch ─┐
    Sampling ─ table ─┼─ Generator: noise ─ integrate(make_velocity(network, guidance)) ─ state after each step ─ uint8
    weights ──────────┘
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning.requests import Requests
from deco_jax.config import to_json
from deco_jax.errors import UserError
from deco_jax.images import to_uint8
from deco_jax.method.predictions import Prediction, make_prediction
from deco_jax.models import network as network_lib
from deco_jax.models.network import Network, Params
from deco_jax.run import checkpoint, preemption, storage
from deco_jax.run.sharding import (
    BATCH,
    WHOLE,
    batch_sharding,
    each_device,
    place_everywhere,
    replicated,
    share_rows,
    specs,
)
from deco_jax.sampling import samplers
from deco_jax.sampling.extra_rows import pack, rows_of, unpack
from deco_jax.sampling.guidance import Guidance, make_velocity
from deco_jax.sampling.jumps import make_mean_velocity
from deco_jax.sampling.settings import Sampling

# As `Requests.batch` makes them, on the mesh: "index" int32 [batch], "context" labels or text features, and perhaps
# "start", the states to start from instead of the indices' noise.
Batch = dict[str, jax.Array]


BELOW = 2**30  # keeps the noise of rows below the image separate from that of the steps


def noise_of(
    seed: int | jax.Array, index: jax.Array, sides: tuple[int, int], rows: int = 0, scale: float | jax.Array = 1.0
) -> Callable[[int | jax.Array], jax.Array]:
    """Return the images' own noise, stream → [batch, height, width, 3]; 0 is the initial noise, 1 + i that of step i.

    Args:
        rows: number of rows below the image, see `extra_rows`; the image's noise is the same with and without them.
        scale: of the image's noise; that of the rows is standard normal.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)

    def normal(stream: int | jax.Array) -> jax.Array:
        image = scale * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), (*sides, 3)))(keys)
        return jnp.concatenate([image, below(stream)], axis=1) if rows else image

    def below(stream: int | jax.Array) -> jax.Array:
        shape = (rows, sides[1], 3)
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, BELOW + stream), shape))(keys)

    return normal


class Denoiser(NamedTuple):
    """A network, and what its output means."""

    network: Network
    prediction: Prediction
    jumps: bool = False  # whether it takes the length of a jump, config.model.mean_velocity
    token: int = 0  # channels of a class token that it also denoises, config.model.class_token; see `extra_rows`

    def mean_velocity(self, params: Params, x: jax.Array, t: jax.Array, context: Any, jump: jax.Array) -> jax.Array:
        """Return the mean velocity [n, height, width, 3] over jumps from states x at t [n]; jump [n, 4]."""
        output, _ = self.network.apply(params, x, t, context, jump=jump)
        return self.prediction.velocity(output, x, t)

    def velocity(self, params: Params, x: jax.Array, t: jax.Array, context: Any) -> jax.Array:
        """Return the velocity [n, height, width, 3] at states x, whatever the network predicts; t [n].

        With a class token, states and velocity have its rows below the image.
        """
        return self.velocity_and_features(params, x, t, context)[0]

    def velocity_and_features(
        self, params: Params, x: jax.Array, t: jax.Array, context: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the same, and the network's intermediates by name."""
        if self.token:
            x, token = unpack(x, self.token)
            output, intermediates = self.network.apply(params, x, t, context, class_token=token)
            velocity = self.prediction.velocity(output, x, t).astype(jnp.float32)
            return pack(velocity, intermediates["token_velocity"]), intermediates
        output, intermediates = self.network.apply(params, x, t, context)
        return self.prediction.velocity(output, x, t), intermediates

    def image(self, params: Params, x: jax.Array, t: jax.Array, context: Any) -> jax.Array:
        """Return the clean image x̂ [n, height, width, 3] at states x without a class token; t [n]."""
        output, _ = self.network.apply(params, x, t, context)
        return self.prediction.image(output, x, t)

    def given(self, measured: Mapping[str, Any]) -> Denoiser:
        """Return the denoiser with the arrays that a run measured for its prediction."""
        arrays = {name: np.asarray(measured[name]) for name in self.prediction.measured}
        return self._replace(prediction=self.prediction.given(arrays))

    def with_anything(self) -> Denoiser:
        """Return the denoiser with arbitrary measured arrays, for programs that are only timed or compiled."""
        draw = np.random.default_rng(0)
        return self.given({name: np.float32(draw.normal(size=a.shape)) for name, a in self.prediction.measured.items()})


def make_denoiser(config: ml_collections.ConfigDict) -> Denoiser:
    """Make the network of config.model for sampling; its prediction's measured arrays must still be `given`."""
    return Denoiser(
        network_lib.build(config.model.to_dict()),
        make_prediction(config).in_sampling(),
        config.model.mean_velocity,
        config.model.class_token,
    )


class Generator:
    """Draws batches of images with the given weights.

    It compiles once for an image size, a batch size and the number of velocities that a sampler remembers. Steps,
    times, guidance, seed, conditions and weights are data of the program. Another guidance rule, a weaker model of
    another architecture, or no guidance at all is another program.
    """

    def __init__(self, denoiser: Denoiser, mesh: Mesh) -> None:
        self.denoiser, self._mesh, by_batch = denoiser, mesh, batch_sharding(mesh)

        def noise(seed: jax.Array, index: jax.Array, size: tuple[int, int], scale: jax.Array) -> jax.Array:
            return noise_of(seed, index, size, rows_of(denoiser.token, size[1]), scale)(0)

        def run(
            params: Params,
            carry: samplers.Carry,
            batch: Batch,
            settings: dict[str, Any],
            between: tuple[int, int] | None = None,
            copies: int = 1,
        ) -> samplers.Carry:
            def of_rows(
                params: Params, carry: samplers.Carry, batch: Batch, settings: dict[str, Any]
            ) -> samplers.Carry:
                _, height, width, _ = carry.state.shape
                rows = rows_of(denoiser.token, width)
                # The score of noise that is s times as strong is 1/s² of that, the SDE's s² as fast a diffusion.
                scale = settings["noise_scale"]
                normal = noise_of(settings["seed"], batch["index"], (height - rows, width), rows, scale)
                guidance, whole = settings["guidance"].whole(), denoiser.network.whole(params)
                velocity: Callable[..., jax.Array]
                if denoiser.jumps:
                    velocity = make_mean_velocity(denoiser.mean_velocity, guidance, whole, batch["context"])
                else:
                    shared = share_rows(denoiser.velocity, mesh, copies)
                    velocity = make_velocity(shared, guidance, whole, (batch["context"], settings["null"]))
                return samplers.integrate(
                    velocity,
                    carry,
                    settings["rows"],
                    between or settings["between"],
                    lambda step: normal(1 + step),
                    spans=denoiser.jumps,
                )

            placed = dict.fromkeys(settings, WHOLE) | {"guidance": guidance_specs(mesh, settings["guidance"])}
            arguments = (specs(mesh, params), BATCH, BATCH, placed)
            return each_device(of_rows, mesh, arguments, BATCH)(params, carry, batch, settings)

        self._noise = jax.jit(noise, static_argnums=2, out_shardings=by_batch)
        self._start = jax.jit(samplers.start, static_argnums=1, out_shardings=by_batch)
        self._run = jax.jit(run, static_argnums=(4, 5), out_shardings=by_batch)
        self._uint8 = jax.jit(to_uint8, out_shardings=by_batch)
        self._everywhere = jax.jit(to_uint8, out_shardings=replicated(mesh))

    def draw(self, params: Params, batch: Batch, null: Any, sampling: Sampling, copies: int = 1) -> jax.Array:
        """Draw the images of a batch on the mesh, uint8 [batch, height, width, 3], split over the devices.

        Args:
            copies: how many consecutive rows of the batch are the same image, see `copies`.

        Raises:
            UserError: no sampler accepts these settings.
        """
        return self._uint8(self._final(params, batch, null, sampling, copies))

    def states(self, params: Params, batch: Batch, null: Any, sampling: Sampling) -> Iterator[jax.Array]:
        """Yield the state float32 [batch, height, width, 3] at each of `sampling.times`, beginning with the start.

        Raises:
            UserError: no sampler accepts these settings.
        """
        table = sampling.table()
        settings, steps = self._settings(null, sampling, table), samplers.evaluations_of_steps(table)
        batch, carry = self._begin_at(batch, sampling, table)
        height = sampling.size[0]
        yield carry.state[:, :height] if self.denoiser.token else carry.state
        for step, between in enumerate(steps):
            carry = self._run(params, carry, batch, settings | {"between": np.asarray(between, np.int32)})
            x = carry.point if step == len(steps) - 1 else carry.state
            yield x[:, :height] if self.denoiser.token else x

    def images(
        self, params: Params, requests: Requests, sampling: Sampling, batch_size: int, first: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield images first..requests.count − 1 on every host, uint8 [at most batch_size, height, width, 3] at a time.

        The last batch is padded with images that are discarded, so that one compilation serves all batches.
        """
        count = min(batch_size, requests.count)
        copies = self.copies(count, sampling)
        size = self.filled(count, copies)
        for start in range(first, requests.count, size):
            preemption.check()
            rows = {name: np.repeat(values, copies, axis=0) for name, values in requests.batch(start, size).items()}
            batch = place_everywhere(self._mesh, rows)
            drawn = self.on_host(self._final(params, batch, requests.null, sampling, copies))[::copies]
            yield drawn[: requests.count - start]

    def copies(self, count: int, sampling: Sampling) -> int:
        """Return how many devices draw each of `count` images together.

        These are 2 where at least half of the devices would have no image and guidance takes two evaluations of the
        same network: each of the two then takes one of them. Otherwise 1.
        """
        spare = self._mesh.size % 2 == 0 and 2 * count <= self._mesh.size
        doubled = sampling.guidance.weaker is None and np.any(sampling.guided(sampling.table()))
        return 2 if spare and doubled else 1

    def filled(self, count: int, copies: int = 1) -> int:
        """Return the smallest number of images, at least `count`, that divides evenly over groups of devices.

        Args:
            copies: how many devices a group has, see `copies`.
        """
        groups = self._mesh.size // copies
        return -(-count // groups) * groups

    def on_host(self, states: jax.Array) -> np.ndarray:
        """Return states as uint8 images on every host."""
        return np.asarray(self._everywhere(states))

    def lower(self, params: Params, batch: Batch, null: Any, sampling: Sampling, copies: int = 1) -> jax.stages.Lowered:
        """Lower the program of `draw` for exactly these settings; arguments may be shapes with shardings.

        Unlike in the program that runs, the number of evaluations is a constant, so that operations can be counted.
        """
        table = sampling.table()
        rows = rows_of(self.denoiser.token, sampling.size[1])
        x = jax.eval_shape(lambda index: noise_of(0, index, sampling.size, rows)(0), batch["index"])
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self._mesh))
        carry: Any = samplers.Carry(x, x, (x,) * (table.advance.shape[1] - 1))  # type: ignore[arg-type]
        return self._run.lower(
            params, carry, batch, self._settings(null, sampling, table), (0, len(table.step)), copies
        )

    def _final(self, params: Params, batch: Batch, null: Any, sampling: Sampling, copies: int) -> jax.Array:
        table = sampling.table()
        batch, carry = self._begin_at(batch, sampling, table)
        point = self._run(params, carry, batch, self._settings(null, sampling, table), None, copies).point
        return point[:, : sampling.size[0]] if self.denoiser.token else point

    def _begin_at(self, batch: Batch, sampling: Sampling, table: samplers.Table) -> tuple[Batch, samplers.Carry]:
        """Return the parts of a batch that the program needs, and the first state."""
        if "start" in batch and self.denoiser.token:
            raise UserError(
                "this model denoises a class token along with the image (config.model.class_token), so it can't start "
                "from an image's state alone; leave the noise out"
            )
        x = (
            batch["start"]
            if "start" in batch
            else self._noise(_seed(sampling), batch["index"], sampling.size, np.float32(sampling.noise_scale))
        )
        return {name: batch[name] for name in ("index", "context")}, self._start(x, table.advance.shape[1])

    def _settings(self, null: Any, sampling: Sampling, table: samplers.Table) -> dict[str, Any]:
        rule, guided = sampling.guidance, sampling.guided(table)
        if not np.any(guided):  # then a weaker model isn't passed, either
            rule = dataclasses.replace(rule, weaker=None)
        return {
            "rows": samplers.rows(table, guided),
            "between": np.asarray((0, len(table.step)), np.int32),
            "guidance": jax.tree.map(lambda leaf: np.float32(leaf) if isinstance(leaf, (int, float)) else leaf, rule),
            "null": null,
            "seed": _seed(sampling),
            "noise_scale": np.float32(sampling.noise_scale),
        }


def guidance_specs(mesh: Mesh, rule: Guidance) -> Any:
    """Return the PartitionSpec of each leaf of a rule; a weaker model's parameters are sharded like any others."""
    whole = jax.tree.map(lambda leaf: WHOLE, rule)
    if rule.weaker is None:
        return whole
    return dataclasses.replace(whole, weaker=dataclasses.replace(whole.weaker, params=specs(mesh, rule.weaker.params)))


def _seed(sampling: Sampling) -> np.ndarray:
    """Return the seed as JAX would convert it from a Python integer."""
    return np.asarray(sampling.seed & 0xFFFFFFFF, np.uint32)


# Settings of config.sample that say how images are shown or computed, not what they are.
PRESENTATION = ("npz", "png", "grid_images", "grid_columns", "batch_size")


def fingerprint(
    config: ml_collections.ConfigDict, where: str | pathlib.Path, names: Sequence[str] | None = None
) -> str:
    """Return a digest of everything that the images of a checkpoint depend on; `names` are their captions."""
    values = to_json(config)
    drawn_from = {
        "checkpoint": [str(where), checkpoint.written(storage.path(where))],
        "model": values["model"],
        "size": values["data"]["image_size"],
        "path": values["path"],
        "sample": {k: v for k, v in values["sample"].items() if k not in PRESENTATION},
    }
    if guide := config.sample.guidance_model:
        weaker = checkpoint.find(guide)
        drawn_from["weaker"] = [str(weaker), checkpoint.written(weaker)]
    if names is not None:
        drawn_from |= {"captions": list(names), "text": values["text"]}
    return hashlib.sha256(json.dumps(drawn_from, sort_keys=True).encode()).hexdigest()

"""The DCT spectrum of the paper's Fig. 4: how much energy a map carries at each frequency."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning.requests import Requests
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Scores, Subject
from deco_jax.method.dct import block_dct, zigzag
from deco_jax.models.network import Params
from deco_jax.run import sharding
from deco_jax.sampling.generate import Generator
from deco_jax.sampling.settings import Sampling

BLOCK = 8


def block_energy(maps: jax.Array, block: int = BLOCK) -> jax.Array:
    """Return the mean squared coefficients of the orthonormal DCT-II of each block × block tile.

    Args:
        maps: [batch, height, width, channels], any range. Sides that aren't multiples of `block` are reflect-padded at
            the bottom and on the right.
        block: side of a tile.

    Returns:
        float32 [batch, block, block], [vertical, horizontal] frequency; the mean is over tiles and channels.
    """
    return jnp.mean(jnp.square(block_dct(maps, block)), axis=(1, 2, 5))


def normalised_spectrum(energy: np.ndarray) -> np.ndarray:
    """Return log(1 + energy) over its maximum, in zigzag order: [block, block] → float64 [block · block], lowest first.

    A map without any energy stays zero.
    """
    logarithms = np.log1p(np.asarray(energy, np.float64)).reshape(-1)[zigzag(len(energy))]
    return logarithms / (logarithms.max() or 1.0)


class ModelSpectrum:
    """Evaluates a denoiser's two halves: the energies of the DiT's output map and of the velocity.

    They are measured on the class-conditional outputs, at all states of sampling with the guidance of the settings.

    Args:
        requests: the images to draw.
        config: only config.model.patch_size and config.spectrum.batch_size (images drawn at a time) are read.
    """

    titles = {"spectrum_dit": "DiT, highest frequency", "spectrum_velocity": "velocity, highest frequency"}  # noqa: RUF012

    def __init__(
        self,
        generator: Generator,
        requests: Requests,
        sampling: Sampling,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
    ) -> None:
        self._generator, self._requests, self._sampling, self._mesh = generator, requests, sampling, mesh
        self._batch_size = generator.filled(min(config.spectrum.batch_size, requests.count))
        patch, denoiser = config.model.patch_size, generator.denoiser

        def of_rows(
            params: Params, x: jax.Array, context: Any, weight: jax.Array, t: jax.Array
        ) -> dict[str, jax.Array]:
            rows, columns = x.shape[1] // patch, x.shape[2] // patch
            velocity, features = denoiser.velocity_and_features(params, x, jnp.full((len(x),), t), context)
            tokens = features["low_frequency"]
            dit = tokens.reshape(tokens.shape[0], rows, columns, -1)  # [batch, rows, columns, width]
            measured = {"dit": block_energy(dit, min(BLOCK, rows, columns)), "velocity": block_energy(velocity)}
            summed = {name: jnp.einsum("b,bkl->kl", weight, energy) for name, energy in measured.items()}
            return sharding.sum_over_devices(summed, mesh)

        def measure(params: Params, *arguments: jax.Array) -> dict[str, jax.Array]:
            where = (sharding.specs(mesh, params), *[sharding.BATCH] * 3, sharding.WHOLE)
            return sharding.each_device(of_rows, mesh, where, sharding.WHOLE)(params, *arguments)

        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

    def energies(self, params: Params) -> dict[str, np.ndarray]:
        """Return mean energies over images and sampling steps: {"dit": [block, block], "velocity": [8, 8]}, float64."""
        count, times = self._requests.count, self._sampling.times[:-1]
        measured = []
        for first in range(0, count, self._batch_size):
            batch = sharding.place_everywhere(self._mesh, self._requests.batch(first, self._batch_size))
            # The last batch is padded with images that don't count.
            counts = (np.arange(first, first + self._batch_size) < count).astype(np.float32)
            weight = sharding.place_everywhere(self._mesh, {"weight": counts})["weight"]
            states = self._generator.states(params, batch, self._requests.null, self._sampling)
            for time, state in zip(times, states, strict=False):  # but not of the images
                measured.append(self._measure(params, state, batch["context"], weight, np.float32(time)))
        totals = jax.tree.map(lambda *energies: sum(np.asarray(energy, np.float64) for energy in energies), *measured)
        return {name: total / (count * len(times)) for name, total in totals.items()}

    def __call__(self, subject: Subject) -> Scores:
        """Return the values of both normalised spectra at the highest frequency."""
        if subject.params is None:
            raise UserError("the spectrum needs a model's outputs; give a checkpoint, not samples")
        spectra = {name: normalised_spectrum(energy) for name, energy in self.energies(subject.params).items()}
        return Scores({f"spectrum_{name}": float(values[-1]) for name, values in spectra.items()})

"""LPIPS as a score: how close denoised images are to the true ones, and how different samples of a class are.

Reconstruction: images of the data are noised to config.evaluate.lpips_time, each with its own noise, and one evaluation
of the network, with their class or caption, gives x̂. It is compared with the x̂ of a perfect network, which is the image
itself, except for v-predictions on the energy-guided path. Pairs: distances between consecutive samples of the same
class; higher means more diverse. Distances are those of the perceptual loss, including its rule for patch sizes other
than 16.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax.data import pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.evaluation.measuring import FOLDER, Extractor, Newest, Reader, Rows, file_identity, fingerprint_of, read
from deco_jax.images import to_float
from deco_jax.method.paths import make_path
from deco_jax.models import vgg
from deco_jax.models.network import Params
from deco_jax.run import fetch
from deco_jax.sampling.generate import noise_of

if TYPE_CHECKING:
    from deco_jax.api import Model


VERSION = 2  # of the measurement: what another version stored is measured again


class LPIPS:
    """Scores a model by its reconstructions, and samples by the distances within their classes."""

    titles: ClassVar = {name: TITLES[name] for name in ("lpips_reconstruction", "lpips_pairs")}

    def __init__(self, setup: Setup) -> None:
        files, self._config = setup.config.lpips, setup.config
        network = vgg.make_lpips(setup.config)
        paths = [fetch.local(path) for path in (files.vgg, files.linear)]
        self._weights = f"LPIPS {files.dtype} {' '.join(map(file_identity, paths))}"
        # Distances also depend on how far the images are resized.
        self._weights += f" {files.pixels_per_patch} pixels for {setup.config.model.patch_size}"
        self._path, self._batch_size = setup.folder / FOLDER / "samples_lpips.npz", setup.batch_size

        def distance(params: Params, images: jax.Array, others: jax.Array) -> jax.Array:
            both = [to_float(a) if a.dtype == jnp.uint8 else a for a in (images, others)]
            return network.apply(params, *both)[:, None]

        self._newest: Newest[Rows] = Newest()
        self._distance = Extractor(distance, network.load(), setup.batch_size, setup.mesh)

    def readers(self, samples: ImageSet) -> list[Reader]:
        labels = samples.labels
        if labels is None:
            return []

        def add(rows: Rows, batch: np.ndarray, index: np.ndarray) -> None:
            # Batches begin with an even index, because all but the last hold an even number of images.
            found = np.full((len(batch), 1), np.nan, np.float32)
            second = np.arange(1, len(batch), 2)
            second = second[labels[index[second]] == labels[index[second - 1]]]
            if len(second):
                found[second] = self._distance(batch[second - 1], batch[second])
            rows.add(found)

        named, save_every = (
            fingerprint_of(samples, self._weights, "pairs", f"version {VERSION}"),
            self._config.evaluate.save_every,
        )
        return [self._newest(named, lambda: Reader(Rows(1, named), add, self._path, save_every))]

    def __call__(self, subject: Subject) -> Scores:
        """Return both scores; those that the subject doesn't allow are missing."""
        scores = Scores({})
        if subject.samples is not None:
            readers = self.readers(subject.samples)
            pairs = np.zeros(0)
            if readers:
                read(subject.samples, readers, self._batch_size)
                rows = readers[0].state.array()[:, 0].astype(np.float64)
                pairs = rows[~np.isnan(rows)]
            if len(pairs):
                scores.values["lpips_pairs"] = float(pairs.mean())
            else:
                scores.missing["lpips_pairs"] = "no two samples are known to have the same class"
        if subject.model is None:
            scores.missing["lpips_reconstruction"] = "there is no model, only samples"
        elif self._config.model.class_token:
            scores.missing["lpips_reconstruction"] = "the model also denoises a class token, which images don't have"
        elif jax.process_count() > 1:
            scores.missing["lpips_reconstruction"] = "it is measured on one host only"
        else:
            scores.values["lpips_reconstruction"] = self._reconstruction(subject.model)
        scores.notes["lpips_of"] = {"weights": self._weights, "time": self._config.evaluate.lpips_time}
        return scores

    def _reconstruction(self, model: Model) -> float:
        """Return the mean distance of x̂ from the image, over config.evaluate.lpips_images images of config.data."""
        data, t = self._config.data, self._config.evaluate.lpips_time
        source = sources.open_source(data)
        count = min(self._config.evaluate.lpips_images, len(source))
        path, prediction, condition = make_path(self._config), model.denoiser.prediction, model.condition
        seed, scale = self._config.sample.seed, self._config.path.noise_scale
        batches = pipeline.epoch(
            source,
            image_sides(data.image_size),
            batch_size=self._batch_size,
            num_workers=data.num_workers,
            max_unreadable=data.max_unreadable,
            indices=np.arange(count, dtype=np.int64) * len(source) // count,
            encode_caption=condition.encode_caption,
        )
        context = jax.jit(lambda frozen, batch: condition.context(frozen, batch))
        total, done = 0.0, 0
        try:
            for batch in batches:
                images = to_float(jnp.asarray(batch["image"]))
                times = jnp.full((len(images),), t, jnp.float32)
                index = jnp.arange(done, done + len(images))
                height, width = images.shape[1:3]
                noise = noise_of(seed, index, (height, width), scale=scale)(0)
                point = path.point(images, noise, times)
                given = {name: jnp.asarray(batch[name]) for name in condition.inputs}
                predicted = np.asarray(model.denoise(point.state, t, context(model.frozen, given)))
                wanted = np.asarray(prediction.image_target(images, point, times))
                total += float(self._distance(predicted, wanted).sum(dtype=np.float64))
                done += len(images)
        finally:
            batches.close()
        return total / done


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if the images are too small, or, with where to get them, if the weights are missing."""
    vgg.check_size(image_sides(config.data.image_size), config.model.patch_size, config.lpips.pixels_per_patch)
    for name, url in (("vgg", vgg.VGG_URL), ("linear", vgg.LPIPS_URL)):
        path = config.lpips[name]
        if not path or not os.path.isfile(fetch.local(path)):
            what = f"no weights at {path} (config.lpips.{name})" if path else f"config.lpips.{name} is empty"
            raise UserError(f"{what}; download {url}, or leave lpips out of config.evaluate.metrics")


def make(setup: Setup) -> LPIPS:
    """Make the evaluator of config.evaluate.metrics="lpips"."""
    return LPIPS(setup)

"""FD-DINOv2: the Fréchet distance of DINOv2's class tokens, closer to human judgement (Stein et al. 2023).

    images ─ 224² ─ DINOv2 ViT-L/14 ─ class token [1024] ─ mean, covariance ─ Fréchet distance

Samples and the reference's images are processed in the same way. Images are resized by antialiased bicubic
interpolation in float32; the published suite rounds the result to whole levels.
"""

from __future__ import annotations

import functools
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.image_sets import ImageSet, digest
from deco_jax.evaluation.inception_features import open_reference
from deco_jax.evaluation.measuring import FOLDER, Extractor, Newest, Reader, Rows, file_identity, fingerprint_of, read
from deco_jax.models.dinov2 import MEAN, META_URL, STD, DINOv2, load_teacher, sizes
from deco_jax.models.network import Params, View, functional
from deco_jax.run import fetch, storage

SIDE = 224  # pixels, 16 × 16 patches


def class_tokens(size: str, dtype: str) -> tuple[jax.stages.Wrapped, Params]:
    """Return the function (params, uint8 [n, height, width, 3]) → float32 [n, width], and its parameters' shapes."""
    kind = jnp.dtype(dtype)

    class ClassToken(DINOv2):
        def __call__(self, images: jax.Array, patch_size: int = 16) -> View:
            x = images.astype(jnp.float32) / 255
            x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "cubic", antialias=True)
            h = self.features((x - MEAN) / STD)
            return View(h[:, 1:], h[:, 0])

    network = functional(lambda rngs: ClassToken.of_size(size, dtype=kind, rngs=rngs), kind)
    return jax.jit(lambda params, images: network.apply(params, images).image), network.shapes


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Fréchet distance between two sets of features, [n, width] and [m, width], with float64 statistics."""
    statistics = [
        (a.mean(0), np.cov(a, rowvar=False).reshape(a.shape[1], -1))
        for a in (np.asarray(x, float), np.asarray(y, float))
    ]
    return frechet_distance(*statistics[0], *statistics[1])


class FDDINOv2:
    """Scores samples by their class tokens' distance from those of the reference's images."""

    titles: ClassVar = {"fd_dinov2": TITLES["fd_dinov2"]}

    def __init__(self, setup: Setup) -> None:
        settings, self._folder = setup.config.evaluate, setup.folder / FOLDER
        reference = open_reference(setup.config)
        if reference.images is None:
            raise UserError(
                f"FD-DINOv2 needs the reference's images, but {reference.name} has none ('arr_0'); use another "
                "reference, or leave fd_dinov2 out of config.evaluate.metrics"
            )
        self._reference = reference.images
        self._cache, self._save_every = settings.cache, settings.save_every
        path = fetch.local(settings.dinov2)
        self._weights = f"DINOv2 {settings.dinov2_size} {settings.dinov2_dtype} {file_identity(path)}"
        apply, _ = class_tokens(settings.dinov2_size, settings.dinov2_dtype)
        params = load_teacher(path, settings.dinov2_size)
        self._extractor = Extractor(apply, params, setup.batch_size, setup.mesh)
        self._width = sizes(settings.dinov2_size)[0]
        self._newest: Newest[Rows] = Newest()

    def readers(self, samples: ImageSet) -> list[Reader]:
        path = self._folder / "samples_dinov2.npz"
        return [self._newest(fingerprint_of(samples, self._weights), lambda: self._reader(samples, path))]

    def _reader(self, images: ImageSet, path: pathlib.Path) -> Reader[Rows]:
        empty = Rows(self._width, fingerprint_of(images, self._weights))
        return Reader(empty, lambda rows, batch, index: rows.add(self._extractor(batch)), path, self._save_every)

    @functools.cached_property
    def _theirs(self) -> np.ndarray:
        path = self._folder / "reference_dinov2.npz"
        if self._cache:
            named = digest(fingerprint_of(self._reference, self._weights).encode())
            path = storage.path(self._cache) / f"reference_{named[:16]}.npz"
        return self._read(self._reader(self._reference, path))

    def _read(self, reader: Reader[Rows], images: ImageSet | None = None) -> np.ndarray:
        read(images or self._reference, [reader], self._extractor.batch_size)
        return reader.state.array()

    def __call__(self, subject: Subject) -> Scores:
        """Return the distance of a subject's samples."""
        samples = subject.samples
        if samples is None:
            raise UserError("FD-DINOv2 needs samples; give a checkpoint or samples")
        (reader,) = self.readers(samples)
        ours, theirs = self._read(reader, samples), self._theirs
        return Scores(
            {"fd_dinov2": frechet(ours, theirs)},
            notes={"fd_dinov2_of": {"samples": len(ours), "reference": len(theirs), "weights": self._weights}},
        )


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, with where to get them, if the weights are missing."""
    path, size = config.evaluate.dinov2, config.evaluate.dinov2_size
    if not path or not fetch.local(path).exists():
        what = f"no weights at {path} (config.evaluate.dinov2)" if path else "config.evaluate.dinov2 is empty"
        raise UserError(f"{what}; download DINOv2's, {META_URL.format(size.lower(), '')}, or leave out fd_dinov2")


def make(setup: Setup) -> FDDINOv2:
    """Make the evaluator of config.evaluate.metrics="fd_dinov2"."""
    return FDDINOv2(setup)

"""Inception's features of samples and of the reference, computed once for all metrics that use them."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.errors import UserError
from deco_jax.evaluation.image_sets import ImageSet, digest, npz_images, source_images
from deco_jax.evaluation.measuring import FOLDER, Newest, Reader, fingerprint_of, read
from deco_jax.evaluation.statistics import Accumulator, Statistics, read_reference
from deco_jax.models.inception import FeatureExtractor
from deco_jax.models.inception_weights import WHERE, load_inception
from deco_jax.run import fetch, storage


class InceptionFeatures:
    """Statistics of Inception's features of samples and of the reference, for all evaluators that use them.

    Args:
        folder: the run's folder, below which they are kept.
        most: the largest number of samples that a subject will have.

    Raises:
        UserError: there are no weights, or no reference.
    """

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, most: int) -> None:
        self.path = inception_path(config)
        self.reference = open_reference(config)
        self.config, self.folder = config, folder / FOLDER
        self.weights = digest(self.path.read_bytes())
        self.extractor = FeatureExtractor(load_inception(self.path), min(config.evaluate.batch_size, most), mesh)
        self._newest: Newest[Accumulator] = Newest()

    def reader(self, samples: ImageSet, kept: bool = True) -> Reader[Accumulator]:
        """Return the reader that measures samples.

        Args:
            kept: keep the statistics in the folder, to continue from there, and share one reader between all callers.
        """
        settings, path = self.config.evaluate, self.folder / "samples.npz"
        if not kept:
            return inception_reader(samples, self.extractor, None, self.weights, 0, 1)
        num_kept = settings.precision_recall_samples

        def make() -> Reader[Accumulator]:
            return inception_reader(samples, self.extractor, path, self.weights, num_kept, settings.save_every)

        return self._newest(measured_from(samples, self.weights, num_kept), make)

    def of_samples(self, samples: ImageSet) -> Accumulator:
        """Return the statistics of samples; samples that are already measured aren't drawn again."""
        reader = self.reader(samples)
        read(samples, [reader], self.extractor.batch_size)
        return reader.state

    @functools.cached_property
    def of_reference(self) -> tuple[Statistics, np.ndarray | None]:
        """The reference's statistics, and its pool3 features for precision and recall, if there are any."""
        return self.reference.measure(self.extractor, self.folder, self.weights, self.config)


def inception_path(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Return the path of the weights; raise UserError, with where to get them, if they are missing."""
    path = config.evaluate.inception
    if not path:
        raise UserError(f"config.evaluate.inception is empty; give the path of the Inception weights: {WHERE}")
    path = os.fspath(fetch.local(path))
    if not os.path.isfile(path):
        raise UserError(f"no Inception weights at {path} (config.evaluate.inception); {WHERE}")
    return pathlib.Path(path)


def inception_reader(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: pathlib.Path | None,
    weights: str,
    num_kept: int,
    save_every: int,
) -> Reader[Accumulator]:
    """Make the reader that measures all statistics of a set.

    Args:
        path, save_every: see `measuring.Reader`.
        weights: digest of the Inception weights.
        num_kept: number of images whose pool3 to keep, evenly spread over the set; 0: none.
    """
    num_kept, total = min(num_kept, images.total), images.total

    def add(state: Accumulator, batch: np.ndarray, index: np.ndarray) -> None:
        state.add(extractor(batch), (index + 1) * num_kept // total > index * num_kept // total)

    empty = Accumulator(bool(num_kept), fingerprint=measured_from(images, weights, num_kept))
    return Reader(empty, add, path, save_every)


def measure(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: pathlib.Path | None,
    weights: str,
    num_kept: int,
    save_every: int,
    quiet: bool = False,
) -> Accumulator:
    """Measure a set by itself; arguments as for `inception_reader`."""
    reader = inception_reader(images, extractor, path, weights, num_kept, save_every)
    read(images, [reader], extractor.batch_size, quiet)
    return reader.state


def measured_from(images: ImageSet, weights: str, num_kept: int) -> str:
    """Return a text that names everything that the statistics of a set depend on; arguments as for `measure`."""
    return fingerprint_of(images, f"weights {weights}", f"{min(num_kept, images.total)} kept")


class ReferenceSet(NamedTuple):
    """What samples are compared with: known statistics, images, or both."""

    name: str
    statistics: Statistics | None
    images: ImageSet | None
    notes: list[str]

    @property
    def num_images(self) -> int | None:
        """The number of images behind its statistics; None if a file doesn't say."""
        if self.statistics is not None:
            return self.statistics.num_images
        return self.images.total if self.images else None

    @property
    def size(self) -> tuple[int, int] | None:
        return self.images.size if self.images else None

    def measure(
        self, extractor: FeatureExtractor, folder: pathlib.Path, weights: str, config: ml_collections.ConfigDict
    ) -> tuple[Statistics, np.ndarray | None]:
        """Return its statistics, and the pool3 features for precision and recall (None without images).

        Args:
            folder: where measurements are kept, unless config.evaluate.cache names another folder.
        """
        settings, measured = config.evaluate, None
        num_kept = settings.precision_recall_reference if settings.precision_recall_samples else 0
        if self.images is not None and (self.statistics is None or num_kept):
            path = folder / "reference.npz"
            if settings.cache:  # which may hold several references
                named = digest(measured_from(self.images, weights, num_kept).encode())
                path = storage.path(settings.cache) / f"reference_{named[:16]}.npz"
            measured = measure(self.images, extractor, path, weights, num_kept, settings.save_every)
        statistics = self.statistics
        if statistics is None:
            assert measured is not None
            statistics = measured.statistics()
        return statistics, measured.pool3() if measured else None


def open_reference(config: ml_collections.ConfigDict) -> ReferenceSet:
    """Open the ADM .npz of config.evaluate.reference, or else the images of config.data."""
    path = config.evaluate.reference
    if not path:
        images = source_images(config)
        return ReferenceSet(images.name, None, images, [])
    file = read_reference(path)
    return ReferenceSet(
        str(path), file.statistics, npz_images(file.images) if file.images else None, list(file.warnings)
    )

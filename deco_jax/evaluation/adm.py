"""FID, sFID, Inception Score, precision and recall, as the ADM suite defines them.

    samples (drawn on the way, an .npz, a folder)       ─┐
                                                         ├─ Inception ─ Accumulator ─ scores
    reference (an ADM .npz, or the images of the data)  ─┘

Images are read in batches and only their statistics are kept, in a folder from where a run that was cut off goes on.
Runs that share config.evaluate.cache, a folder, use the reference that the first of them to end measured.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.errors import UserError
from deco_jax.evaluation import ADM_TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.image_sets import ImageSet, digest, npz_images, sides, source_images
from deco_jax.evaluation.measuring import Reader, fingerprint_of, read
from deco_jax.evaluation.precision_recall import precision_recall
from deco_jax.evaluation.statistics import Accumulator, Statistics, read_reference, small_sample_warning
from deco_jax.models.inception import FeatureExtractor
from deco_jax.models.inception_weights import WHERE, load_inception
from deco_jax.run import storage

FOLDER = "evaluation"
NEIGHBOURS = 3


class InceptionFeatures:
    """Statistics of Inception's features, of samples and of the reference, for all evaluators that want them.

    Args:
        folder: a run's, below which they are kept.
        most: samples that a subject will have, at most.

    Raises:
        UserError: there are no weights, or no reference.
    """

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, most: int) -> None:
        self.path = inception_path(config)
        self.reference = open_reference(config)
        self.config, self.folder = config, folder / FOLDER
        self.weights = digest(self.path.read_bytes())
        self.extractor = FeatureExtractor(load_inception(self.path), min(config.evaluate.batch_size, most), mesh)
        self._reader: Reader[Accumulator] | None = None

    def reader(self, samples: ImageSet, kept: bool = True) -> Reader[Accumulator]:
        """Measure samples; `kept`: in the folder, from where it goes on, and one reader for all who ask."""
        settings, path = self.config.evaluate, self.folder / "samples.npz"
        if not kept:
            return inception_reader(samples, self.extractor, None, self.weights, 0, 1)
        num_kept = settings.precision_recall_samples
        wanted = measured_from(samples, self.weights, num_kept)
        if self._reader is None or self._reader.state.fingerprint != wanted:
            save_every = settings.save_every
            self._reader = inception_reader(samples, self.extractor, path, self.weights, num_kept, save_every)
        return self._reader

    def of_samples(self, samples: ImageSet) -> Accumulator:
        """Return what there is to know of samples; those that are measured already aren't drawn again."""
        reader = self.reader(samples)
        read(samples, [reader], self.extractor.batch_size)
        return reader.state

    @functools.cached_property
    def of_reference(self) -> tuple[Statistics, np.ndarray | None]:
        """The reference's statistics, and its pool3 features for precision and recall, if there are any."""
        return self.reference.measure(self.extractor, self.folder, self.weights, self.config)


class ADM:
    """The evaluator of these scores.

    Args:
        features: of samples and of the reference.
        quick: FID alone, of samples whose statistics aren't kept; as on the way of a training.
    """

    def __init__(self, features: InceptionFeatures, mesh: Mesh, quick: bool = False) -> None:
        self.titles = {"fid": ADM_TITLES["fid"]} if quick else ADM_TITLES
        self._features, self._mesh, self._quick = features, mesh, quick

    def readers(self, samples: ImageSet) -> list[Reader]:
        return [self._features.reader(samples)]

    def __call__(self, subject: Subject) -> Scores:
        """Scores of a subject's samples. The reference is measured at the first call."""
        samples, features = subject.samples, self._features
        if samples is None:
            raise UserError("FID and its companions are of samples, and there are none; give a checkpoint or samples")
        if self._quick:
            return Scores({"fid": self._quick_fid(samples)})
        ours = features.of_samples(samples)
        theirs, kept = features.of_reference
        scores, missing = score(ours, theirs, kept, features.config.evaluate, self._mesh)
        if not features.extractor.has_classifier:
            missing["inception_score"] = (
                f"{features.path} has no classifier; pt_inception-2015-12-05-6726825d.pth has one"
            )
        if theirs.mu_s is None:
            missing["sfid"] = f"{features.reference.name} has no 'mu_s' and 'sigma_s'"
        notes = {
            "samples": {"from": samples.name, "images": samples.total, "kept": _length(ours.pool3())},
            "reference": {"from": features.reference.name, "images": theirs.num_images, "kept": _length(kept)},
            "neighbours": NEIGHBOURS,
            "parameters": samples.parameters,
            "inception": {"path": str(features.path), "sha256": features.weights},
        }
        return Scores(scores, missing, notes)

    def _quick_fid(self, samples: ImageSet) -> float:
        theirs, _ = self._features.of_reference
        reader = self._features.reader(samples, kept=False)
        read(samples, [reader], self._features.extractor.batch_size, quiet=True)
        ours = reader.state.statistics()
        return frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if the weights are missing."""
    inception_path(config)


def make(setup: Setup) -> ADM:
    """Make the evaluator of config.evaluate.metrics="adm"."""
    return ADM(setup.inception, setup.mesh)


def make_quick_fid(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh) -> ADM:
    """FID of a few samples every config.evaluate.every steps, on the way of a training.

    Its number is comparable along a run only: few samples give a higher FID than the usual 50,000. The reference's
    statistics are kept in WORKDIR/evaluation, or in config.evaluate.cache.
    """
    most = config.evaluate.during_training_images
    return ADM(InceptionFeatures(config, folder, mesh, most), mesh, quick=True)


def warnings_about(samples: ImageSet, reference: ReferenceSet) -> list[str]:
    """What makes the scores less than comparable. UserError for sets too small to have any."""
    lines = []
    for count, what in ((samples.total, "samples"), (reference.num_images, "reference images")):
        if count is not None and count < 2:
            raise UserError(f"{what}: {count}; a FID needs at least 2 (50,000 is usual)")
        if count is not None:
            lines.append(small_sample_warning(count, what))
    if reference.size and reference.size != samples.size:
        lines.append(
            f"samples of {sides(samples.size)} against reference images of {sides(reference.size)}: "
            "a FID across sizes also counts what resizing does"
        )
    return [line for line in lines if line] + reference.notes


def score(
    samples: Accumulator, reference: Statistics, features: np.ndarray | None, settings: Any, mesh: Mesh
) -> tuple[dict[str, float], dict[str, str]]:
    """The scores that can be had, and why the others can't.

    Args:
        features: the reference's pool3 [n, 2048] for precision and recall, if there are any.
    """
    stats = samples.statistics()
    scores = {"fid": frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)}
    missing: dict[str, str] = {}
    if reference.mu_s is not None and reference.sigma_s is not None and stats.mu_s is not None:
        scores["sfid"] = frechet_distance(stats.mu_s, stats.sigma_s, reference.mu_s, reference.sigma_s)  # type: ignore[arg-type]
    inception_score = samples.inception_score()
    if inception_score is not None:
        scores["inception_score"] = inception_score
    ours = samples.pool3()
    if not settings.precision_recall_samples or not settings.precision_recall_reference:
        reason = "turned off: config.evaluate.precision_recall_samples or precision_recall_reference is 0"
    elif features is None:
        reason = "the reference has no images ('arr_0')"
    elif min(_length(ours), _length(features)) <= NEIGHBOURS:
        reason = f"needs more than {NEIGHBOURS} images on both sides"
    else:
        assert ours is not None
        scores["precision"], scores["recall"] = precision_recall(features, ours, NEIGHBOURS, mesh=mesh)
        return scores, missing
    return scores, {"precision": reason, "recall": reason}


def inception_path(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where the weights are. UserError, with where to get them, if they aren't."""
    path = config.evaluate.inception
    if not path:
        raise UserError(f"config.evaluate.inception is empty; give the path of the Inception weights: {WHERE}")
    path = os.fspath(storage.local(path))
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
    """Measure all statistics of a set.

    Args:
        path, save_every: see `measuring.Reader`.
        weights: digest of the Inception weights.
        num_kept: how many images' pool3 to keep, evenly spread over the set; 0: none.
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
    """Read a set alone; arguments as of `inception_reader`."""
    reader = inception_reader(images, extractor, path, weights, num_kept, save_every)
    read(images, [reader], extractor.batch_size, quiet)
    return reader.state


def measured_from(images: ImageSet, weights: str, num_kept: int) -> str:
    """Names everything that the statistics of a set depend on, as `measure` takes it."""
    return fingerprint_of(images, f"weights {weights}", f"{min(num_kept, images.total)} kept")


class ReferenceSet(NamedTuple):
    """What samples are compared with: statistics that are known, images, or both."""

    name: str
    statistics: Statistics | None
    images: ImageSet | None
    notes: list[str]

    @property
    def num_images(self) -> int | None:
        """Images behind its statistics; None where a file doesn't say."""
        if self.statistics is not None:
            return self.statistics.num_images
        return self.images.total if self.images else None

    @property
    def size(self) -> tuple[int, int] | None:
        return self.images.size if self.images else None

    def measure(
        self, extractor: FeatureExtractor, folder: pathlib.Path, weights: str, config: ml_collections.ConfigDict
    ) -> tuple[Statistics, np.ndarray | None]:
        """Its statistics, and the pool3 features for precision and recall (None without images).

        Args:
            folder: where what is measured is kept, unless config.evaluate.cache names another.
        """
        settings, measured = config.evaluate, None
        num_kept = settings.precision_recall_reference if settings.precision_recall_samples else 0
        if self.images is not None and (self.statistics is None or num_kept):
            path = folder / "reference.npz"
            if settings.cache:  # where several may lie
                named = digest(measured_from(self.images, weights, num_kept).encode())
                path = storage.path(settings.cache) / f"reference_{named[:16]}.npz"
            measured = measure(self.images, extractor, path, weights, num_kept, settings.save_every)
        statistics = self.statistics
        if statistics is None:
            assert measured is not None
            statistics = measured.statistics()
        return statistics, measured.pool3() if measured else None


def open_reference(config: ml_collections.ConfigDict) -> ReferenceSet:
    """The ADM .npz of config.evaluate.reference, else the images of config.data."""
    path = config.evaluate.reference
    if not path:
        images = source_images(config)
        return ReferenceSet(images.name, None, images, [])
    file = read_reference(path)
    return ReferenceSet(
        str(path), file.statistics, npz_images(file.images) if file.images else None, list(file.warnings)
    )


def _length(array: np.ndarray | None) -> int:
    return 0 if array is None else len(array)

"""FID, sFID, Inception Score, precision and recall, as the ADM suite defines them.

    samples (drawn on the way, an .npz, a folder)       ─┐
                                                         ├─ Inception ─ Accumulator ─ scores
    reference (an ADM .npz, or the images of the data)  ─┘

Images are read in batches and only their statistics are kept, in a folder from where a run that was cut off goes on.
Runs that share config.evaluate.cache, a folder, use the reference that the first of them to end measured.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.convert.inception import WHERE, load_inception
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.evaluator import Scores, Subject
from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.image_sets import ImageSet, digest, npz_images, rebatched, sides, source_images
from deco_jax.evaluation.precision_recall import precision_recall
from deco_jax.evaluation.statistics import Accumulator, Statistics, read_reference, small_sample_warning
from deco_jax.models.inception import FeatureExtractor
from deco_jax.run import distributed, storage

FOLDER = "evaluation"
NEIGHBOURS = 3
SECONDS_BETWEEN_LINES = 10.0


class ADM:
    """The evaluator of these scores.

    Args:
        folder: a run's, below which statistics are kept.
        most: samples that a subject will have, at most.
        quick: FID alone, of samples whose statistics aren't kept; as on the way of a training.

    Raises:
        UserError: there are no weights, or no reference.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, most: int, quick: bool = False
    ) -> None:
        self.titles = {"fid": TITLES["fid"]} if quick else TITLES
        self._inception = inception_path(config)
        self.reference = open_reference(config)
        self._config, self._mesh, self._folder, self._quick = config, mesh, folder / FOLDER, quick
        self._weights = digest(self._inception.read_bytes())
        self._extractor = FeatureExtractor(load_inception(self._inception), min(config.evaluate.batch_size, most), mesh)
        self._theirs = self.reference.statistics if quick else None

    def __call__(self, subject: Subject) -> Scores:
        """Scores of a subject's samples. The reference is measured at the first call."""
        samples, settings = subject.samples, self._config.evaluate
        if samples is None:
            raise UserError("FID and its companions are of samples, and there are none; give a checkpoint or samples")
        if self._quick:
            return Scores({"fid": self._quick_fid(samples)})
        ours = measure(
            samples,
            self._extractor,
            self._folder / "samples.npz",
            self._weights,
            settings.precision_recall_samples,
            settings.save_every,
        )
        theirs, features = self.reference.measure(self._extractor, self._folder, self._weights, self._config)
        scores, missing = score(ours, theirs, features, settings, self._mesh)
        if not self._extractor.has_classifier:
            missing["inception_score"] = (
                f"{self._inception} has no classifier; pt_inception-2015-12-05-6726825d.pth has one"
            )
        if theirs.mu_s is None:
            missing["sfid"] = f"{self.reference.name} has no 'mu_s' and 'sigma_s'"
        notes = {
            "samples": {"from": samples.name, "images": samples.total, "kept": _length(ours.pool3())},
            "reference": {"from": self.reference.name, "images": theirs.num_images, "kept": _length(features)},
            "neighbours": NEIGHBOURS,
            "parameters": samples.parameters,
            "inception": {"path": str(self._inception), "sha256": self._weights},
        }
        return Scores(scores, missing, notes)

    def _quick_fid(self, samples: ImageSet) -> float:
        if self._theirs is None:
            self._theirs, _ = self.reference.measure(self._extractor, self._folder, self._weights, self._config)
        ours = measure(samples, self._extractor, None, self._weights, 0, 1, say=lambda text: None).statistics()
        return frechet_distance(ours.mu, ours.sigma, self._theirs.mu, self._theirs.sigma)


def make_quick_fid(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh) -> ADM:
    """FID of a few samples every config.evaluate.every steps, on the way of a training.

    Its number is comparable along a run only: few samples give a higher FID than the usual 50,000. The reference's
    statistics are kept in WORKDIR/evaluation, or in config.evaluate.cache.
    """
    return ADM(config, folder, mesh, config.evaluate.during_training_images, quick=True)


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


def measure(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: pathlib.Path | None,
    weights: str,
    num_kept: int,
    save_every: int,
    say: Callable[[str], None] | None = None,
) -> Accumulator:
    """All statistics of a set, saved to `path` every `save_every` images and gone on with from there.

    Args:
        weights: digest of the Inception weights.
        num_kept: how many images' pool3 to keep, evenly spread over the set; 0: none.
    """
    num_kept = min(num_kept, images.total)
    fingerprint = measured_from(images, weights, num_kept)
    state = _load(path, fingerprint) or Accumulator(bool(num_kept), fingerprint=fingerprint)
    say = say or (lambda text: print(text, flush=True) if jax.process_index() == 0 else None)
    if state.count:
        say(f"{images.name}: {state.count:,} of {images.total:,} images are measured already")
    saved, spoke, began, first = state.count, time.monotonic(), time.monotonic(), state.count
    batches = images.batches(extractor.batch_size, state.count) if state.count < images.total else iter(())
    for batch in rebatched(batches, extractor.batch_size):
        index = np.arange(state.count, state.count + len(batch))
        state.add(extractor(batch), (index + 1) * num_kept // images.total > index * num_kept // images.total)
        done = state.count == images.total
        if path is not None and (done or state.count - saved >= save_every):
            if jax.process_index() == 0:
                state.save(path)
            saved = state.count
        if done or time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            speed = (state.count - first) / (spoke - began)
            say(f"{images.name}: {state.count:,} of {images.total:,} images measured, {speed:.3g} a second")
    return state


def measured_from(images: ImageSet, weights: str, num_kept: int) -> str:
    """Names everything that the statistics of a set depend on, as `measure` takes it."""
    return f"{images.identity} x {images.total}, weights {weights}, {min(num_kept, images.total)} kept"


def _load(path: pathlib.Path | None, fingerprint: str) -> Accumulator | None:
    """What was measured before, if it is of the same; on several hosts, if all of them can read it."""
    state = Accumulator.load(path) if path is not None and path.exists() else None
    if state is not None and state.fingerprint != fingerprint:
        state = None
    count = 0 if state is None else state.count
    return state if distributed.all_hosts(distributed.from_main_host(count) == count) else None


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

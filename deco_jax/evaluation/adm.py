"""FID, sFID, Inception Score, precision and recall, as the ADM suite defines them.

    samples (drawn when needed, an .npz, a folder)      ─┐
                                                         ├─ Inception ─ Accumulator ─ scores
    reference (an ADM .npz, or the images of the data)  ─┘

Images are read in batches, and only their statistics are kept, in a folder from which an interrupted run continues.
Runs that share the folder config.evaluate.cache use the reference statistics of the first run that finished them.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.errors import UserError
from deco_jax.evaluation import ADM_TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.image_sets import ImageSet, sides
from deco_jax.evaluation.inception_features import InceptionFeatures, ReferenceSet, inception_path
from deco_jax.evaluation.measuring import Reader, read
from deco_jax.evaluation.precision_recall import precision_recall
from deco_jax.evaluation.statistics import Accumulator, Statistics, small_sample_warning

NEIGHBOURS = 3


class ADM:
    """Scores samples by these metrics.

    Args:
        features: of samples and of the reference.
        quick: only FID, and without keeping the samples' statistics; for use during training.
    """

    def __init__(self, features: InceptionFeatures, mesh: Mesh, quick: bool = False) -> None:
        self.titles = {"fid": ADM_TITLES["fid"]} if quick else ADM_TITLES
        self._features, self._mesh, self._quick = features, mesh, quick

    def readers(self, samples: ImageSet) -> list[Reader]:
        return [self._features.reader(samples)]

    def __call__(self, subject: Subject) -> Scores:
        """Return the scores of a subject's samples. The first call measures the reference."""
        samples, features = subject.samples, self._features
        if samples is None:
            raise UserError("FID and the other ADM scores need samples; give a checkpoint or samples")
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
        theirs = self._features.reference.statistics
        if theirs is None:
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
    """Make the FID of a few samples that training measures every config.evaluate.every steps.

    It is only comparable within a run, because few samples give a higher FID than the usual 50,000. The reference's
    statistics are kept in WORKDIR/evaluation, or in config.evaluate.cache.
    """
    most = config.evaluate.during_training_images
    return ADM(InceptionFeatures(config, folder, mesh, most), mesh, quick=True)


def warnings_about(samples: ImageSet, reference: ReferenceSet) -> list[str]:
    """Return what limits the comparability of the scores; raise UserError for sets that are too small for any."""
    lines = []
    for count, what in ((samples.total, "samples"), (reference.num_images, "reference images")):
        if count is not None and count < 2:
            raise UserError(f"{what}: {count}; an FID needs at least 2 (50,000 is usual)")
        if count is not None:
            lines.append(small_sample_warning(count, what))
    if reference.size and reference.size != samples.size:
        lines.append(
            f"samples of {sides(samples.size)} against reference images of {sides(reference.size)}: "
            "an FID across sizes also includes the effect of resizing"
        )
    return [line for line in lines if line] + reference.notes


def score(
    samples: Accumulator, reference: Statistics, features: np.ndarray | None, settings: Any, mesh: Mesh
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the scores that can be computed, and the reasons why the others can't.

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


def _length(array: np.ndarray | None) -> int:
    return 0 if array is None else len(array)

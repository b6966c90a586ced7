"""Kernel Inception Distance: the squared maximum mean discrepancy of Inception's features (arXiv 1801.01401).

Unlike FID, its expectation doesn't depend on the number of images. It uses the same pool3 features as precision and
recall, so together with those it needs no second pass over the images.
"""

from __future__ import annotations

from typing import ClassVar

import ml_collections
import numpy as np

from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.evaluation.inception_features import InceptionFeatures, inception_path
from deco_jax.evaluation.measuring import Reader


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate of MMD² with the kernel (x·y/features + 1)³ (Bińkowski et al. 2018, eq. 4).

    Args:
        x, y: [n, features] and [m, features], at least two of each.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def between_different(a: np.ndarray) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return between_different(x) + between_different(y) - 2 * float(kernel(x, y).mean())


def kernel_distances(x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int = 0) -> np.ndarray:
    """Return `squared_mmd` of random subsets, drawn without replacement: float64 [subsets].

    Args:
        size: images per subset; if the smaller set has fewer, all of it.
    """
    size, random = min(size, len(x), len(y)), np.random.default_rng(seed)
    if size < 2:
        raise UserError(f"KID needs at least 2 images on both sides, but there are {len(x)} and {len(y)}")
    return np.array(
        [
            squared_mmd(*(points[random.choice(len(points), size, replace=False)] for points in (x, y)))
            for _ in range(subsets)
        ]
    )


class KID:
    """Scores samples by the mean over subsets of Inception's features."""

    titles: ClassVar = {"kid": TITLES["kid"]}

    def __init__(self, features: InceptionFeatures) -> None:
        self._features = features

    def readers(self, samples: ImageSet) -> list[Reader]:
        return [self._features.reader(samples)]

    def __call__(self, subject: Subject) -> Scores:
        """Return KID, in evaluation.json with the spread over the subsets."""
        if subject.samples is None:
            raise UserError("KID needs samples; give a checkpoint or samples")
        settings = self._features.config.evaluate
        ours = self._features.of_samples(subject.samples).pool3()
        _, theirs = self._features.of_reference
        if ours is None or theirs is None:
            reason = (
                "the reference has no images ('arr_0'), or config.evaluate.precision_recall_samples or "
                "precision_recall_reference, whose features it uses, is 0"
            )
            return Scores({}, {"kid": reason})
        found = kernel_distances(theirs, ours, settings.kid_subsets, settings.kid_subset_size)
        size = min(settings.kid_subset_size, len(ours), len(theirs))
        notes = {"subsets": settings.kid_subsets, "subset_size": size, "standard_deviation": float(found.std())}
        return Scores({"kid": float(found.mean())}, notes={"kid_of": notes})


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if Inception's weights are missing."""
    inception_path(config)


def make(setup: Setup) -> KID:
    """Make the evaluator of config.evaluate.metrics="kid"."""
    return KID(setup.inception)

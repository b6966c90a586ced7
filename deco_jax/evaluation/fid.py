"""Fréchet distance and Inception Score, in float64 NumPy."""

from __future__ import annotations

import numpy as np

from deco_jax.errors import UserError

SPLIT = 5000


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return |mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½) (arXiv 1706.08500).

    This is FID for pool3 features and sFID for spatial ones. mu: [features]; sigma: [features, features], symmetric and
    positive semi-definite, of any rank. The trace of the root is computed as the nuclear norm of sigma1^½ sigma2^½.
    That is the same number, but an eigenvalue that rounding left at 1e-16 adds 1e-16 instead of its root, so no offset
    on the diagonal is needed when there are fewer images than features.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise UserError(
            f"statistics of different features can't be compared: mean {mu1.shape} and {mu2.shape}, "
            f"covariance {sigma1.shape} and {sigma2.shape}"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold non-finite values; the covariance needs at least 2 images")
    product = _half(sigma1).T @ _half(sigma2)
    root_trace = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2.0 * root_trace)


def _half(sigma: np.ndarray) -> np.ndarray:
    """Return H [features, rank] with H Hᵀ = sigma, without directions that only come from rounding."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))) of every `split` images in file order, averaged over the splits (arXiv 1606.03498).

    It is computed as a stream: for each split it keeps the sum of probabilities, the sum of p log p, and the count. The
    last split may be shorter, as in the ADM suite.
    """

    def __init__(self, num_classes: int, split: int = SPLIT):
        if split < 1:
            raise UserError(f"Inception Score in splits of {split} images; splits need at least 1 image")
        self.split = split
        self.probabilities = np.zeros((0, num_classes))
        self.negative_entropy = np.zeros(0)
        self.counts = np.zeros(0, np.int64)

    def add(self, log_softmax: np.ndarray) -> None:
        """Add the log probabilities [n, num_classes] of the next n images."""
        while len(log_softmax):
            if not len(self.counts) or self.counts[-1] == self.split:
                self.probabilities = np.vstack([self.probabilities, np.zeros(self.probabilities.shape[1])])
                self.negative_entropy = np.append(self.negative_entropy, 0.0)
                self.counts = np.append(self.counts, 0)
            room = self.split - int(self.counts[-1])
            part, log_softmax = np.asarray(log_softmax[:room], np.float64), log_softmax[room:]
            p = np.exp(part)
            self.probabilities[-1] += p.sum(0)
            # p log p is 0 where p underflows, whatever the logarithm is
            self.negative_entropy[-1] += np.sum(p * np.where(p > 0, part, 0.0))
            self.counts[-1] += len(part)

    def score(self) -> float:
        """Return the score, between 1 and num_classes; raise UserError without images."""
        if not len(self.counts):
            raise UserError("no images to take an Inception Score of")
        marginal = self.probabilities / self.counts[:, None]
        entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0)), axis=1)
        return float(np.mean(np.exp(self.negative_entropy / self.counts + entropy)))


def inception_score(softmax: np.ndarray, split: int = SPLIT) -> float:
    """Return the Inception Score from probabilities [n, classes] in file order, all at once."""
    with np.errstate(divide="ignore"):
        logarithms = np.log(np.asarray(softmax, np.float64))
    scorer = InceptionScore(softmax.shape[1], split)
    scorer.add(logarithms)
    return scorer.score()

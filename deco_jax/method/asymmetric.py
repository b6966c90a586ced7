"""Predict the noise within a small subspace of a patch and the clean image outside it (AsymFlow, arXiv 2605.12964).

The subspace is spanned by the top eigenvectors A [patch dimension, rank] of the uncentred Gram matrix of the data's
patches; P = A·Aᵀ. The network predicts y ≈ P·ε − x, whose velocity is v = −[P·y + (I − P)(x_t + y)/(1 − t)]. Rank 0 is
x-prediction, full rank v-prediction, both with the sign turned.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.models.layers import patchify, unpatchify
from deco_jax.shapes import Basis, Gram, Images, Times, Vectors


def gram_matrix(batches: Iterable[np.ndarray], patch_size: int) -> Gram:
    """Return the mean of p·pᵀ over all patches p of the images, float64 [3·patch², 3·patch²].

    Args:
        batches: of images [batch, height, width, 3] in ±1.

    Raises:
        ValueError: there are no images.
    """
    size = 3 * patch_size**2
    total, count = np.zeros((size, size)), 0
    for images in batches:
        batch, height, width, _ = images.shape
        patches = images.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, 3)
        rows = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size).astype(np.float64)
        total += rows.T @ rows
        count += len(rows)
    if not count:
        raise ValueError("no images to estimate a basis from")
    return total / count


def top_eigenvectors(gram: Gram, rank: int) -> Vectors:
    """Return the eigenvectors of the largest eigenvalues, float64 [patch dimension, rank], orthonormal columns."""
    if not 0 <= rank <= len(gram):
        raise ValueError(f"a rank of {rank} is not within 0..{len(gram)}")
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :rank]


def project(images: Images, basis: Basis, patch_size: int) -> Images:
    """Return the part of each patch within the subspace: images [batch, height, width, 3] → the same shape.

    Args:
        basis: [3·patch², rank], orthonormal columns.
    """
    _, height, width, _ = images.shape
    patches = patchify(images, patch_size)  # [batch, tokens, patch², 3]
    rows = patches.reshape(*patches.shape[:2], -1)
    with jax.default_matmul_precision("highest"):
        inside = (rows @ basis) @ basis.T
    return unpatchify(inside.reshape(patches.shape), patch_size, height, width)


def asymmetric_target(x: Images, noise: Images, basis: Basis, patch_size: int) -> Images:
    """Return what the network learns, y = P·ε − x; all [batch, height, width, 3]."""
    return project(noise, basis, patch_size) - x


def asymmetric_velocity(output: Images, x_t: Images, t: Times, basis: Basis, patch_size: int, floor: float) -> Images:
    """Return the velocity that an output y [batch, height, width, 3] stands for at x_t.

    Args:
        t: [batch] or a scalar, in [0, 1].
        floor: of 1 − t; 1e-6 in training and 0.04 in sampling as published.
    """
    remaining = jnp.maximum(1 - jnp.reshape(t, (-1, 1, 1, 1)), floor)
    outside = (x_t + output) / remaining
    return project(outside - output, basis, patch_size) - outside

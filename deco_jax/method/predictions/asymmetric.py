"""Predicts the noise within a small subspace of a patch and the clean image outside it (AsymFlow, arXiv 2605.12964).

The subspace is spanned by the top eigenvectors A [patch dimension, rank] of the uncentred Gram matrix of the data's
patches; P = A·Aᵀ. The network predicts y ≈ P·ε − x, whose velocity is v = −[P·y + (I − P)(x_t + y)/(1 − t)]. Rank 0 is
x-prediction and full rank is v-prediction, both with the opposite sign.

Within the subspace, −y is the velocity; outside it, −y is the image. Read this way it works on every path, and on the
straight line it is the published formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deco_jax.method.paths import MIN_REMAINING_TIME, Path, Point
from deco_jax.method.predictions.prediction import Prediction
from deco_jax.models.layers import patchify, unpatchify
from deco_jax.shapes import Basis, Gram, Images, Times, Vectors

# The published floors of 1 − t.
FLOOR_IN_TRAINING = 1e-6
FLOOR_IN_SAMPLING = 0.04


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


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it holds an array
class AsymmetricPrediction(Prediction):
    """The output is P·ε − x on the straight path; on any path, −v within the subspace and −x outside it.

    Args:
        rank: of the subspace, 0 to 3·patch_size²; at either extreme there is nothing to measure.
        floor: of 1 − t.
        basis: [3·patch_size², rank], orthonormal columns; see `given`.
    """

    path: Path
    rank: int
    patch_size: int
    floor: float = FLOOR_IN_TRAINING
    basis: Any = None

    @property
    def measured(self) -> Mapping[str, jax.ShapeDtypeStruct]:  # type: ignore[override]
        if self.rank in (0, self._full):
            return {}
        return {"basis": jax.ShapeDtypeStruct((self._full, self.rank), jnp.float32)}

    def measure(self, images: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        basis = top_eigenvectors(gram_matrix(images, self.patch_size), self.rank)
        return {"basis": basis.astype(np.float32)}

    def given(self, measured: Mapping[str, Any]) -> AsymmetricPrediction:
        return dataclasses.replace(self, basis=measured["basis"]) if self.measured else self

    def in_sampling(self) -> AsymmetricPrediction:
        return dataclasses.replace(self, floor=FLOOR_IN_SAMPLING)

    def velocity(self, output: Images, state: Images, t: Times) -> Images:
        inside = self._inside(-output)
        outside = self.path.velocity_of(self._image(-output, inside, state, t), state, t, self.floor)
        return outside + (inside - self._inside(outside))

    def image(self, output: Images, state: Images, t: Times) -> Images:
        return self._image(-output, self._inside(-output), state, t)

    def target(self, x: Images, point: Point, t: Times) -> Images:
        return point.velocity

    def image_target(self, x: Images, point: Point, t: Times) -> Images:
        inside = self._inside(point.velocity)
        return self._image(x - self._inside(x) + inside, inside, point.state, t)

    def weight(self, t: Array) -> Array:
        """Return min(1, (1 − t)/0.05): without the floor the velocity of the part outside grows without bound."""
        return jnp.minimum(1.0, (1 - t) / MIN_REMAINING_TIME)

    @property
    def _full(self) -> int:
        return 3 * self.patch_size**2

    def _inside(self, images: Images) -> Images:
        """Return the part within the subspace."""
        if self.rank == 0:
            return jnp.zeros_like(images)
        if self.rank == self._full:
            return images
        if self.basis is None:
            raise ValueError("an asymmetric prediction needs its basis; see `given`")
        return project(images, jnp.asarray(self.basis), self.patch_size)

    def _image(self, mixed: Images, inside: Images, state: Images, t: Times) -> Images:
        """Return the image that is `mixed` outside the subspace, and inside it where the velocity `inside` leads."""
        return mixed - inside + self._inside(self.path.image_of(inside, state, t))


def project(images: Images, basis: Basis, patch_size: int) -> Images:
    """Return the part of each patch within a subspace: images [batch, height, width, 3] → the same shape.

    Args:
        basis: [3·patch², rank], orthonormal columns.
    """
    _, height, width, _ = images.shape
    patches = patchify(images, patch_size)  # [batch, tokens, patch², 3]
    rows = patches.reshape(*patches.shape[:2], -1)
    with jax.default_matmul_precision("highest"):
        inside = (rows @ basis) @ basis.T
    return unpatchify(inside.reshape(patches.shape), patch_size, height, width)

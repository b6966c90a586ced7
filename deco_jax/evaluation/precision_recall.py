"""Improved precision and recall (arXiv 1904.06991): do samples lie on the data's manifold, and data on the samples'?

A manifold is the union of balls around its points; a ball's radius is the distance to the point's k-th nearest
neighbour. Distances are float32 and computed block by block on the accelerator, so the features themselves bound the
memory. One matrix product gives the distances of points that are far apart; for close points, they are summed from the
differences, so that equal points have distance 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deco_jax.errors import UserError
from deco_jax.run.sharding import place

# Squared distances below this share of the squared norms have lost too many digits in |a|² + |b|² − 2ab in float32, so
# they (and only they) are summed from the differences. Above it, the relative error is below 1e-4.
_NEAR = 1e-2


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    row_block: int = 2048,
    column_block: int = 8192,
    mesh: Mesh | None = None,
) -> tuple[float, float]:
    """Return precision and recall in [0, 1] of samples [m, features] against reference [n, features] (float32 pool3).

    Precision is the share of samples inside the ball of some reference image, recall the share of reference images
    inside the ball of some sample. Points on the boundary are inside. mesh: rows of a block are split over all of its
    axes.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise UserError(f"features of shapes {reference.shape} and {samples.shape} can't be compared")
    centre = np.asarray(np.mean(reference, axis=0, dtype=np.float64), np.float32)
    sets = [_Points(points, centre, row_block, column_block, mesh) for points in (reference, samples)]
    radii = [points.squared_radii(k) for points in sets]
    precision = sets[1].inside(sets[0], radii[0]).mean()
    recall = sets[0].inside(sets[1], radii[1]).mean()
    return float(precision), float(recall)


class _Points:
    """A set of points, stored whole on each device as padded blocks of columns, and readable in blocks of rows."""

    def __init__(
        self, features: np.ndarray, centre: np.ndarray, row_block: int, column_block: int, mesh: Mesh | None
    ) -> None:
        if mesh is None:
            mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        self.split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.slices, self.features = mesh.size, np.asarray(features, np.float32)
        self.centre = place(np.asarray(centre, np.float32), self.whole)
        count, width = self.features.shape
        self.row_block = -(-min(row_block, max(count, 1)) // mesh.size) * mesh.size
        self.column_block = min(column_block, max(count, 1))
        blocks = max(-(-count // self.column_block), 1)
        padded = np.zeros((blocks * self.column_block, width), np.float32)
        padded[:count] = self.features
        self.columns = place(padded.reshape(blocks, self.column_block, width), self.whole)

    def __len__(self) -> int:
        return len(self.features)

    def squared_radii(self, k: int) -> np.ndarray:
        if not 1 <= k < len(self):
            raise UserError(f"{len(self)} images are too few for neighbours of rank {k}; use at least {k + 1}")
        return self._by_rows(functools.partial(_squared_radii, k=k), self.columns, np.int32(len(self)))

    def inside(self, manifold: _Points, squared_radii: np.ndarray) -> np.ndarray:
        """Return which of these points lie in the other set's manifold, bool [n]."""
        blocks, size, _ = manifold.columns.shape
        padded = np.full(blocks * size, -1.0, np.float32)  # no distance is below a padded column's radius
        padded[: len(manifold)] = squared_radii
        return self._by_rows(_inside, manifold.columns, place(padded.reshape(blocks, size), self.whole))

    def _by_rows(self, function: Callable, *arguments: jax.Array | np.generic) -> np.ndarray:
        results: list[tuple[int, jax.Array | np.ndarray]] = []
        for start in range(0, len(self), self.row_block):
            rows = self.features[start : start + self.row_block]
            used = len(rows)
            rows = np.pad(rows, ((0, self.row_block - used), (0, 0)))
            index = np.arange(start, start + self.row_block, dtype=np.int32)
            placed = [place(array, self.split) for array in (rows, index, index < len(self))]
            results.append((used, function(*placed, self.centre, *arguments, slices=self.slices)))
            if len(results) > 1:  # one block ahead keeps the device busy and its queue short
                results[-2] = (results[-2][0], self._read(results[-2][1]))
        return np.concatenate([self._read(value)[:used] for used, value in results])

    def _read(self, value: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = jax.jit(lambda x: x, out_shardings=self.whole)(value)
        return np.asarray(value)


def _squared_distances(
    rows: jax.Array, columns: jax.Array, centre: jax.Array, counted: jax.Array, slices: int
) -> jax.Array:
    """Return squared distances, [r, features], [c, features] -> [r, c]; exactly zero for equal points.

    Args:
        counted: bool [r, c], the pairs whose distance matters.
        slices: a divisor of r: the number of rows, one per device, that are checked together for close pairs.
    """
    # A shift doesn't change distances, and centring reduces cancellation.
    a, b = rows - centre, columns - centre
    norms = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None, :]
    distances = norms - 2.0 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    near = counted & (distances <= _NEAR * norms)

    def by_differences(_: jax.Array) -> jax.Array:
        def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            row, distance, near = part  # [slices, features], [slices, c], [slices, c]
            return jax.lax.cond(
                jnp.any(near),
                # Use the points themselves: where the difference is small it is exact; that of centred points isn't.
                lambda: jnp.where(near, jnp.sum((row[:, None] - columns[None]) ** 2, axis=-1), distance),
                lambda: distance,
            )

        def split(array: jax.Array) -> jax.Array:  # each slice has a row of every device
            return jnp.swapaxes(array.reshape(slices, -1, array.shape[-1]), 0, 1)

        exact = jax.lax.map(one, (split(rows), split(distances), split(near)))
        return jnp.swapaxes(exact, 0, 1).reshape(distances.shape)

    return jnp.maximum(jax.lax.cond(jnp.any(near), by_differences, lambda d: d, distances), 0.0)


@functools.partial(jax.jit, static_argnames=("k", "slices"))
def _squared_radii(
    rows: jax.Array,
    index: jax.Array,
    used: jax.Array,
    centre: jax.Array,
    columns: jax.Array,
    count: jax.Array,
    *,
    k: int,
    slices: int,
) -> jax.Array:
    """Return each row's squared distance to its k-th nearest column, except itself and padding."""

    def body(nearest: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        points, number = block
        column = number * points.shape[0] + jnp.arange(points.shape[0], dtype=jnp.int32)
        excluded = (column[None, :] == index[:, None]) | (column >= count)[None, :]
        distances = _squared_distances(rows, points, centre, used[:, None] & ~excluded, slices)
        candidates = jnp.concatenate([nearest, jnp.where(excluded, jnp.inf, distances)], axis=1)
        return -jax.lax.top_k(-candidates, k)[0], None

    start = jnp.full((rows.shape[0], k), jnp.inf, jnp.float32)
    numbers = jnp.arange(columns.shape[0], dtype=jnp.int32)
    nearest, _ = jax.lax.scan(body, start, (columns, numbers))
    return nearest[:, -1]


@functools.partial(jax.jit, static_argnames="slices")
def _inside(
    rows: jax.Array,
    index: jax.Array,
    used: jax.Array,
    centre: jax.Array,
    columns: jax.Array,
    squared_radii: jax.Array,
    *,
    slices: int,
) -> jax.Array:
    del index

    def body(inside: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        points, radii = block
        counted = used[:, None] & (radii >= 0)[None, :]
        distances = _squared_distances(rows, points, centre, counted, slices)
        return inside | jnp.any(distances <= radii[None, :], axis=1), None

    inside, _ = jax.lax.scan(body, jnp.zeros(rows.shape[0], bool), (columns, squared_radii))
    return inside

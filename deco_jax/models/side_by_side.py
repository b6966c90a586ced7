"""Small networks for TPUs: several short vectors in a row, whose channels then fill a register's 128 lanes.

A product with a small matrix becomes one with that matrix several times along a diagonal; a mean over a vector's
channels and a sum over rows become products too, because moving lanes and adding up rows is dear and the matrix unit
would be idle. What isn't a product is float32: these chips have no bfloat16 arithmetic, so each rounding costs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deco_jax.models.layers import Dtype

LANES = 128


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows are laid out: `count` vectors in each. Products take their factors in `dtype`."""

    count: int
    dtype: Dtype

    @property
    def exact(self) -> bool:
        return self.dtype == jnp.float32

    @property
    def precision(self) -> str | None:
        return "highest" if self.exact else None

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return a @ b of factors in `dtype`, added up in float32."""
        precision = "highest" if self.exact else None
        return jnp.matmul(
            a.astype(self.dtype), b.astype(self.dtype), precision=precision, preferred_element_type=jnp.float32
        )

    def means(self, x: jax.Array, *, rounded: bool = False) -> jax.Array:
        """Put the mean of each vector in place of its channels, float32.

        Args:
            rounded: x may be rounded to `dtype`, as a gradient is anyway.
        """
        width = x.shape[-1] // self.count
        average = np.kron(np.eye(self.count), np.full((width, width), 1 / width)).astype(np.float32)
        if self.exact or rounded:
            return self.product(x, jnp.asarray(average))
        # Two bfloat16 hold 16 of a float32's 24 bits.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return self.product(jnp.concatenate([high, x - high], axis=-1), jnp.asarray(np.concatenate([average, average])))

    def sum(self, x: jax.Array) -> jax.Array:
        """[..., rows, channels] → [..., channels], float32."""
        return self.product(jnp.ones((8, x.shape[-2])), x)[..., 0, :]


def flat(x: jax.Array) -> jax.Array:
    """[..., channels] → [rows, channels]."""
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def shift(rows: Rows, x: jax.Array, vectors: jax.Array) -> jax.Array:
    """Return x [groups, rows, channels] + vectors [groups, channels], float32."""
    return x.astype(jnp.float32) + vectors[:, None].astype(jnp.float32)


def _shift(rows: Rows, x: jax.Array, vectors: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return shift(rows, x, vectors), (x[:0], vectors[:0])


def _shift_gradient(rows: Rows, like: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient.astype(like[0].dtype), rows.sum(gradient).astype(like[1].dtype)


shift.defvjp(_shift, _shift_gradient)


def along_diagonal(kernel: jax.Array, count: int) -> jax.Array:
    """[inputs, outputs] → [count · inputs, count · outputs], zero outside the diagonal's `count` copies."""
    inputs, outputs = kernel.shape
    copies = jnp.eye(count, dtype=kernel.dtype)[:, None, :, None] * kernel[None, :, None, :]
    return copies.reshape(count * inputs, count * outputs)


def linear(rows: Rows, layer: nnx.Linear, x: jax.Array, parts: int = 1) -> list[jax.Array]:
    """Apply a Linear to each vector: [..., count · inputs] → `parts` float32 arrays [..., count · outputs / parts].

    Each part is a product of its own, so that no gradients have to be put together.
    """
    assert layer.bias is not None
    kernels = jnp.split(layer.kernel[...], parts, axis=-1)
    biases = jnp.split(layer.bias[...], parts)
    return [
        affine(rows, x, along_diagonal(kernel, rows.count), jnp.tile(bias, rows.count))
        for kernel, bias in zip(kernels, biases, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def affine(rows: Rows, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x @ kernel + bias, float32."""
    return rows.product(x, kernel) + bias.astype(jnp.float32)


def _affine(
    rows: Rows, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return affine(rows, x, kernel, bias), (x, kernel, bias)


def _affine_gradient(
    rows: Rows, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, bias = saved
    x, gradient = (a.astype(rows.dtype) for a in (x, gradient))
    by_kernel = jnp.tensordot(
        x, gradient, axes=(list(range(x.ndim - 1)),) * 2, precision=rows.precision, preferred_element_type=jnp.float32
    )
    by_x = rows.product(gradient, kernel.T)
    return by_x.astype(saved[0].dtype), by_kernel.astype(kernel.dtype), rows.sum(flat(gradient)).astype(bias.dtype)


affine.defvjp(_affine, _affine_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def normalize(rows: Rows, x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Apply `layers.normalize` to each vector, in float32."""
    return _normalize(rows, x, epsilon)[0]


def _normalize(rows: Rows, x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = x.astype(jnp.float32)
    y = y - rows.means(y)
    scale = jax.lax.rsqrt(rows.means(y * y) + epsilon)
    return y * scale, (y * scale, scale)


def _normalize_gradient(
    rows: Rows, epsilon: float, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    y, scale = saved
    mean, along = rows.means(gradient, rounded=True), rows.means(gradient * y, rounded=True)
    return (scale * (gradient - mean - y * along),)


normalize.defvjp(_normalize, _normalize_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scale_and_shift(rows: Rows, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Return x · scale + shift with learned [width] vectors, float32."""
    return x * jnp.tile(scale, rows.count) + jnp.tile(shift, rows.count)


def _scale_and_shift(
    rows: Rows, x: jax.Array, scale: jax.Array, shift: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return scale_and_shift(rows, x, scale, shift), (x, scale)


def _scale_and_shift_gradient(
    rows: Rows, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = saved
    by_scale, by_shift = (rows.sum(flat(y)).reshape(rows.count, -1).sum(axis=0) for y in (gradient * x, gradient))
    return gradient * jnp.tile(scale, rows.count), by_scale, by_shift


scale_and_shift.defvjp(_scale_and_shift, _scale_and_shift_gradient)

"""The energy-guided path (arXiv 2608.05811): blurs an image so that it has as much energy as a time allows.

The endpoint e(t) of an image is its Gaussian blur of standard deviation 3.5·√τ pixels, where τ(t) falls from 1 at
the noise to 0 at the data so that the blur's missing energy follows a smooth release R(t). Everything is float32.

The blur is circular, so it is diagonal in frequency. A real Fourier basis turns it into three products with constant
matrices per channel instead of complex transforms. Energies at ±k are adjacent there and are added up, which leaves a
quarter of the frequencies for the bisection.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deco_jax.method.point import MIN_REMAINING_TIME, Point, per_example
from deco_jax.shapes import AnyFloats, Images, PerExample, Times

MAX_BLUR = 3.5  # pixels, at τ = 1
BISECTIONS = 16
# Limits of the published implementation: closer than this, a release counts as 0 or 1, and a slope as zero.
EDGE = 1e-6
TINY = 1e-12


class Endpoint(NamedTuple):
    """A blurred image and how it changes with time, both float32 [batch, height, width, 3]."""

    image: jax.Array
    velocity: jax.Array


def fourier_basis(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Build the real orthonormal Fourier basis of signals with `side` values.

    Returns:
        float64 [side, side], with a basis vector per column (the mean, then a cosine and a sine of each frequency), and
        the frequency of each column in cycles per signal, int [side].
    """
    position = np.arange(side)
    columns, frequency = [np.full(side, 1 / math.sqrt(side))], [0]
    for k in range(1, side // 2 + 1):
        angle = 2 * np.pi * k * position / side
        if 2 * k == side:
            columns.append(np.cos(angle) / math.sqrt(side))
            frequency.append(k)
        else:
            columns += [np.cos(angle) * math.sqrt(2 / side), np.sin(angle) * math.sqrt(2 / side)]
            frequency += [k, k]
    return np.stack(columns, axis=1), np.asarray(frequency)


def release(t: AnyFloats) -> tuple[AnyFloats, AnyFloats]:
    """Return the share of the energy released at t in [0, 1], R = t³(6t² − 15t + 10), and its derivative."""
    return t**3 * (6 * t**2 - 15 * t + 10), 30 * t**2 * (1 - t) ** 2


def blurred_endpoint(x: Images, t: PerExample, exact_derivative: bool = False) -> Endpoint:
    """Blur images x [batch, height, width, 3] as the energy-guided path does at times t [batch] in [0, 1].

    Args:
        exact_derivative: how τ changes with x and t is part of JAX's derivatives, by implicit differentiation of what
            the bisections solve; otherwise τ counts as a constant, as in the published implementation.

    Returns:
        The endpoint e(t) and its derivative in t (arXiv 2608.05811; 0 where the release stands still).
    """
    height, width = x.shape[1:3]
    (rows, row_k), (columns, column_k) = fourier_basis(height), fourier_basis(width)
    rate = (math.pi * MAX_BLUR) ** 2
    # exp(−rate·τ·q) with q = (fy² + fx²)/0.5 is the product of a factor per row and a factor per column.
    row_q, column_q = 2 * (np.arange(height // 2 + 1) / height) ** 2, 2 * (np.arange(width // 2 + 1) / width) ** 2
    q = jnp.asarray(row_q[:, None] + column_q, jnp.float32)
    t = t.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        basis = [jnp.asarray(matrix, jnp.float32) for matrix in (rows, columns)]
        spectrum = jnp.einsum("bhwc,hk,wl->bklc", x.astype(jnp.float32), *basis)
        fold = [jnp.asarray(np.eye(n // 2 + 1)[k], jnp.float32) for n, k in ((height, row_k), (width, column_k))]
        energy = jnp.einsum("bkl,km,ln->bmn", jnp.sum(spectrum**2, axis=-1), *fold)

        def kept(tau: jax.Array) -> jax.Array:
            """[batch] → [batch, height//2 + 1, width//2 + 1]."""
            row, column = (jnp.exp(-rate * tau[:, None] * jnp.asarray(q, jnp.float32)) for q in (row_q, column_q))
            return row[:, :, None] * column[:, None, :]

        least = kept(jnp.ones_like(t))

        def missing(tau: jax.Array) -> jax.Array:
            return jnp.sum(energy * (kept(tau) - least) ** 2, axis=(1, 2))

        total = missing(jnp.zeros_like(t))
        share, slope = release(t)

        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) / 2
            more = missing(middle) > share * total
            return jnp.where(more, middle, low), jnp.where(more, high, middle)

        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(t), jnp.ones_like(t)))
        tau = jnp.where(share <= EDGE, 1.0, jnp.where(share >= 1 - EDGE, 0.0, (low + high) / 2))

        def slope_of_missing(now: jax.Array) -> jax.Array:
            return -2 * rate * jnp.sum(energy * (now - least) * q * now, axis=(1, 2))

        if exact_derivative:
            tau = jax.lax.stop_gradient(tau)
            divisor = jax.lax.stop_gradient(slope_of_missing(kept(tau)))
            fixed = (share <= EDGE) | (share >= 1 - EDGE) | (total <= TINY) | (jnp.abs(divisor) <= TINY)
            step = jnp.where(fixed, 0.0, (share * total - missing(tau)) / jnp.where(fixed, 1.0, divisor))
            tau = tau + step - jax.lax.stop_gradient(step)  # the same value, Newton's derivative
        now = kept(tau)
        denominator = slope_of_missing(now)
        still = (slope <= 0) | (total <= TINY) | (jnp.abs(denominator) <= TINY)
        tau_slope = jnp.where(still, 0.0, slope * total / jnp.where(still, 1.0, denominator))

        spread = now[:, row_k][:, :, column_k, None]  # back to a value per basis vector
        change = -rate * tau_slope[:, None, None] * q * now
        image = jnp.einsum("bklc,hk,wl->bhwc", spectrum * spread, *basis)
        velocity = jnp.einsum("bklc,hk,wl->bhwc", spectrum * change[:, row_k][:, :, column_k, None], *basis)
    return Endpoint(image, velocity)


@dataclasses.dataclass(frozen=True)
class EnergyPath:
    """The path x_t = t·e(t) + (1 − t)·ε, whose endpoint e(t) sharpens from a blur to the image (arXiv 2608.05811).

    Args:
        exact_derivative: see `blurred_endpoint`; MeanFlow needs it, because it differentiates along the path.
    """

    exact_derivative: bool = False

    def point(self, x: Images, noise: Images, t: PerExample) -> Point:
        """Return x_t and its velocity e + t·ė − ε."""
        endpoint, t = blurred_endpoint(x, t, self.exact_derivative), per_example(t, x)
        return Point(t * endpoint.image + (1 - t) * noise, endpoint.image + t * endpoint.velocity - noise)

    def velocity_of(self, x: Images, state: Images, t: Times, floor: float = MIN_REMAINING_TIME) -> Images:
        """Return t·ė(x) + (e(x) − x_t) / max(1 − t, floor)."""
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
        endpoint, t = blurred_endpoint(x, t, self.exact_derivative), per_example(t, x)
        return t * endpoint.velocity + (endpoint.image - state) / jnp.maximum(1 - t, floor)

    def image_of(self, velocity: Images, state: Images, t: Times) -> Images:
        """Return x_t + (1 − t)·v̂, where the straight line leads: e + t·(1 − t)·ė, which is blurred at early times."""
        return state + (1 - per_example(t, state)) * velocity

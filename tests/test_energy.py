"""The energy-guided path against the published implementation, and against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method import energy
from tests.helpers import golden, relative_error

NAMES = ("endpoint", "endpoint_velocity", "state", "velocity")


def values(shape: str) -> dict[str, np.ndarray]:
    prefix = f"egfm/{shape}/"
    return {key.removeprefix(prefix): a for key, a in golden("beyond").items() if key.startswith(prefix)}


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_the_published_implementation(shape):
    g = values(shape)
    endpoint = energy.blurred_endpoint(g["x"], g["t"])
    path = energy.EnergyPath()
    state, velocity = path.point(g["x"], g["noise"], g["t"])
    for i in range(len(g["t"])):
        for name, ours in zip(NAMES, (*endpoint, state, velocity), strict=True):
            if np.any(g[name][i]):
                assert relative_error(ours[i], g[name][i]) < 1e-5, (name, g["t"][i])
            else:
                assert not np.any(ours[i]), (name, g["t"][i])
        implied = path.velocity_of(g["x_prediction"], g["state"], g["t"])
        assert relative_error(implied[i], g["velocity_of_x_prediction"][i]) < 1e-5


def smooth_endpoint(x: np.ndarray, t: float) -> np.ndarray:
    """The endpoint by complex transforms in float64, τ solved to the last bit."""
    height, width, _ = x.shape
    spectrum = np.fft.fft2(x.astype(np.float64), axes=(0, 1))
    q = (np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width)[None] ** 2) / 0.5
    rate, power = (np.pi * 3.5) ** 2, np.sum(np.abs(spectrum) ** 2, axis=-1)

    def missing(tau: float) -> float:
        return float(np.sum(power * (np.exp(-rate * tau * q) - np.exp(-rate * q)) ** 2))

    wanted = (t**3 * (6 * t**2 - 15 * t + 10)) * missing(0.0)
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) > wanted else (low, middle)
    return np.fft.ifft2(np.exp(-rate * low * q)[..., None] * spectrum, axes=(0, 1)).real


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_velocity_is_the_state_s_derivative(t):
    """By central differences of the float64 endpoint; what is left is the 16 bisections' step of 2⁻¹⁷ in τ."""
    g, h = values("wide"), 1e-4
    x, noise = g["x"][0], g["noise"][0].astype(np.float64)

    def state(t: float) -> np.ndarray:
        return t * smooth_endpoint(x, t) + (1 - t) * noise

    slope = (state(t + h) - state(t - h)) / (2 * h)
    _, velocity = energy.EnergyPath().point(x[None], noise[None].astype(np.float32), jnp.asarray([t]))
    assert relative_error(velocity[0], slope) < 1e-3


@pytest.mark.parametrize("t", [0.3, 0.6])
def test_the_derivative_of_a_predicted_image_s_velocity(t):
    """Along a change of x̂, state and time, as MeanFlow takes it; by central differences in float64, τ included."""
    g, h = values("wide"), 1e-4
    x, noise = g["x"][0].astype(np.float64), g["noise"][0].astype(np.float64)
    change, drift = (np.random.default_rng(i).normal(size=x.shape) for i in (0, 1))
    state = t * smooth_endpoint(x, t) + (1 - t) * noise

    def velocity(e: float) -> np.ndarray:
        image, time = x + e * change, t + e
        slope = (smooth_endpoint(image, time + h) - smooth_endpoint(image, time - h)) / (2 * h)
        return time * slope + (smooth_endpoint(image, time) - state - e * drift) / (1 - time)

    expected = (velocity(h) - velocity(-h)) / (2 * h)
    points = [jnp.asarray(a[None], jnp.float32) for a in (x, state)] + [jnp.asarray([t], jnp.float32)]
    ahead = [jnp.asarray(a[None], jnp.float32) for a in (change, drift)] + [jnp.ones(1)]
    found = {}
    for exact in (True, False):
        path = energy.EnergyPath(exact_derivative=exact)
        found[exact] = jax.jit(lambda *p, path=path: jax.jvp(path.velocity_of, p, tuple(ahead)))(*points)
    np.testing.assert_array_equal(found[True][0], found[False][0])
    assert relative_error(found[True][1][0], expected) < 2e-3
    assert relative_error(found[False][1][0], expected) > 0.05  # τ as a constant


@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_the_basis_is_orthonormal_and_ordered_by_frequency(side):
    basis, frequency = energy.fourier_basis(side)
    np.testing.assert_allclose(basis.T @ basis, np.eye(side), atol=1e-12)
    for column, k in zip(basis.T, frequency, strict=True):
        power = np.abs(np.fft.fft(column)) ** 2
        assert set(np.flatnonzero(power > 1e-9).tolist()) <= {k, (side - k) % side}


def test_flat_images_do_not_divide_by_zero():
    x = jnp.full((2, 8, 8, 3), 0.25)
    endpoint = jax.jit(energy.blurred_endpoint)(x, jnp.asarray([0.3, 0.7]))
    np.testing.assert_allclose(endpoint.image, 0.25, atol=1e-6)
    np.testing.assert_allclose(endpoint.velocity, 0.0, atol=1e-6)
    path = energy.EnergyPath(exact_derivative=True)
    zeros, ones = jnp.zeros_like(x), jnp.ones(2)
    for images in (x, zeros):
        moved = jax.jvp(lambda a, t: path.velocity_of(a, zeros, t), (images, jnp.asarray([0.0, 1.0])), (x, ones))
        assert all(np.all(np.isfinite(part)) for part in moved)

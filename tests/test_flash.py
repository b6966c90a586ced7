"""The attention kernels for TPUs, step by step on this machine, against float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deco_jax.models import flash, layers
from deco_jax.models.blocks import Attention, Block
from deco_jax.models.layers import rotary_angles
from deco_jax.run.sharding import compiling_for
from tests.helpers import relative_error

EPSILON = 1e-6


def reference(q, k, v, q_scale, k_scale, angles):
    """Attention of float64 arrays [batch, heads, channels, tokens], written out pair by pair."""

    def turned(x, scale, angles):
        y = x / np.sqrt(np.mean(x**2, axis=2, keepdims=True) + EPSILON) * scale[:, None]
        even, odd = y[:, :, 0::2].copy(), y[:, :, 1::2].copy()
        cos, sin = np.cos(angles).T, np.sin(angles).T
        y[:, :, 0::2], y[:, :, 1::2] = even * cos - odd * sin, even * sin + odd * cos
        return y

    missing = k.shape[-1] - len(angles)
    queries = turned(q, q_scale, angles)
    keys = turned(k, k_scale, np.pad(angles, ((0, missing), (0, 0))))
    scores = np.einsum("bhci,bhcj->bhij", queries, keys) / np.sqrt(q.shape[2])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhij,bhcj->bhci", weights / weights.sum(axis=-1, keepdims=True), v)


def arrays(heads: int, channels: int, tokens: int, more: int):
    draw = np.random.default_rng(tokens + more)
    columns = 16
    q = draw.normal(size=(2, heads, channels, tokens))
    k, v = draw.normal(size=(2, 2, heads, channels, tokens + more))
    scales = 1 + 0.3 * draw.normal(size=(2, channels))
    angles = rotary_angles(np.linspace(0, 16, columns), np.linspace(0, 16, tokens // columns), channels)
    return (q, k, v, *scales), angles.astype(np.float64), draw.normal(size=q.shape)


# One block of queries; two, with text behind the image; a group of two heads; a number that no block divides.
@pytest.mark.parametrize(("heads", "channels", "tokens", "more"), [(1, 24, 32, 0), (2, 8, 256, 16), (3, 16, 144, 0)])
def test_output_and_gradients(heads, channels, tokens, more, monkeypatch):
    monkeypatch.setattr(flash, "BLOCK", 128)
    inputs, angles, direction = arrays(heads, channels, tokens, more)

    @jax.jit
    def ours(direction, *inputs):
        q, k, v, *scales = inputs
        out, pull = jax.vjp(
            lambda q, k, v, *scales: flash.attention(
                q, k, v, scales, flash.tables(angles, tokens + more), epsilon=EPSILON
            ),
            q, k, v, *scales,
        )  # fmt: skip
        return out, pull(direction)

    out, gradients = ours(*(jnp.asarray(a, jnp.float32) for a in (direction, *inputs)))
    assert relative_error(out, reference(*inputs, angles)) < 2e-6
    draw = np.random.default_rng(7)
    for i, gradient in enumerate(gradients):  # along a random line, by central differences
        along = draw.normal(size=inputs[i].shape)
        moved = [
            reference(*(a + step * along if j == i else a for j, a in enumerate(inputs)), angles)
            for step in (1e-5, -1e-5)
        ]
        expected = np.sum((moved[0] - moved[1]) / 2e-5 * direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(along)
        assert abs(np.sum(np.asarray(gradient, np.float64) * along) - expected) < 1e-5 * scale


def test_bfloat16_is_close():
    inputs, angles, _ = arrays(1, 16, 128, 0)
    q, k, v, *scales = (jnp.asarray(a, jnp.float32) for a in inputs)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    out = flash.attention(*half, scales, flash.tables(angles, 128), epsilon=EPSILON)
    assert out.dtype == jnp.bfloat16
    rounded = [np.asarray(a, np.float64) for a in half]
    assert relative_error(out, reference(*rounded, *inputs[3:], angles)) < 0.01


@pytest.mark.parametrize("text", [0, 8])
def test_the_layer_is_the_same_with_and_without_the_kernel(text, monkeypatch):
    """Through XLA's attention and through the kernel, gradients of the weights too."""
    monkeypatch.setattr(layers, "on_tpu", lambda: True)
    layer = Attention(32, 4, with_text=bool(text), implementation="auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, 16, 32))
    words = jax.random.normal(jax.random.key(2), (2, text, 32)) if text else None
    angles = jnp.asarray(rotary_angles(np.arange(4), np.arange(4), 8))
    results = []
    for platform in ("cpu", "tpu"):

        def loss(weights):
            with compiling_for(platform):  # noqa: B023
                return jnp.sum(jnp.sin(nnx.merge(graph, weights)(x, angles, words)))

        results.append(jax.jit(jax.value_and_grad(loss))(weights))
    (expected, theirs), (value, found) = results
    assert relative_error(value, expected) < 1e-5
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "keys", "width", "taken"),
    [(256, 256, 72, 256), (1024, 1024, 72, 512), (256, 384, 64, 256), (288, 288, 64, 288), (4096, 4096, 72, 256)],
)
def test_sizes_of_the_models(tokens, keys, width, taken):
    assert flash.fits(tokens, keys, width)
    assert flash.query_block(tokens, keys) == taken


@pytest.mark.parametrize(("tokens", "keys", "width"), [(256, 256, 36), (1100, 1100, 72), (16384, 16384, 72)])
def test_what_does_not_fit_is_left_to_xla(tokens, keys, width):
    assert not flash.fits(tokens, keys, width)


@pytest.mark.parametrize(("platform", "spared"), [("cpu", 4), ("tpu", 2)])
def test_what_remat_attention_spares_the_backward_pass(platform, spared):
    """Output projections of attention and MLP; without the kernel also queries, keys and values, and their mixture."""
    make = functools.partial(Block, 32, 4, 40, attention="auto", dtype=jnp.float32)
    graph, weights = nnx.split(layers.stack(lambda rngs: make(rngs=rngs), 2, nnx.Rngs(0)))
    x, condition, angles = jnp.ones((2, 16, 32)), jnp.ones((2, 32)), jnp.ones((16, 4))

    def products(remat):
        def loss(weights):
            blocks = nnx.merge(graph, weights)
            h = layers.run_stack(blocks, x, lambda block, h: block(h, condition, angles), remat=remat)
            return jnp.sum(jnp.sin(h))

        with compiling_for(platform):
            return str(jax.make_jaxpr(jax.grad(loss))(weights)).count("dot_general[")

    assert products("full") - products("attention") == spared

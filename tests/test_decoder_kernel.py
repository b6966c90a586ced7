"""The decoder's kernels for TPUs, step by step on this machine, against the decoder of other platforms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deco_jax.models import decoder_kernel
from deco_jax.models.decoder import PixelDecoder
from deco_jax.run.sharding import compiling_for
from tests.helpers import relative_error

TOKENS = 16  # of an image of 16² with patches of 4


def make(dtype=jnp.float32, **changes):
    """Return a decoder's graph and weights, the zeros among them moved."""
    sizes = {"width": 32, "depth": 2, "query_size": 1, "interaction": "adaln", "chunk": 0, "rotary": False}
    decoder = PixelDecoder(24, patch_size=4, remat="none", dtype=dtype, rngs=nnx.Rngs(0), **{**sizes, **changes})
    graph, weights = nnx.split(decoder)
    draw = np.random.default_rng(0)
    return graph, jax.tree.map(lambda w: w + jnp.float32(draw.normal(scale=0.2, size=w.shape)), weights)


def results(graph, weights, platform, batch):
    """Return the output, and the gradients of a function of it by images, features and weights."""
    images = jax.random.normal(jax.random.key(1), (batch, 16, 16, 3))
    features = jax.random.normal(jax.random.key(2), (batch, TOKENS, 24))

    def loss(images, features, weights):
        with compiling_for(platform):
            out = nnx.merge(graph, weights)(images, features)
        return jnp.mean(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(images, features, weights)


def count_kernels(graph, weights, batch):
    x, features = jnp.ones((batch, 16, 16, 3)), jnp.ones((batch, TOKENS, 24))
    with compiling_for("tpu"):
        return str(jax.make_jaxpr(lambda w: nnx.merge(graph, w)(x, features))(weights)).count("pallas_call[")


# Five blocks of columns, and one; other widths, and tokens of four pixels with 12 values.
@pytest.mark.parametrize(
    ("batch", "changes"),
    [(40, {}), (8, {"rotary": True}), (8, {"width": 64, "depth": 1}), (16, {"width": 16}), (8, {"query_size": 2})],
)
def test_output_and_gradients(batch, changes):
    graph, weights = make(**changes)
    assert count_kernels(graph, weights, batch)
    with jax.default_matmul_precision("highest"):
        (theirs, expected), (ours, out) = (results(graph, weights, platform, batch) for platform in ("cpu", "tpu"))
    assert relative_error(out, expected) < 2e-6
    for (path, wanted), found in zip(jax.tree.leaves_with_path(theirs), jax.tree.leaves(ours), strict=True):
        assert relative_error(found, wanted) < 1e-5, path


def test_bfloat16_is_as_close_as_without_the_kernel(monkeypatch):
    """Both forms for TPUs against float32."""
    graph, weights = make()
    exact = results(graph, weights, "cpu", 8)
    graph, _ = make(jnp.bfloat16)
    kernel = results(graph, weights, "tpu", 8)
    monkeypatch.setattr(decoder_kernel, "columns_at_a_time", lambda rows: 0)
    without = results(graph, weights, "tpu", 8)
    for wanted, found, other in zip(*map(jax.tree.leaves, (exact, kernel, without)), strict=True):
        assert relative_error(found, wanted) < max(1.2 * relative_error(other, wanted), 1e-3)
        assert relative_error(found, wanted) > 0


@pytest.mark.parametrize(("batch", "changes"), [(5, {}), (8, {"interaction": "add"})])
def test_what_does_not_fit_is_left_to_xla(batch, changes):
    """Patches that don't fill the lanes, and conditions that are added."""
    graph, weights = make(**changes)
    assert not count_kernels(graph, weights, batch)
    (theirs, expected), (ours, out) = (results(graph, weights, platform, batch) for platform in ("cpu", "tpu"))
    assert relative_error(out, expected) < 1e-5
    for wanted, found in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert relative_error(found, wanted) < 1e-4


@pytest.mark.parametrize(("rows", "taken"), [(4096, 512), (16384, 512), (256, 256), (384, 384), (640, 128), (64, 0)])
def test_columns_at_a_time(rows, taken):
    assert decoder_kernel.columns_at_a_time(rows) == taken


def test_it_lowers_for_tpus():
    """Forwards and backwards, by the compiler's first half, which needs no TPU."""
    graph, weights = make(jnp.bfloat16)
    images, features = jnp.ones((8, 16, 16, 3)), jnp.ones((8, TOKENS, 24))

    def loss(weights):
        with compiling_for("tpu"):
            return jnp.sum(nnx.merge(graph, weights)(images, features))

    text = jax.jit(jax.value_and_grad(loss)).trace(weights).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2

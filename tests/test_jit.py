"""JiT and PixelGen's transformer against the official implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.convert.mapping import to_ours, to_torch
from deco_jax.models import jit
from deco_jax.models.network import functional
from tests.helpers import golden, relative_error

SMALL = {"width": 48, "depth": 4, "num_heads": 4, "patch_size": 4, "num_classes": 10}
OFFICIAL = {
    "plain": {**SMALL, "context_tokens": 4, "context_start": 2, "bottleneck": 0},
    "bottleneck": {**SMALL, "context_tokens": 3, "context_start": 1, "bottleneck": 16},
}


def network(**model):
    return functional(lambda rngs: jit.JiT(**model, rngs=rngs))


def state(name: str) -> dict[str, np.ndarray]:
    prefix = f"jit/{name}/state/"
    return {key.removeprefix(prefix): a for key, a in golden("beyond").items() if key.startswith(prefix)}


def inputs(name: str) -> tuple:
    g = golden("beyond")
    return g[f"jit/{name}/input"], g[f"jit/{name}/t"], g[f"jit/{name}/label"].astype(np.int32)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_implementation(name):
    params = to_ours(jit.table(OFFICIAL[name]), state(name), ignore=jit.FIXED, what="the golden file")
    with jax.default_matmul_precision("highest"):
        output, hidden = network(**OFFICIAL[name]).apply(params, *inputs(name), 3)
    assert relative_error(output, golden("beyond")[f"jit/{name}/output"]) < 5e-6
    assert relative_error(hidden["aligned"], golden("beyond")[f"jit/{name}/feature_before_block_3"]) < 5e-6


@pytest.mark.parametrize("name", OFFICIAL)
def test_weights_go_out_as_they_came_in(name):
    official = state(name)
    table = jit.table(OFFICIAL[name])
    back = to_torch(table, to_ours(table, official, ignore=jit.FIXED, what="the golden file"))
    assert set(back) == set(official) - {"pos_embed"}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, official[key])
    np.testing.assert_allclose(jit.wave_positions(4, 4, 48), official["pos_embed"][0], atol=1e-7)


@pytest.mark.parametrize(
    "model, count",
    [
        ({"width": 1152, "depth": 28, "context_start": 8}, 676_699_200),  # PixelGen-XL
        ({"width": 1024, "depth": 24, "context_start": 8, "bottleneck": 128}, 458_877_664),  # JiT-L/16
    ],
)
def test_parameter_counts_are_the_published_models(model, count):
    assert network(num_heads=16, patch_size=16, num_classes=1000, context_tokens=32, **model).num_params == count


def test_initial_values():
    params = network(**OFFICIAL["bottleneck"]).init(jax.random.key(0))
    blocks = params["blocks"]
    assert not np.any(blocks["modulation"]["kernel"])
    assert not np.any(params["output"]["linear"]["kernel"])
    assert not np.any(blocks["attention"]["qkv"]["bias"])
    # Xavier-uniform bounds of the official matrices: q, k and v are one, and so are gate and up.
    for kernel, fans in ((blocks["attention"]["qkv"]["kernel"], 48 + 144), (blocks["mlp"]["gate"]["kernel"], 48 + 256)):
        bound = np.sqrt(6 / fans)
        assert 0.97 * bound < np.max(np.abs(kernel)) <= bound
    for values in (params["time_embed"]["hidden"]["kernel"], params["context_positions"]):
        assert 0.015 < np.std(values) < 0.025


def test_dropout_is_each_example_s_own_and_in_the_middle_alone():
    """A row's result depends on its key, not on the batch; without keys nothing is dropped."""
    model = {**OFFICIAL["plain"], "dropout": 0.5}
    net, plain = network(**model), network(**OFFICIAL["plain"])

    # Zero gates would hide what the blocks do.
    def stirred(a: jax.Array) -> jax.Array:
        return a + 0.1 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)

    params = jax.tree.map(stirred, net.init(jax.random.key(1)))
    images, times, labels = map(jnp.asarray, inputs("plain"))
    keys = jax.random.split(jax.random.key(2), 3)
    run = jax.jit(lambda rows: net.apply(params, images[rows], times[rows], labels[rows], 1, keys[rows]))
    output, hidden = run(jnp.arange(3))
    turned, _ = run(jnp.asarray([2, 0, 1]))
    np.testing.assert_allclose(turned, output[jnp.asarray([2, 0, 1])], atol=1e-5)
    undropped, untouched = plain.apply(params, images, times, labels, 1)
    np.testing.assert_allclose(net.apply(params, images, times, labels)[0], undropped, atol=1e-5)
    assert relative_error(output, undropped) > 1e-2
    np.testing.assert_allclose(hidden["aligned"], untouched["aligned"], atol=1e-5)  # the first quarter has none

"""DeCo and its baselines against the values measured on the public implementation, and against plain loops."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from deco_jax.convert.deco import from_torch
from deco_jax.models import decoder, layers, network
from deco_jax.models.decoder import cosine_basis, embed_pixels, from_queries, to_queries
from deco_jax.run.sharding import compiling_for
from tests.helpers import golden, golden_params, nhwc, relative_error

TRUNK = {
    "prediction": "v",
    "width": 48,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "num_classes": 10,
    "text_width": 0,
    "text_length": 0,
    "text_depth": 0,
    "dtype": "float32",
    "remat": "none",
    "unroll": 1,
    "attention": "xla",
}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_patch_size": 1, "decoder_interaction": "adaln"}
MODELS = {
    "deco_c2i": TRUNK | DECODER | {"name": "deco"},
    "deco_t2i": TRUNK
    | DECODER
    | {"name": "deco", "width": 32, "num_classes": 0, "text_width": 24, "text_length": 6, "text_depth": 2},
    "baseline_dit": TRUNK | {"name": "dit"},
    "pixnerd": TRUNK | {"name": "pixnerd", "decoder_width": 8, "decoder_depth": 2, "decoder_ratio": 2},
}
BOUND = {"deco_c2i": 5e-6, "deco_t2i": 2e-6, "baseline_dit": 2e-6, "pixnerd": 1e-5}


def run(name: str, **changes):
    """Output and intermediates of a golden model on its golden inputs."""
    values, model = golden(name), MODELS[name] | changes
    params = from_torch(ml_collections.ConfigDict(model), golden_params(name))
    context = values["text"] if "text" in values else values["y"].astype(np.int32)
    return lambda layer=None: jax.jit(network.build(model).apply, static_argnums=4)(
        params, jnp.asarray(nhwc(values["x"])), jnp.asarray(values["t"]), jnp.asarray(context), layer
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_reference_s(name, platform):
    """In the forms for both platforms, computed by this one."""
    with compiling_for(platform):
        output, _ = run(name, attention="auto")()
    assert relative_error(output, nhwc(golden(name)["out"])) < BOUND[name]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 48), (48,), (1, 1, 48), (2, 48), (3, 2, 48)])
def test_a_linear_layer_of_few_rows(shape, platform):
    """A TPU pads a single row; neither values nor gradients depend on it."""
    layer = layers.Linear(48, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=shape)
    kernel, bias = (np.asarray(parameter[...], np.float64) for parameter in (layer.kernel, layer.bias))
    with compiling_for(platform):
        y, pull = jax.vjp(layer, jnp.float32(x))
        (gradient,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(y, x @ kernel + bias, atol=1e-6)
    np.testing.assert_allclose(gradient, np.ones(y.shape) @ kernel.T, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_every_block_s_output_is_the_reference_s(name, layer):
    _, hidden = run(name)(layer)
    assert relative_error(hidden["aligned"], golden(name)[f"block{layer}"]) < 2e-6


@pytest.mark.parametrize(
    "changes", [{"remat": "dots"}, {"remat": "attention"}, {"remat": "full", "unroll": 3}, {"decoder_chunk": 96}]
)
@pytest.mark.parametrize("name", ["deco_c2i", "deco_t2i"])
def test_rematerialisation_and_unrolling_change_nothing(name, changes):
    output, _ = run(name, **changes)()
    assert relative_error(output, nhwc(golden(name)["out"])) < BOUND[name]


def test_bfloat16_is_close_and_returns_float32():
    output, _ = run("deco_c2i", dtype="bfloat16")()
    assert output.dtype == jnp.float32
    assert relative_error(output, nhwc(golden("deco_c2i")["out"])) < 0.05


SIZES = {
    "deco": {"width": 1024, "depth": 22, "num_heads": 16, "decoder_width": 32, "decoder_depth": 3},
    "pixnerd": {"width": 1024, "depth": 22, "num_heads": 16, "decoder_width": 64, "decoder_depth": 2},
}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        (MODELS["deco_c2i"] | SIZES["deco"], 426_938_019),  # L
        (MODELS["deco_c2i"] | SIZES["deco"] | {"width": 1152, "depth": 28}, 682_282_851),  # XL
        (MODELS["deco_c2i"] | SIZES["deco"] | {"decoder_patch_size": 4}, 419_068_944),
        (MODELS["deco_c2i"] | SIZES["deco"] | {"decoder_patch_size": 16}, 418_623_744),
        (MODELS["baseline_dit"] | {"width": 1024, "depth": 24, "num_heads": 16}, 459_171_584),
        (MODELS["baseline_dit"] | {"width": 1152, "depth": 28, "num_heads": 16}, 676_360_128),
        (MODELS["pixnerd"] | SIZES["pixnerd"], 452_113_795),
        (
            MODELS["deco_t2i"]
            | SIZES["deco"]
            | {"width": 1536, "depth": 16, "num_heads": 24, "text_width": 2048, "text_length": 128, "text_depth": 4},
            1_133_759_395,
        ),
    ],
)
def test_parameter_counts_are_the_published_models(changes, parameters):
    classes = 1000 if changes["num_classes"] else 0
    assert network.build(changes | {"patch_size": 16, "num_classes": classes}).num_params == parameters


def test_gradients_equal_a_plain_loop_s():
    """Stacked, scanned and rematerialised against block after block without any of it."""
    model = MODELS["deco_c2i"] | {"depth": 4}
    params = network.build(model).init(jax.random.key(1))
    params["decoder"]["output"]["kernel"] = jax.random.normal(jax.random.key(2), (16, 3)) * 0.1
    params["decoder"]["blocks"]["modulation"]["kernel"] = jax.random.normal(jax.random.key(3), (2, 16, 48)) * 0.1
    x = jax.random.normal(jax.random.key(4), (2, 8, 12, 3))
    t, y = jnp.array([0.2, 0.7]), jnp.array([3, 10])

    def loss(params, model):
        return jnp.sum(network.build(model).apply(params, x, t, y)[0] ** 2)

    def plain_scan(blocks, x, apply, *, start=0, stop=None, **_):
        depth = jax.tree.leaves(blocks)[0].shape[0]
        for i in range(depth)[start:stop]:
            x = apply(jax.tree.map(lambda p, i=i: p[i], blocks), x)
        return x

    ours = jax.jit(jax.grad(functools.partial(loss, model=model | {"remat": "full", "unroll": 2})))(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deco_jax.models.trunk.run_stack", plain_scan)
        patch.setattr("deco_jax.models.decoder.run_stack", plain_scan)
        plain = jax.jit(jax.grad(functools.partial(loss, model=model)))(params)
    for path, expected in jax.tree_util.tree_leaves_with_path(plain):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, ours)
        assert relative_error(actual, expected) < 1e-5, path


LINEAR = {"kernel": "fan_in", "bias": "fan_in"}


def test_initial_ranges_are_the_paper_s():
    """Every parameter of DeCo: zero, one, uniform within a bound, or normal with a deviation."""
    width, patch, decoder = 64, 8, 16
    model = MODELS["deco_c2i"] | {"width": width, "depth": 6, "patch_size": patch, "num_classes": 100, "num_heads": 4}
    params = network.build(model).init(jax.random.key(0))
    hidden = int(2 * 4 * width / 3)

    def xavier(fan_in, fan_out):
        return math.sqrt(6 / (fan_in + fan_out))

    def default(fan_in):
        return 1 / math.sqrt(fan_in)

    uniform = {
        "patch_embed/kernel": xavier(3 * patch**2, width),
        "time_embed/hidden/bias": default(256),
        "time_embed/out/bias": default(width),
        "blocks/attention/qkv/kernel": default(width),
        "blocks/attention/out/kernel": default(width),
        "blocks/attention/out/bias": default(width),
        "blocks/mlp/gate/kernel": default(width),
        "blocks/mlp/up/kernel": default(width),
        "blocks/mlp/down/kernel": default(hidden),
        "blocks/modulation/kernel": default(width),
        "blocks/modulation/bias": default(width),
        "decoder/pixel_embed/kernel": default(67),
        "decoder/pixel_embed/bias": default(67),
        "decoder/input/kernel": xavier(decoder, decoder),
        "decoder/condition/kernel": xavier(width, patch**2 * decoder),
        "decoder/blocks/mlp_in/kernel": xavier(decoder, decoder),
        "decoder/blocks/mlp_out/kernel": xavier(decoder, decoder),
    }
    normal = {"time_embed/hidden/kernel", "time_embed/out/kernel", "label_embed/embedding"}
    zero = {
        "patch_embed/bias",
        "decoder/input/bias",
        "decoder/condition/bias",
        "decoder/blocks/mlp_in/bias",
        "decoder/blocks/mlp_out/bias",
        "decoder/blocks/modulation/kernel",
        "decoder/blocks/modulation/bias",
        "decoder/blocks/norm/bias",
        "decoder/output/kernel",
        "decoder/output/bias",
    }
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = np.asarray(value)
        if name in uniform:
            bound = uniform[name]
            assert np.abs(value).max() <= bound, name
            # The largest of n uniform draws falls short of the bound by a factor of about 1/n.
            assert np.abs(value).max() > bound * (1 - 12 / value.size), name
            assert abs(value.std() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(value.size), name
        elif name in normal:
            assert abs(value.std() / 0.02 - 1) < 4 / math.sqrt(value.size), name
        elif name in zero:
            assert not value.any(), name
        else:
            assert name.endswith("scale"), name
            np.testing.assert_array_equal(value, 1)
    blocks = params["blocks"]["attention"]["qkv"]["kernel"]
    assert np.abs(np.asarray(blocks[0] - blocks[1])).max() > 0.01  # each block has its own draw


def test_output_of_a_new_model_is_zero():
    net = network.build(MODELS["deco_c2i"])
    output, _ = net.apply(net.init(jax.random.key(0)), jnp.ones((1, 8, 8, 3)), jnp.array([0.5]), jnp.array([1]))
    np.testing.assert_array_equal(output, 0)


def test_cosine_basis_by_hand():
    side = 5
    basis = cosine_basis(side)
    for row, column, i, j in [(0, 0, 0, 0), (1, 3, 2, 5), (4, 2, 7, 1)]:
        fx, fy, x, y = i * 8 / 7, j * 8 / 7, column / (side - 1), row / (side - 1)
        expected = math.cos(math.pi * x * fx) * math.cos(math.pi * y * fy) / (1 + fx * fy)
        assert abs(basis[row * side + column, 8 * i + j] - expected) < 1e-6


def test_folded_pixel_embedding_is_the_two_layers():
    from flax import nnx

    rngs = nnx.Rngs(0)
    embed = layers.Linear(67, 16, dtype=jnp.float32, rngs=rngs)
    following = layers.Linear(16, 16, dtype=jnp.float32, rngs=rngs)
    values = jax.random.normal(jax.random.key(1), (2, 3, 16, 3))
    basis = cosine_basis(4)
    wide = jnp.concatenate([values, jnp.broadcast_to(basis, (2, 3, 16, 64))], axis=-1)
    assert relative_error(embed_pixels(values, basis, embed, following), following(embed(wide))) < 1e-6


@pytest.mark.parametrize("query", [1, 2, 4, 8])
def test_queries_are_patches_within_patches(query):
    images = np.arange(2 * 16 * 24 * 3, dtype=np.float32).reshape(2, 16, 24, 3)
    queries = to_queries(jnp.asarray(images), 8, query)
    # Token (1, 2) is the last; its query (0, 1), if there is one, starts `query` pixels to the right.
    token = images[:, 8:16, 16:24]
    expected = token[:, :query, :query].reshape(2, -1)
    np.testing.assert_array_equal(queries[:, 5, 0], expected)
    if query < 8:
        np.testing.assert_array_equal(queries[:, 5, 1], token[:, :query, query : 2 * query].reshape(2, -1))
    np.testing.assert_array_equal(from_queries(queries, 8, query, 16, 24), images)


@pytest.mark.parametrize("interaction", ["adaln", "add"])
@pytest.mark.parametrize("query", [2, 4])
def test_decoder_variants_learn(interaction, query):
    """Each variant's gradient reaches every parameter once the output layer is not zero."""
    net = network.build(MODELS["deco_c2i"] | {"decoder_patch_size": query, "decoder_interaction": interaction})
    params = jax.tree.map(lambda p: p + 0.01, net.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def loss(params):
        return jnp.mean((net.apply(params, x, jnp.array([0.3, 0.6]), jnp.array([0, 1]))[0] - 1) ** 2)

    grads = jax.grad(loss)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize(
    ("interaction", "dtype", "bound", "pieces"),
    [
        ("adaln", "float32", 1e-5, 1),
        ("adaln", "float32", 1e-5, 2),
        ("add", "float32", 1e-5, 1),
        ("adaln", "bfloat16", 0.05, 1),
    ],
)
def test_the_decoder_s_form_for_tpus_has_the_same_gradients(interaction, dtype, bound, pieces, monkeypatch):
    """Two queries of 64 channels in a row, and no golden values of this kind."""
    monkeypatch.setattr(decoder, "rows_at_a_time", lambda rows: rows // pieces)
    changes = {"decoder_patch_size": 2, "decoder_interaction": interaction, "decoder_width": 64}
    exact, net = (network.build(MODELS["deco_c2i"] | changes | {"dtype": name}) for name in ("float32", dtype))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + draw.normal(size=p.shape, scale=0.1), exact.init(jax.random.key(0)))
    params = jax.tree.map(jnp.float32, params)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def gradients(net, platform):
        def loss(params):
            return jnp.mean((net.apply(params, x, jnp.array([0.3, 0.6]), jnp.array([0, 1]))[0] - x) ** 2)

        with compiling_for(platform):
            return jax.jit(jax.grad(loss))(params)["decoder"]

    theirs = jax.tree.leaves_with_path(gradients(exact, "cpu"))
    for (path, expected), ours in zip(theirs, jax.tree.leaves(gradients(net, "tpu")), strict=True):
        assert relative_error(ours, expected) < bound, path


@pytest.mark.parametrize(
    ("rows", "taken"), [(4096, 4096), (16384, 16384), (64 * 1024, 8192), (37 * 512, 4736), (16411, 16411)]
)
def test_the_decoder_takes_as_many_rows_as_stay_in_the_fast_memory(rows, taken):
    assert decoder.rows_at_a_time(rows) == taken

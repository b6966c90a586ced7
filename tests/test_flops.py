from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet256, t2i_256
from deco_jax import flops
from deco_jax.errors import UserError
from deco_jax.models import network as network_lib
from deco_jax.models import qwen3
from deco_jax.models.qwen3 import Sizes

pytestmark = pytest.mark.fast

GIGA = 1e9


def paper_config(variant):
    config = imagenet256.get_config(variant)
    return config


@pytest.mark.parametrize("variant, size, expected", [("L", 256, 155), ("XL", 256, 245), ("XL", 512, 1080)])
def test_forward_by_size(variant, size, expected):
    model = paper_config(variant).model
    assert flops.forward_total(model, size) / GIGA == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("variant, decoder, condition", [("L", 6.7, 4.3), ("XL", 7.3, 4.8)])
def test_decoder_by_size(variant, decoder, condition):
    parts = flops.forward(paper_config(variant).model, 256)
    pixels = sum(value for name, value in parts.items() if name.startswith("pixel_"))
    assert parts["condition"] / GIGA == pytest.approx(condition, abs=0.05)
    assert pixels / GIGA == pytest.approx(2.4, abs=0.05)
    assert (parts["condition"] + pixels) / GIGA == pytest.approx(decoder, rel=0.01)


@pytest.mark.parametrize("variant, expected", [("L", 516), ("XL", 787)])
def test_training_with_the_teacher(variant, expected):
    assert flops.training(paper_config(variant)) / GIGA == pytest.approx(expected, rel=0.01)


def test_training_without_the_teacher_is_three_forward_passes():
    config = paper_config("L")
    config.loss.repa_weight = 0.0
    assert flops.training(config) == 3 * flops.forward_total(config.model, 256)


def products(jaxpr) -> float:
    """FLOPs of all matrix products of a jaxpr; a loop's body counts once for each turn."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            inner = 1
            for axis in left:
                inner *= equation.invars[0].aval.shape[axis]
            total += 2.0 * equation.outvars[0].aval.size * inner
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += turns * products(inside)
    return total


TRUNK = {
    "prediction": "v",
    "width": 96,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "num_classes": 10,
    "text_width": 0,
    "text_length": 0,
    "text_depth": 0,
    "dtype": "float32",
    "remat": "none",
    "unroll": 3,
    "attention": "xla",
}
DECODER = {"decoder_width": 16, "decoder_depth": 2}
MODELS = {
    "deco": {"name": "deco", **TRUNK, **DECODER, "decoder_patch_size": 1, "decoder_interaction": "adaln"},
    "patched": {"name": "deco", **TRUNK, **DECODER, "decoder_patch_size": 4, "decoder_interaction": "add"},
    "dit": {"name": "dit", **TRUNK},
    "class_tokens": {"name": "dit", **TRUNK, "context_tokens": 5, "context_start": 1},
    "pixnerd": {"name": "pixnerd", **TRUNK, **DECODER, "decoder_ratio": 2},
    "text": {
        "name": "deco",
        **TRUNK,
        **DECODER,
        "decoder_patch_size": 1,
        "decoder_interaction": "adaln",
        "num_classes": 0,
        "text_width": 40,
        "text_length": 12,
        "text_depth": 2,
    },
}


def folded(model) -> float:
    """What the pixel embedding saves: its two layers are one small matrix, folded once a call."""
    if model["name"] not in ("deco", "pixnerd"):
        return 0.0
    inner, query = model["decoder_width"], model.get("decoder_patch_size", 1)
    queries, values = 32 * 48 // query**2, 3 * query**2
    a_patch = (model["patch_size"] // query) ** 2
    second = inner if model["name"] == "deco" else 0
    as_counted = queries * ((values + 64) * inner + second * inner)
    as_done = queries * values * inner + a_patch * 64 * inner + (values + 1 if second else 0) * inner * inner
    if second:  # the offset of each query goes through the second layer too
        as_done += (a_patch - 1) * inner * inner
    return 2.0 * (as_counted - as_done)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_matrix_products_of_the_program(name):
    model = MODELS[name]
    network = network_lib.build(model)
    images = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 12, 40), jnp.float32)
    context = text if model["text_width"] else jax.ShapeDtypeStruct((1,), jnp.int32)
    program = jax.make_jaxpr(lambda *arguments: network.apply(*arguments)[0])(network.shapes, images, times, context)
    assert products(program.jaxpr) + folded(model) == flops.forward_total(model, (32, 48))


def test_close_to_the_compilers_count_where_products_dominate():
    model = MODELS["deco"] | {"width": 512, "depth": 2, "num_heads": 8, "unroll": 2}
    network = network_lib.build(model)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    times, labels = (jax.ShapeDtypeStruct((4,), kind) for kind in (jnp.float32, jnp.int32))
    lowered = jax.jit(lambda *arguments: network.apply(*arguments)[0]).lower(network.shapes, images, times, labels)
    counted = lowered.compile().cost_analysis()["flops"]
    # The compiler counts norms, gates and activations as well.
    assert counted == pytest.approx(4 * flops.forward_total(model, 32), rel=0.03)


def test_sampling_counts_guided_evaluations_twice():
    config = imagenet256.get_config()
    one = flops.forward_total(config.model, 256)
    config.sample.num_steps, config.sample.guidance = 100, 3.2
    # Steps 0..10 start at t <= 0.1 and are unguided.
    assert flops.sampling(config) == (11 + 2 * 89) * one
    config.sample.guidance = 1.0
    assert flops.sampling(config) == 100 * one
    config.sample.sampler = "heun"
    assert flops.sampling(config) == 199 * one


def test_an_unknown_model_has_no_flops():
    with pytest.raises(UserError, match="name='unet' is not a model; choose one of deco, dit, pixnerd"):
        flops.forward({"name": "unet"}, 32)


def test_the_text_encoders_products_and_where_they_count():
    """Qwen3's program on one caption; it runs in the step unless the features are kept."""
    sizes = Sizes(vocabulary=50, width=24, mlp_hidden=40, depth=3, num_heads=4, num_kv_heads=2, head_width=8)
    encoder = qwen3.text_encoder(sizes, "", "float32", 24)
    tokens, mask = (jax.ShapeDtypeStruct((1, 12), kind) for kind in (jnp.int32, jnp.bool_))
    assert products(jax.make_jaxpr(encoder.apply)(encoder.shapes, tokens, mask).jaxpr) == encoder.flops(12)
    config = t2i_256.get_config()
    config.loss.repa_weight = 0.0
    model = 3 * flops.forward_total(config.model, 256)
    # Qwen3-1.7B: twice its 1.41 billion weights for each of 128 tokens, and a little attention.
    assert flops.training(config) - model == pytest.approx(2 * 1.41e9 * 128, rel=0.03)
    config.text.features = "kept"
    assert flops.training(config) == model

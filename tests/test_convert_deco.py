"""convert/deco.py: official names and layouts, both ways, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from deco_jax.convert import deco
from deco_jax.convert.mapping import flatten
from deco_jax.errors import UserError
from deco_jax.models import official_names
from tests.helpers import golden, golden_params

CONFIGS = {
    "deco_c2i": dict(name="deco", depth=3, decoder_depth=2, patch_size=4, text_depth=0),
    "deco_t2i": dict(name="deco", depth=3, decoder_depth=2, patch_size=4, text_depth=2),
    "baseline_dit": dict(name="dit", depth=3, decoder_depth=0, patch_size=4, text_depth=0),
    "pixnerd": dict(name="pixnerd", depth=3, decoder_depth=2, patch_size=4, text_depth=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(name):
    tensors = golden_params(name)
    params = deco.from_torch(CONFIGS[name], tensors)
    back = deco.to_torch(CONFIGS[name], params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    assert sum(a.size for a in flatten(params).values()) == sum(a.size for a in tensors.values())


def test_patch_layouts():
    """A Linear on channel-first patches and its conversion on channel-last ones give the same numbers."""
    rng = np.random.default_rng(0)
    patch = 4
    image = rng.normal(size=(3, patch, patch))  # channel, row, column
    official, ours = image.ravel(), image.transpose(1, 2, 0).ravel()
    into = rng.normal(size=(5, 3 * patch**2))
    (kernel,) = official_names.patch_in(patch).to_ours([into])
    np.testing.assert_allclose(ours @ kernel, into @ official, rtol=1e-12)
    out, bias, hidden = rng.normal(size=(3 * patch**2, 5)), rng.normal(size=3 * patch**2), rng.normal(size=5)
    (kernel,) = official_names.patch_out(patch).to_ours([out])
    (our_bias,) = official_names.patch_out_bias(patch).to_ours([bias])
    expected = (out @ hidden + bias).reshape(3, patch, patch).transpose(1, 2, 0)
    np.testing.assert_allclose((hidden @ kernel + our_bias).reshape(patch, patch, 3), expected, rtol=1e-12)


def test_blocks_are_stacked_and_the_fused_mlp_is_split():
    tensors = golden_params("deco_t2i")
    params = deco.from_torch(CONFIGS["deco_t2i"], tensors)
    mlp = params["blocks"]["mlp"]
    assert mlp["gate"]["kernel"].shape == mlp["up"]["kernel"].shape == (3, 32, 128)
    np.testing.assert_array_equal(mlp["gate"]["kernel"][2], tensors["blocks.2.mlp.w12.weight"][:128].T)
    np.testing.assert_array_equal(mlp["up"]["kernel"][2], tensors["blocks.2.mlp.w12.weight"][128:].T)
    assert params["text_positions"].shape == (6, 32)


def test_another_depth_is_refused_with_the_names():
    config = {**CONFIGS["deco_c2i"], "depth": 2}
    with pytest.raises(UserError, match=r"tensors left over: 12 \(blocks\.2\.norm1\.weight, .* and 8 more\)"):
        deco.from_torch(config, golden_params("deco_c2i"))
    config["depth"] = 4
    with pytest.raises(UserError, match=r"tensors missing: 12 \(blocks\.3\.norm1\.weight"):
        deco.from_torch(config, golden_params("deco_c2i"))


def test_another_patch_size_is_refused():
    config = {**CONFIGS["baseline_dit"], "patch_size": 8}
    with pytest.raises(UserError, match=r"x_embedder\.proj\.weight of shape \[48, 48\] can't be read"):
        deco.from_torch(config, golden_params("baseline_dit"))


def test_an_unknown_model_is_refused():
    config = {**CONFIGS["deco_c2i"], "name": "unet"}
    with pytest.raises(UserError, match="unet"):
        deco.from_torch(config, golden_params("deco_c2i"))


def test_projector():
    losses = golden("losses")
    tensors = {k.removeprefix("step/proj/"): a for k, a in losses.items() if k.startswith("step/proj/")}
    params = deco.projector_from_torch(tensors)
    assert params["third"]["kernel"].shape == (48, 20)
    back = deco.projector_to_torch(params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor)

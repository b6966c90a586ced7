"""JiT's and PixelGen's checkpoints in and out: both layouts, to the bit, and what isn't one of them refused."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import pytest
import torch

import deco_jax
from configs import jit256, pixelgen256
from deco_jax.errors import UserError
from deco_jax.models import network
from deco_jax.programs import convert
from deco_jax.run import checkpoint, sharding
from tests.helpers import golden, relative_error

STATES = {"model": 1.0, "model_ema1": 0.5, "model_ema2": 0.25}  # each entry: the golden weights times this


def config_of(name: str):
    config = (jit256 if name == "bottleneck" else pixelgen256).get_config("smoke")
    config.model.width, config.model.depth, config.model.patch_size = 48, 4, 4
    config.model.dropout = 0.0
    config.model.bottleneck = 16 if name == "bottleneck" else 0
    config.model.context_tokens, config.model.context_start = (3, 1) if name == "bottleneck" else (4, 2)
    config.data.image_size = (16, 16)
    return config


def state(name: str, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The golden weights under their official names; the positions follow from the sizes and aren't scaled."""
    prefix = f"jit/{name}/state/"
    found = {k.removeprefix(prefix): a for k, a in golden("beyond").items() if k.startswith(prefix)}
    return {k: torch.from_numpy(np.asarray(a if k == "pos_embed" else factor * a)) for k, a in found.items()}


@pytest.fixture(scope="module")
def jit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("jit") / "checkpoint-last.pth"
    entries = {key: {f"net.{k}": a for k, a in state("bottleneck", f).items()} for key, f in STATES.items()}
    rest = {"epoch": 7, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save({**entries, **rest}, path)
    return path


@pytest.fixture(scope="module")
def pixelgen_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixelgen") / "pixelgen.ckpt"
    names = {"denoiser": 1.0, "ema_denoiser": 0.5}
    tensors = {f"{key}.{k}": a for key, f in names.items() for k, a in state("plain", f).items()}
    torch.save({"state_dict": tensors, "global_step": 1234, "epoch": 3, "optimizer_states": []}, path)
    return path


def output(config, params, name: str) -> np.ndarray:
    g = golden("beyond")
    inputs = (g[f"jit/{name}/input"], g[f"jit/{name}/t"], g[f"jit/{name}/label"].astype(np.int32))
    with jax.default_matmul_precision("highest"):
        return network.build(config.model.to_dict()).apply(params, *inputs)[0]


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str) -> None:
    assert found.keys() == {prefix + name for name in expected}
    for name, tensor in expected.items():
        if name == "pos_embed":
            np.testing.assert_allclose(found[prefix + name], tensor, atol=1e-6)
        else:
            assert torch.equal(found[prefix + name], tensor), name


def test_jit_in_and_out(jit_file, tmp_path, capsys):
    config, mesh = config_of("bottleneck"), sharding.make_mesh(1, 1, jax.devices()[:1])
    convert.import_checkpoint(config, str(tmp_path), str(jit_file))
    assert "called 'short' here" in capsys.readouterr().out
    where = checkpoint.find(str(tmp_path))
    shapes = network.build(config.model.to_dict()).shapes
    raw = checkpoint.load_params(where, {"denoiser": shapes}, config, mesh)["denoiser"]
    assert relative_error(output(config, raw, "bottleneck"), golden("beyond")["jit/bottleneck/output"]) < 5e-6
    for name, factor in (("ema", 0.5), ("short", 0.25)):
        average = checkpoint.load_average(where, shapes, config, mesh, name)
        for ours, theirs in zip(jax.tree.leaves(average), jax.tree.leaves(raw), strict=True):
            np.testing.assert_array_equal(ours, factor * np.asarray(theirs))

    convert.export_checkpoint(config, str(tmp_path))
    back = torch.load(tmp_path / "export" / "checkpoint-last.pth", weights_only=True)
    assert back.keys() == {*STATES, "epoch"}
    for key, factor in STATES.items():
        check_same(back[key], state("bottleneck", factor), "net.")
    assert not (tmp_path / "export" / "deco.ckpt").exists()
    exported = deco_jax.load(tmp_path / "export")
    assert relative_error(exported.params["output"]["linear"]["kernel"], 0.5 * raw["output"]["linear"]["kernel"]) == 0


def test_pixelgen_in_and_out(pixelgen_file, tmp_path):
    config = config_of("plain")
    convert.import_checkpoint(config, str(tmp_path), str(pixelgen_file))
    where = checkpoint.find(str(tmp_path))
    assert where.name == "1234"
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    shapes = {"denoiser": network.build(config.model.to_dict()).shapes}
    raw = checkpoint.load_params(where, shapes, config, mesh)["denoiser"]
    assert relative_error(output(config, raw, "plain"), golden("beyond")["jit/plain/output"]) < 5e-6
    convert.export_checkpoint(config, str(tmp_path))
    back = torch.load(tmp_path / "export" / "deco.ckpt", weights_only=True)["state_dict"]
    for key, factor in (("denoiser.", 1.0), ("ema_denoiser.", 0.5)):
        check_same({k: a for k, a in back.items() if k.startswith(key)}, state("plain", factor), key)


def test_the_library_loads_a_file_with_its_config(jit_file):
    config = config_of("bottleneck")
    model = deco_jax.load(jit_file, average="second", config=config)
    np.testing.assert_array_equal(
        model.params["output"]["linear"]["kernel"], 0.25 * state("bottleneck")["final_layer.linear.weight"].numpy().T
    )
    with pytest.raises(UserError, match="give its config="):
        deco_jax.load(jit_file)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda config, content: config.data.update(image_size=(32, 32)), "set config.data.image_size"),
        (lambda config, content: content["model"].pop("net.in_context_posemb"), "in_context_posemb"),
        (lambda config, content: content["model"].update({"net.more": torch.ones(1)}), "more"),
        (lambda config, content: content["model_ema1"].update({"more": torch.ones(1)}), "an unknown network"),
        (lambda config, content: content.update(model_ema1=3), "not a dictionary of tensors"),
        (lambda config, content: config.model.update(bottleneck=8), r"x_embedder.proj[12].weight"),
    ],
)
def test_other_files_are_refused(jit_file, tmp_path, change, words):
    config, content = config_of("bottleneck"), torch.load(jit_file, weights_only=False)
    change(config, content)
    torch.save(content, tmp_path / "changed.pth")
    with pytest.raises(UserError, match=words) as caught:
        convert.import_checkpoint(config, str(tmp_path / "run"), str(tmp_path / "changed.pth"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_asymmetric_run_can_t_be_imported(jit_file, tmp_path):
    config = config_of("bottleneck")
    config.model.prediction = "asymmetric"
    with pytest.raises(UserError, match="which official checkpoints don't have"):
        convert.import_checkpoint(config, str(tmp_path / "run"), str(jit_file))

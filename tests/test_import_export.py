"""Official checkpoints in and out: imported ones answer as the reference does, exported ones are equal to the bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deco_jax
from configs import ablation, imagenet256, t2i_256
from deco_jax.convert import torch_files
from deco_jax.errors import UserError
from deco_jax.models import dinov2, network
from deco_jax.programs import convert as checkpoints
from deco_jax.run import checkpoint, sharding
from tests.helpers import GOLDEN, ROOT, golden, golden_params, nhwc, relative_error, run_main

SETTINGS = {"model.width": 48, "model.patch_size": 4, "model.decoder_width": 16, "data.image_size": 16}
ARGUMENTS = ["--config=configs/imagenet256.py:smoke", *(f"--config.{key}={value}" for key, value in SETTINGS.items())]
FILE = GOLDEN / "lightning.ckpt"


def golden_config(repa: float = 0.0):
    config = imagenet256.get_config("smoke")
    config.update_from_flattened_dict(SETTINGS)
    config.loss.repa_weight = repa
    return config


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    result = run_main(*ARGUMENTS, "--mode=import", f"--workdir={folder}", f"--source={FILE}")
    assert result.returncode == 0, result.stderr
    assert "step 1234" in result.stdout
    assert "zero moments" in result.stdout
    assert "projector, which is left out" in result.stdout
    return folder


@pytest.mark.parametrize("which", ["denoiser", "ema"])
def test_imported_weights_answer_as_the_reference(imported, which):
    config, values = golden_config(), golden("lightning_expect")
    net, mesh = network.build(config.model.to_dict()), sharding.make_mesh(1, 1, jax.devices()[:1])
    where = checkpoint.find(str(imported))
    if which == "ema":
        params = checkpoint.load_average(where, net.shapes, config, mesh)
    else:
        params = checkpoint.load_params(where, {"denoiser": net.shapes}, config, mesh)["denoiser"]
    labels = jnp.asarray(values["y"], jnp.int32)
    output, _ = jax.jit(net.apply)(params, jnp.asarray(nhwc(values["x"])), jnp.asarray(values["t"]), labels)
    assert relative_error(output, nhwc(values[f"out_{which}"])) < 5e-6


def test_export_returns_the_same_tensors_to_the_bit(tmp_path, monkeypatch):
    """With the projector, whose teacher here is 20 wide."""
    monkeypatch.setitem(dinov2.SIZES, "B", (20, 1, 1))
    config = golden_config(repa=0.5)
    checkpoints.import_checkpoint(config, str(tmp_path), str(FILE))
    checkpoints.export_checkpoint(config, str(tmp_path))
    before = torch.load(FILE, weights_only=True)
    after = torch.load(tmp_path / "export" / "deco.ckpt", weights_only=True)
    assert after["global_step"] == before["global_step"] == 1234
    assert after["state_dict"].keys() == before["state_dict"].keys()
    for name, tensor in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], tensor), name
    ema = torch_files.read_safetensors(tmp_path / "export" / "ema.safetensors")
    for name in ema:
        np.testing.assert_array_equal(ema[name], before["state_dict"][f"ema_denoiser.{name}"].numpy())
    stored = json.loads((tmp_path / "export" / "config.json").read_text())
    assert stored["model"]["width"] == 48


@pytest.mark.parametrize("classes", [10, 1000])
def test_an_imported_imagenet_model_knows_its_classes(tmp_path, monkeypatch, classes):
    """golden/lightning.ckpt has ten classes: the label table is repeated to stand for ImageNet's."""
    file, config = checkpoints.jit_files.read_official(str(FILE)), golden_config()
    config.model.num_classes = classes
    labels = "y_embedder.embedding_table.weight"
    tables = [{**side, labels: np.resize(side[labels], (classes + 1, 48))} for side in (file.denoiser, file.ema)]
    whole = dataclasses.replace(file, denoiser=tables[0], ema=tables[1])
    monkeypatch.setattr(checkpoints.jit_files, "read_official", lambda path: whole)
    checkpoints.import_checkpoint(config, str(tmp_path), str(FILE))
    names = tmp_path / "classes.json"
    assert names.exists() == (classes == 1000)
    assert classes == 10 or json.loads(names.read_text())[207] == "golden retriever"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "short.safetensors").write_text("of an earlier export")
    checkpoints.export_checkpoint(config, str(tmp_path))
    assert not (tmp_path / "export" / "short.safetensors").exists()
    exported = deco_jax.load(tmp_path / "export").class_names
    assert exported is None if classes == 10 else exported[207] == "golden retriever"


def test_a_text_to_image_checkpoint(tmp_path):
    """In the official layout, with other EMA weights: answers as the reference, and comes back to the bit."""
    config, values = t2i_256.get_config("smoke"), golden("deco_t2i")
    config.update_from_flattened_dict(
        {
            "model.width": 32,
            "model.patch_size": 4,
            "model.decoder_width": 16,
            "model.text_width": 24,
            "model.text_length": 6,
            "model.text_depth": 2,
            "text.encoder": "qwen3",
            "data.image_size": 16,
        }
    )
    raw = {name: torch.from_numpy(array) for name, array in golden_params("deco_t2i").items()}
    state = {f"denoiser.{k}": 0.5 * v for k, v in raw.items()} | {f"ema_denoiser.{k}": v for k, v in raw.items()}
    torch.save({"state_dict": state, "global_step": 200_000, "epoch": 3}, tmp_path / "t2i.ckpt")
    checkpoints.import_checkpoint(config, str(tmp_path), str(tmp_path / "t2i.ckpt"))
    checkpoints.export_checkpoint(config, str(tmp_path))
    after = torch.load(tmp_path / "export" / "deco.ckpt", weights_only=True)
    assert after["global_step"] == 200_000
    assert after["state_dict"].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(after["state_dict"][name], tensor), name

    net, mesh = network.build(config.model.to_dict()), sharding.make_mesh(1, 1, jax.devices()[:1])
    params = checkpoint.load_average(checkpoint.find(str(tmp_path)), net.shapes, config, mesh)
    inputs = (jnp.asarray(nhwc(values["x"])), jnp.asarray(values["t"]), jnp.asarray(values["text"]))
    output, _ = jax.jit(net.apply)(params, *inputs)
    assert relative_error(output, nhwc(values["out"])) < 2e-6

    for change, said in (
        (lambda s: s.pop("denoiser.text_refine_blocks.1.attn.proj.bias"), "text_refine_blocks.1.attn.proj.bias"),
        (lambda s: s.update({"denoiser.blocks.0.attn.qkv.weight": torch.zeros(2)}), "blocks.0.attn.qkv.weight"),
    ):
        changed = dict(state)
        change(changed)
        torch.save({"state_dict": changed}, tmp_path / "changed.ckpt")
        with pytest.raises(UserError, match=said):
            checkpoints.import_checkpoint(config, str(tmp_path / "other"), str(tmp_path / "changed.ckpt"))
        assert not (tmp_path / "other").exists()


def test_sampling_and_training_go_on_from_an_imported_checkpoint(imported, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(imported, folder)
    result = run_main(*ARGUMENTS, "--mode=sample", f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    assert (folder / "samples" / "grid.png").exists()
    result = run_main(*ARGUMENTS, f"--workdir={folder}", "--config.train.num_steps=1236")
    assert result.returncode == 0, result.stderr
    assert "resumed at step 1234" in result.stdout
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1235, 1236]
    result = run_main(*ARGUMENTS, "--mode=export", f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    assert torch.load(folder / "export" / "deco.ckpt", weights_only=True)["global_step"] == 1236


def damaged(tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(FILE.read_bytes()[:5000])
    return path


def with_state(tmp_path, change):
    content = torch.load(FILE, weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


BAD = {
    "missing file": (lambda tmp: tmp / "none.ckpt", "no such file"),
    "damaged file": (damaged, "not a readable PyTorch weight file"),
    "missing tensor": (
        lambda tmp: with_state(tmp, lambda s: s.pop("denoiser.blocks.1.attn.qkv.weight")),
        "blocks.1.attn.qkv.weight",
    ),
    "tensor left over": (
        lambda tmp: with_state(tmp, lambda s: s.update({"denoiser.extra.weight": torch.zeros(2)})),
        "extra.weight",
    ),
    "unknown network": (lambda tmp: with_state(tmp, lambda s: s.update({"vae.weight": torch.zeros(2)})), "vae.weight"),
    "another size": (
        lambda tmp: with_state(
            tmp, lambda s: s.update({"denoiser.dec_net.final_layer.linear.weight": torch.zeros(3, 8)})
        ),
        "shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_files_are_refused(case, tmp_path):
    make, said = BAD[case]
    with pytest.raises(UserError, match=said) as error:
        checkpoints.import_checkpoint(golden_config(), str(tmp_path / "run"), str(make(tmp_path)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_workdir_with_a_run_is_refused(imported):
    with pytest.raises(UserError, match="already has checkpoints"):
        checkpoints.import_checkpoint(golden_config(), str(imported), str(FILE))


def test_an_adapted_run_is_not_imported(tmp_path):
    config = golden_config()
    config.lora.rank = 4
    with pytest.raises(UserError, match=r"whole weights, but config.lora.rank stores what adapts others"):
        checkpoints.import_checkpoint(config, str(tmp_path / "run"), str(FILE))
    with pytest.raises(UserError, match=r"--mode=import reads .ckpt and .pth; deco_jax.load opens an exported"):
        checkpoints.import_checkpoint(golden_config(), str(tmp_path / "run"), "ema.safetensors")


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    result = run_main(*ARGUMENTS, "--mode=import", f"--workdir={tmp_path / 'run'}")
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "--source" in result.stderr


@pytest.mark.parametrize("row", ["dit", "jit", "pixnerd", "patch4", "add"])
def test_round_trip_of_every_architecture(row, tmp_path):
    """Also those that the official code has no name for."""
    config = ablation.get_config(f"{row}-smoke")
    net = network.build(config.model.to_dict())
    params = jax.tree.map(np.asarray, net.init(jax.random.key(0)))
    official = checkpoints.deco.to_torch(config.model, params)
    back = checkpoints.deco.from_torch(config.model, official, like=net.shapes)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("row", ["patch4", "add"])
def test_what_no_official_module_can_hold_is_left_out(row, tmp_path, capsys):
    """The safetensors file still has all of it."""
    config = ablation.get_config(f"{row}-smoke")
    config.loss.repa_weight = 0.0
    params = jax.tree.map(np.asarray, network.build(config.model.to_dict()).init(jax.random.key(0)))
    state = {"step": np.int32(1), "skipped": np.int32(0), "params": {"denoiser": params}, "averages": {"ema": params}}
    saved = checkpoint.Checkpoints(tmp_path, 1)
    saved.save(1, state, config)
    saved.wait()
    saved.close()
    checkpoints.export_checkpoint(config, str(tmp_path))
    setting = {"patch4": "decoder_patch_size=4", "add": "decoder_interaction=add"}[row]
    assert f"no deco.ckpt: the official code has no model with config.model.{setting}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "ema.safetensors"]
    ema = torch_files.read_safetensors(tmp_path / "export" / "ema.safetensors")
    back = checkpoints.deco.from_torch(config.model, ema)
    jax.tree.map(np.testing.assert_array_equal, back, params)


MAKE_XL = """
import sys, numpy as np, torch
from configs import imagenet256
from deco_jax.convert import deco
from deco_jax.models import network
config, chance = imagenet256.get_config("XL"), np.random.default_rng(0)
shapes = network.build(config.model.to_dict()).shapes
import jax
names = deco.to_torch(config.model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), consume=True)
state = {f"{prefix}.{name}": torch.from_numpy(chance.standard_normal(a.shape, np.float32))
         for prefix in ("denoiser", "ema_denoiser") for name, a in names.items()}
torch.save({"state_dict": state, "global_step": 5, "epoch": 0}, sys.argv[1])
"""
PEAK = """
import atexit, resource, sys
from deco_jax import main
atexit.register(lambda: print("peak KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True))
main.cli()
"""


@pytest.mark.slow
def test_memory_of_an_xl_checkpoint(tmp_path):
    """Import and export of DeCo-XL, whose two networks are 5.5 GB of float32, copy neither. Needs 20 GB of disk."""
    subprocess.run([sys.executable, "-c", MAKE_XL, tmp_path / "xl.ckpt"], cwd=ROOT, check=True)
    before = ["--config=configs/imagenet256.py:XL", "--config.loss.repa_weight=0", f"--workdir={tmp_path / 'run'}"]
    for arguments in (["--mode=import", f"--source={tmp_path / 'xl.ckpt'}"], ["--mode=export"]):
        began = time.monotonic()
        command = [sys.executable, "-c", PEAK, *before, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.rsplit("peak KiB ", 1)[1]) * 1024
        print(f"{arguments[0]}: {peak / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
        assert peak < 8e9
    one, other = (tmp_path / "xl.ckpt", tmp_path / "run" / "export" / "deco.ckpt")
    ours, theirs = torch_files.read_lightning(other), torch_files.read_lightning(one)
    for name in list(theirs.denoiser)[::50]:
        np.testing.assert_array_equal(ours.denoiser[name], theirs.denoiser[name])


def test_import_never_holds_a_network(tmp_path):
    """Of two networks of 58 MB each two parameters, of 19 MB at most, are in memory at a time."""
    config = golden_config()
    config.model.width, config.model.depth, config.model.num_heads = 256, 12, 4
    shapes = network.build(config.model.to_dict()).shapes
    chance = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: chance.standard_normal(leaf.shape, np.float32), shapes)
    tensors = checkpoints.deco.to_torch(config.model, params)
    torch_files.write_lightning(tmp_path / "a.ckpt", torch_files.Checkpoint(tensors, tensors))
    tracemalloc.start()
    try:
        checkpoints.import_checkpoint(config, str(tmp_path / "run"), str(tmp_path / "a.ckpt"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    read = checkpoint.load_average(
        checkpoint.find(str(tmp_path / "run")), shapes, config, sharding.make_mesh(1, 1, jax.devices()[:1])
    )
    jax.tree.map(np.testing.assert_array_equal, read, params)

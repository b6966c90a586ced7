"""The configs beyond DeCo through the command line: they train, sample, go on, and don't care about the devices."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import deco_jax
from configs import asymmetric256
from deco_jax.data import sources
from deco_jax.data.pipeline import read_one
from tests.helpers import fake_devices, lpips_files, relative_error
from tests.runs import NO_SAMPLES, rows, steps, succeed

TOKENS = ["--config.model.context_tokens=3", "--config.model.context_start=1"]
SMOKES = {
    "asymmetric": ["asymmetric256"],
    "energy": ["energy256"],
    "perceptual": ["perceptual256"],
    "pixelgen": ["pixelgen256"],
    "jit512": ["jit512"],
    "tokens": ["imagenet256", *TOKENS],  # DeCo with class tokens
    "muon": ["imagenet256", "--config.optimizer.name=muon"],
}


@pytest.fixture(scope="module", params=SMOKES)
def run(request, tmp_path_factory):
    """A finished run of four steps with the checkpoints 2 and 4, and the arguments that made it."""
    folder = tmp_path_factory.mktemp(request.param)
    workdir, arguments = folder / "run", SMOKES[request.param]
    arguments = [f"--config=configs/{arguments[0]}.py:smoke", *arguments[1:]]
    if request.param in ("perceptual", "pixelgen"):
        arguments += lpips_files(folder)
    succeed(*arguments, f"--workdir={workdir}", NO_SAMPLES)
    assert steps(workdir) == ["2", "4"]
    return workdir, arguments


@pytest.mark.slow
def test_goes_on_on_eight_devices(run, tmp_path):
    whole, arguments = run
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("metrics.jsonl", "events*"))
    shutil.rmtree(part / "checkpoints" / "4")
    split = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    succeed(*arguments, f"--workdir={part}", NO_SAMPLES, *split, env=fake_devices(8))
    for step in (3, 4):
        for name in ("loss", "pixel", "gradient_norm", "balance"):
            if name not in rows(whole)[step]:
                assert (name, "pixelgen" in arguments[0]) == ("balance", False)
                continue
            np.testing.assert_allclose(rows(part)[step][name], rows(whole)[step][name], rtol=1e-4)


def test_muon_goes_on(tmp_path):
    """To the bit, through the command line; its checkpoints hold no constants of the optimizer."""
    arguments = ("--config=configs/quickstart.py:smoke", "--config.optimizer.name=muon", NO_SAMPLES)
    succeed(*arguments, f"--workdir={tmp_path}")
    last = steps(tmp_path)[-1]
    whole = rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / last)
    (tmp_path / "metrics.jsonl").unlink()
    succeed(*arguments, f"--workdir={tmp_path}")
    assert steps(tmp_path)[-1] == last
    for name in ("loss", "gradient_norm"):
        assert rows(tmp_path)[int(last)][name] == whole[int(last)][name]


@pytest.mark.slow
def test_samples(run, tmp_path):
    whole, arguments = run
    result = succeed(*arguments, f"--workdir={whole}", "--mode=sample", "--config.sample.npz=True")
    assert "samples.npz" in result.stdout
    with np.load(whole / "samples" / "samples.npz") as file:
        drawn = file["arr_0"]
    assert drawn.shape == (10, 32, 32, 3)
    model = deco_jax.load(whole)
    np.testing.assert_array_equal(model.sample(classes=range(10)), drawn)


@pytest.mark.slow
def test_class_tokens_go_out_and_in_again(tmp_path):
    """Of DeCo, which no official file has."""
    workdir = tmp_path / "run"
    arguments = ("--config=configs/imagenet256.py:smoke", f"--workdir={workdir}", *TOKENS)
    succeed(*arguments, NO_SAMPLES, "--config.train.num_steps=1")
    assert (
        "no deco.ckpt: the official code has no model deco with class tokens"
        in succeed(*arguments, "--mode=export").stdout
    )
    model, exported = deco_jax.load(workdir), deco_jax.load(workdir / "export")
    assert model.params["context_positions"].shape == (3, 32)
    np.testing.assert_array_equal(exported.params["context_positions"], model.params["context_positions"])


@pytest.mark.slow
def test_the_basis_is_the_data_s(tmp_path):
    """Against float64 on all of the data, whose order then doesn't matter; exported and loaded it is the same."""
    config = asymmetric256.get_config("smoke")
    workdir = tmp_path / "run"
    arguments = ("--config=configs/asymmetric256.py:smoke", f"--workdir={workdir}", NO_SAMPLES)
    succeed(*arguments, "--config.train.num_steps=1", "--config.data.measured_images=100000")
    source = sources.open_source(config.data)
    x = np.stack([read_one(source, i, (32, 32))["image"] for i in range(len(source))]) / 127.5 - 1
    patches = x.reshape(len(x), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192)
    _, _, vectors = np.linalg.svd(patches, full_matrices=False)
    model = deco_jax.load(workdir)
    basis = model.denoiser.prediction.basis
    assert basis.shape == (192, 8)
    assert relative_error(basis @ basis.T, vectors[:8].T @ vectors[:8]) < 1e-5

    result = succeed(*arguments[:2], "--mode=export")
    assert "no official" not in result.stdout
    exported = deco_jax.load(workdir / "export")
    np.testing.assert_array_equal(exported.denoiser.prediction.basis, basis)
    np.testing.assert_array_equal(exported.sample(classes=[3, 4]), model.sample(classes=[3, 4]))
    (workdir / "export" / "measured.npz").unlink()
    with pytest.raises(deco_jax.errors.UserError, match=r"measured\.npz; export it again"):
        deco_jax.load(workdir / "export")

"""evaluation/spectrum.py and --mode=spectrum, against SciPy's DCT in float64."""

from __future__ import annotations

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from PIL import Image

from configs import quickstart
from deco_jax import config as config_lib
from deco_jax.conditioning.requests import even_labels
from deco_jax.evaluation.spectrum import block_energy, normalised_spectrum
from deco_jax.method.dct import zigzag
from deco_jax.models import network as network_lib
from deco_jax.programs import spectrum
from deco_jax.run import checkpoint, sharding
from deco_jax.sampling import generate
from tests.helpers import relative_error, run_main
from tests.runs import SMOKE, succeed, two_steps

JPEG = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5]  # the beginning of its zigzag


def reference(maps: np.ndarray, block: int) -> np.ndarray:
    """[batch, height, width, channels] → [batch, block, block], tile by tile."""
    height, width = maps.shape[1:3]
    maps = np.pad(maps, ((0, 0), (0, -height % block), (0, -width % block), (0, 0)), mode="reflect")
    energies = [
        scipy.fft.dctn(maps[:, y : y + block, x : x + block], axes=(1, 2), norm="ortho") ** 2
        for y in range(0, maps.shape[1], block)
        for x in range(0, maps.shape[2], block)
    ]
    return np.mean(energies, axis=0).mean(-1)


@pytest.mark.parametrize("shape, block", [((2, 16, 24, 5), 8), ((1, 20, 13, 3), 8), ((3, 4, 6, 7), 4)])
def test_energy_equals_scipy(shape, block):
    maps = np.random.default_rng(0).standard_normal(shape)
    energy = block_energy(jnp.asarray(maps, jnp.float32), block)
    assert energy.dtype == jnp.float32
    assert relative_error(energy, reference(maps.astype(np.float32).astype(np.float64), block)) < 1e-5


def test_white_noise_is_flat():
    maps = np.random.default_rng(1).standard_normal((16, 64, 64, 3)).astype(np.float32)
    curve = normalised_spectrum(np.asarray(block_energy(jnp.asarray(maps))).mean(0))
    assert curve.max() == 1
    assert curve.min() > 0.87  # five standard deviations: the mean of 3072 squares varies by √(2 / 3072)


def test_a_constant_has_no_frequencies():
    energy = np.asarray(block_energy(jnp.full((1, 16, 16, 2), 0.5)))[0]
    assert energy[0, 0] == pytest.approx(16, rel=1e-5)  # (0.5 · 8)²
    curve = normalised_spectrum(energy)
    assert curve[0] == 1
    assert np.abs(curve[1:]).max() < 1e-6
    assert not normalised_spectrum(np.zeros((8, 8))).any()


def test_zigzag_order():
    energy = np.expm1(np.arange(64.0).reshape(8, 8) / 64)
    assert np.round(normalised_spectrum(energy) * 63)[:16].tolist() == JPEG


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectrum")
    run = two_steps(folder)
    out = folder / "figure"
    result = succeed(
        SMOKE,
        f"--workdir={out}",
        "--mode=spectrum",
        f"--config.spectrum.checkpoints={run},{run}/checkpoints/1",
        "--config.spectrum.num_images=3",
        "--config.spectrum.batch_size=2",
        "--config.sample.num_steps=2",
        "--config.sample.sampler=euler",
    )
    return out, json.loads((out / "spectrum.json").read_text()), result.stdout


def test_two_checkpoints_in_one_plot(measured):
    folder, result, said = measured
    first, second = result["checkpoints"]
    assert first["checkpoint"].endswith("checkpoints/2")
    assert second["checkpoint"].endswith("checkpoints/1")
    assert first["dit"]["energy"] != second["dit"]["energy"]
    for run in (first, second):  # 16² in patches of 4
        assert (run["dit"]["block"], len(run["dit"]["spectrum"])) == (4, 16)
        assert (run["velocity"]["block"], len(run["velocity"]["spectrum"])) == (8, 64)
        assert max(run["dit"]["spectrum"]) == 1
    assert "its map uses 4x4" in said
    with Image.open(folder / "spectrum.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_energies_of_a_checkpoint_by_hand(measured):
    """Of every image at every state of Euler's method, the filled-up last batch left out."""
    from configs import quickstart

    folder, result, _ = measured
    config = quickstart.get_config("smoke")
    mesh = sharding.make_mesh(1, 1)
    network = network_lib.build(config.model.to_dict())
    where = folder.parent / "run" / "checkpoints" / "2"
    params = checkpoint.load_average(where, network.shapes, config, mesh)
    times = np.linspace(0, 1, 3)
    times = times / (times + config.sample.shift * (1 - times))  # the shifted grid of two steps
    dit, velocity = [], []
    for image in range(3):
        x = np.asarray(generate.noise_of(0, np.arange(3), (16, 16))(0))[image : image + 1]
        for now, after in itertools.pairwise(times):
            t = jnp.full((1,), now, jnp.float32)
            label = even_labels(3, range(10))[[image]]
            v, inside = network.apply(params, jnp.asarray(x, jnp.float32), t, label)
            v_null, _ = network.apply(params, jnp.asarray(x, jnp.float32), t, np.array([10]))
            v, v_null = np.asarray(v, np.float64), np.asarray(v_null, np.float64)
            dit.append(reference(np.asarray(inside["low_frequency"], np.float64).reshape(1, 4, 4, -1), 4))
            velocity.append(reference(v, 8))
            low, high = config.sample.guidance_interval
            guided = v_null + config.sample.guidance * (v - v_null) if low <= now <= high else v
            x = x + (after - now) * guided
    (first, _) = result["checkpoints"]
    for name, energies, block in (("dit", dit, 4), ("velocity", velocity, 8)):
        expected = np.mean(energies, axis=(0, 1)).reshape(-1)[zigzag(block)]
        assert relative_error(first[name]["energy"], expected) < 1e-4


def test_on_the_checkpoint_s_own_path(tmp_path, monkeypatch):
    theirs, ours = quickstart.get_config("smoke"), quickstart.get_config("smoke")
    theirs.path.name, theirs.path.noise_scale = "energy", 3.0
    monkeypatch.setattr(checkpoint, "load_config", lambda where: config_lib.to_json(theirs))
    found = spectrum.stored_config(tmp_path, ours)
    assert (found.path.name, found.path.noise_scale) == ("energy", 3.0)


def test_computed_as_the_config_says(measured):
    """The checkpoint says which model, the config how to compute it: one of a GPU can be looked at without one."""
    from configs import quickstart

    folder, _, _ = measured
    config = quickstart.get_config("smoke")
    config.model.remat, config.model.width = "full", 64
    theirs = spectrum.stored_config(folder.parent / "run" / "checkpoints" / "2", config)
    assert (theirs.model.remat, theirs.model.width) == ("full", 32)


def test_data_and_weights(measured):
    from configs import quickstart
    from deco_jax.data import pipeline, sources

    _, result, _ = measured
    config = quickstart.get_config("smoke")
    source = sources.open_source(config.data)
    images = np.stack([pipeline.read_one(source, i, (16, 16))["image"] for i in (0, 599, 1198)])
    energy = reference(images / 127.5 - 1, 8).mean(0)
    assert result["data"]["images"] == 3
    assert relative_error(result["data"]["energy"], energy.reshape(-1)[zigzag()]) < 1e-5
    logarithms = np.log(1 + energy).reshape(-1)[zigzag()]
    np.testing.assert_allclose(result["data"]["spectrum"], logarithms / logarithms.max(), atol=1e-5)
    # quality 85: steps floor((table · 30 + 50) / 100); 16 → 5, 99 → 30, and the smallest, 10 → 3
    weights = result["frequency_weights"]
    assert weights["Y"][0] == pytest.approx(3 / 5)
    assert max(weights["Y"]) == 1
    assert weights["Cb"][-1] == pytest.approx(5 / 30)
    assert weights["Cb"] == weights["Cr"]


def test_no_checkpoint(tmp_path):
    result = run_main(SMOKE, f"--workdir={tmp_path}", "--mode=spectrum", "--config.spectrum.checkpoints=/nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no checkpoint in /nowhere")

"""Every config's smoke through `python -m deco_jax.main`, and what a run leaves in its folder."""

from __future__ import annotations

import importlib
import json
import math
import re
import signal

import numpy as np
import pytest
from PIL import Image

from deco_jax import config as config_lib
from deco_jax.data.transforms import image_sides
from deco_jax.programs import sample
from deco_jax.sampling import generate
from tests.helpers import ROOT, lpips_files
from tests.runs import SMOKE, rows, signal_when, steps, succeed, two_steps

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


# Configs whose smoke compiles what another one does, with other numbers; and those with VGG16, which takes
# minutes. `-m slow` runs them.
LIKE_OTHERS = {"benchmark_cpu", "cifar10", "imagenet512", "irepa256", "jit512", "meanflow_cifar10"}
LIKE_OTHERS |= {"t2i_512", "t2i_emoji", "t2i_finetune"}
WITH_VGG = {"perceptual256", "pixelgen256"}
SMOKES = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS | WITH_VGG else name for name in CONFIGS]


@pytest.mark.parametrize("name", SMOKES)
def test_smoke_trains_and_samples(tmp_path, tmp_path_factory, name):
    command = [f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}"]
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    with config.unlocked():
        config.sample.npz = True
    if config.loss.lpips_weight:
        command += lpips_files(tmp_path_factory.mktemp("lpips"))
    elif config.teacher.name == "vgg":
        vgg, _ = lpips_files(tmp_path_factory.mktemp("lpips"))
        command.append(vgg.replace("--config.lpips.vgg=", "--config.teacher.path="))
    if len(command) > 2:
        config.update_from_flattened_dict(dict(part.removeprefix("--config.").split("=") for part in command[2:]))
    total, log_every = config.train.num_steps, config.train.log_every
    height, width = image_sides(config.data.image_size)

    said = succeed(*command, "--config.sample.npz=True").stdout
    assert "compiling the training step" in said
    assert re.search(r"compiled in \d+\.\d s", said)
    assert re.search(rf"step {total}/{total}  \S+ left  .*loss .*images_per_second ", said)

    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_json(config)
    logged = rows(tmp_path)
    term = "mean_velocity" if config.loss.mean_flow else "pixel"
    assert list(logged) == list(range(log_every, total + 1, log_every))
    for row in logged.values():
        assert {"step", "loss", term, "gradient_norm", "images_per_second", "unreadable_images"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert (tmp_path / "checkpoints" / str(total)).is_dir()
    assert all(step.isdigit() for step in steps(tmp_path))
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
    if config.train.sample_every:
        with Image.open(tmp_path / "samples" / f"step_{total:08d}.png") as image:
            assert image.mode == "RGB"
            assert image.width > width
            assert image.height > height

    said = succeed(*command, "--mode=sample", "--config.sample.npz=True").stdout
    assert "compiling" in said
    assert re.search(r"compiled and drawn in \d+\.\d s", said)
    with np.load(tmp_path / "samples" / "samples.npz") as file:
        assert file.files == ["arr_0"]
        samples = file["arr_0"]
    assert samples.dtype == np.uint8
    assert samples.shape == (config.sample.num_images, height, width, 3)
    with Image.open(tmp_path / "samples" / "grid.png") as image:
        grid = np.asarray(image)
    assert grid.shape[2] == 3
    # On white, each image enlarged and after a gap of two of its pixels.
    gap = int(np.argmax((grid[:, :, :] != 255).any(axis=(1, 2))))
    factor = gap // 2
    corner = grid[gap : gap + height * factor : factor, gap : gap + width * factor : factor]
    np.testing.assert_array_equal(corner, samples[0])
    assert not (tmp_path / "samples" / "parts").exists()


def test_sampling_goes_on_where_it_was_cut_off(tmp_path):
    """Killed after the second of six batches; the images are exactly those of an uninterrupted run."""
    checkpoint = two_steps(tmp_path) / "checkpoints" / "2"
    # So many steps that a batch takes long enough to be caught in.
    command = [
        SMOKE,
        "--mode=sample",
        f"--checkpoint={checkpoint}",
        "--config.sample.num_images=60",
        "--config.sample.batch_size=10",
        "--config.sample.num_steps=100",
        "--config.sample.npz=True",
    ]
    succeed(*command, f"--workdir={tmp_path / 'whole'}")

    cut = tmp_path / "cut"
    code, _ = signal_when(signal.SIGKILL, lambda said: "20 of 60 images" in said, *command, f"--workdir={cut}")
    assert code == -signal.SIGKILL
    assert not (cut / "samples" / "samples.npz").exists()
    said = succeed(*command, f"--workdir={cut}").stdout
    match = re.search(r"60 images from .*, (\d+) of them done", said)
    assert match
    assert 20 <= int(match[1]) < 60

    with np.load(tmp_path / "whole/samples/samples.npz") as whole, np.load(cut / "samples/samples.npz") as resumed:
        np.testing.assert_array_equal(whole["arr_0"], resumed["arr_0"])
    assert (cut / "samples/grid.png").exists()


def test_another_request_draws_anew(tmp_path):
    """Nothing drawn with another seed or from another checkpoint, also a later one at its path, is mixed in; the grid's
    size changes nothing.
    """
    config = importlib.import_module("configs.quickstart").get_config("smoke")
    first = generate.fingerprint(config, tmp_path / "1")
    sample.Parts(tmp_path / "parts", first).add(np.zeros((4, 16, 16, 3), np.uint8))
    config.sample.grid_images = 5
    assert sample.Parts(tmp_path / "parts", generate.fingerprint(config, tmp_path / "1")).count == 4
    assert generate.fingerprint(config, tmp_path / "2") != first
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 1}')
    written = generate.fingerprint(config, tmp_path / "1")
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 2}')
    assert len({first, written, generate.fingerprint(config, tmp_path / "1")}) == 3
    config.sample.seed = 1
    assert sample.Parts(tmp_path / "parts", generate.fingerprint(config, tmp_path / "1")).count == 0
    assert not list((tmp_path / "parts").glob("*.npy"))

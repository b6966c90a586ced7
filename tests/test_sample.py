"""--mode=sample: chosen classes, the same noise for each, single images, and what an earlier request left."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import deco_jax
from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.programs.sample import keep_earlier, sample
from tests.runs import random_checkpoint
from tests.test_lock import hold


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = random_checkpoint(tmp_path_factory.mktemp("sample") / "run", quickstart.get_config("smoke"))
    (workdir / "classes.json").write_text(json.dumps([f"digit {i}" for i in range(10)]))
    return workdir


def settings(**changes):
    config = quickstart.get_config("smoke")
    config.sample.update(
        {"sampler": "euler", "num_steps": 3, "num_images": 4, "batch_size": 4, "classes": "digit 7, 2"}
    )
    config.sample.update(changes)
    return config


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file)


def test_chosen_classes_as_files_and_grid(workdir):
    sample(settings(png=True, grid_columns=4), str(workdir))
    folder = workdir / "samples"
    names = ["000000_class_7", "000001_class_7", "000002_class_2", "000003_class_2"]
    assert sorted(path.stem for path in (folder / "images").iterdir()) == names
    drawn = np.stack([pixels(folder / "images" / f"{name}.png") for name in names])
    model = deco_jax.load(workdir)
    assert model.class_names == [f"digit {i}" for i in range(10)]
    same = model.sample(classes=["digit 7", 7, 2, "2"], sampler="euler", num_steps=3)
    assert np.abs(drawn.astype(int) - same).max() <= 1
    height, width, _ = pixels(folder / "grid.png").shape
    assert width / height == (4 * 18 + 2) / (18 + 2)
    assert not (folder / "parts").exists()


def test_same_noise(workdir, tmp_path):
    for name, same in (("same", True), ("own", False)):
        config = settings(same_noise=same, npz=True, guidance=1.0, num_steps=1)
        sample(config, str(tmp_path / name), str(workdir))
    images = {name: np.load(tmp_path / name / "samples" / "samples.npz")["arr_0"] for name in ("same", "own")}
    np.testing.assert_array_equal(images["same"][:2], images["own"][:2])
    assert (images["same"][2:] != images["own"][2:]).any()
    # One small step from the noise: the label matters less than the noise.
    model = deco_jax.load(workdir)
    noise = next(model.stream(classes=[2, 2], num_steps=1, sampler="euler")).images
    again = next(model.stream(classes=[7, 7], num_steps=1, sampler="euler")).images
    np.testing.assert_array_equal(noise, again)
    own = model.sample(classes=[2, 2], guidance=1.0, num_steps=1, sampler="euler")
    assert np.abs(images["same"][2:].astype(int) - own).max() <= 1


def test_two_requests_at_once_do_not_mix(workdir):
    """The parts of one would be taken for those of the other."""
    (workdir / "samples").mkdir(exist_ok=True)
    with hold(workdir / "samples") as process:
        with pytest.raises(UserError, match=rf"samples is in use by process {process.pid} on "):
            sample(settings(), str(workdir))
        process.kill()
    assert not (workdir / "samples" / "parts").exists()
    sample(settings(), str(workdir))
    assert not (workdir / "samples" / ".lock").exists()


def test_an_earlier_request_is_kept(workdir, tmp_path, capsys):
    run = str(tmp_path)
    folder = tmp_path / "samples"
    sample(settings(npz=True), run, str(workdir))
    first = (folder / "samples.npz").read_bytes()
    sample(settings(npz=True, grid_columns=1), run, str(workdir))  # the same images, shown in another way
    assert not (folder / "earlier").exists()
    capsys.readouterr()
    sample(settings(seed=1), run, str(workdir))
    assert f"the images of an earlier request are kept in {folder / 'earlier' / '1'}" in capsys.readouterr().out
    assert (folder / "earlier" / "1" / "samples.npz").read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == ["earlier", "grid.png", "request.json"]
    assert json.loads((folder / "earlier" / "1" / "request.json").read_text())["sample"]["seed"] == 0
    sample(settings(seed=2), run, str(workdir))
    assert sorted(path.name for path in (folder / "earlier").iterdir()) == ["1", "2"]


def test_images_without_a_note_are_kept_too(tmp_path):
    """As version 0.1 left them; training's grids stay where they are."""
    for name in ("grid.png", "step_00000004.png"):
        (tmp_path / name).write_text(name)
    keep_earlier(tmp_path, "something")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "step_00000004.png"]
    assert (tmp_path / "earlier" / "1" / "grid.png").read_text() == "grid.png"
    keep_earlier(tmp_path, "something")
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == ["1"]


def test_a_class_that_is_not_there(workdir, tmp_path):
    with pytest.raises(UserError, match="there is no class 'digit 77'; did you mean 'digit 7'"):
        sample(settings(classes="digit 77"), str(tmp_path / "new"), str(workdir))
    assert not (tmp_path / "new").exists()

"""Runs written by version 1 of this code (November 2026, before the method became a value) go on with today's.

Each zip holds a checkpoint of step 2, the run's config.json, its metrics of all 4 steps, and samples drawn from that
checkpoint, all by the old code.
"""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import pytest

from tests.helpers import ROOT
from tests.runs import NO_SAMPLES, rows, steps, succeed

RUNS = {
    "classes": ["--config=configs/quickstart.py:smoke", "--config.model.width=16", "--config.model.decoder_width=4"],
    "captions": [
        "--config=configs/t2i_256.py:smoke", "--config.model.width=16", "--config.model.decoder_width=4",
        "--config.model.depth=2",
    ],
}  # fmt: skip


@pytest.fixture(params=RUNS)
def old_run(request, tmp_path):
    """The command of an old run, and a copy of its workdir."""
    with zipfile.ZipFile(ROOT / "tests" / "old_runs" / f"{request.param}.zip") as archive:
        archive.extractall(tmp_path / "run")
    return RUNS[request.param], tmp_path / "run"


def test_resumes_training(old_run):
    command, workdir = old_run
    expected = rows(workdir)
    assert list(expected) == [1, 2, 3, 4]
    assert steps(workdir) == ["2"]
    said = succeed(*command, NO_SAMPLES, f"--workdir={workdir}").stdout
    assert "resumed at step 2" in said
    assert steps(workdir) == ["2", "4"]
    for step in (3, 4):
        for name in ("loss", "pixel", "frequency", "gradient_norm"):
            assert rows(workdir)[step][name] == pytest.approx(expected[step][name], rel=1e-4), (step, name)


def test_draws_the_same_images(old_run):
    command, workdir = old_run
    expected = images(workdir)
    succeed(
        *command, f"--workdir={workdir}", "--mode=sample", "--config.sample.npz=True", "--config.sample.num_images=4",
        "--config.sample.batch_size=4",
    )  # fmt: skip
    drawn = images(workdir)
    assert drawn.shape == expected.shape
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert expected.std() > 10


def test_knows_its_own_settings(old_run):
    """Its config.json lacks later settings and has a side for a size; what it drew then is drawn from it alone."""
    _, workdir = old_run
    expected = images(workdir)
    few = ["--config.sample.npz=True", "--config.sample.num_images=4", "--config.sample.batch_size=4"]
    succeed(f"--workdir={workdir}", "--mode=sample", *few)
    assert np.abs(images(workdir).astype(int) - expected).max() <= 1
    said = succeed(f"--workdir={workdir}", "--config.train.num_steps=3").stdout
    assert "resumed at step 2" in said
    assert "settings that differ from those so far: train.num_steps 4 → 3" in said


def images(workdir: pathlib.Path) -> np.ndarray:
    with np.load(workdir / "samples" / "samples.npz") as file:
        return file["arr_0"]

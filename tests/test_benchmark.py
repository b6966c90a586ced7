from __future__ import annotations

import importlib.util
import json

import ml_collections
import pytest

from configs import quickstart, reg256
from deco_jax.errors import UserError
from deco_jax.programs import benchmark
from deco_jax.run import sharding
from tests.helpers import run_main


def test_a_missing_pytorch_is_found_before_anything_is_timed(tmp_path, monkeypatch):
    config = quickstart.get_config("smoke")
    config.benchmark.parts = "train,torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch needs PyTorch, pip install torch; or leave it out"):
        benchmark.benchmark(config, str(tmp_path / "run"), 0.0)
    assert not (tmp_path / "run").exists()


def test_figures_of_a_row():
    row = benchmark.row([2.0, 1.0, 4.0], images=8, arithmetic=6e12, peak=12e12)
    assert row["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert row["images_per_second"] == 4.0
    assert row["tflop_per_second"] == 3.0
    assert row["share_of_peak"] == 0.25
    text = benchmark.line("train step", row)
    assert "25.0%" in text
    assert len(text) == len(benchmark.HEADER)


def test_a_row_without_arithmetic_or_a_known_chip():
    assert set(benchmark.row([1.0], 0, 0.0, 1e12)) == {"seconds", "runs"}
    assert "share_of_peak" not in benchmark.row([1.0], 1, 1e9, None)


def test_warm_up_is_not_timed():
    calls = []
    seconds = benchmark.timed(lambda: calls.append(0), ml_collections.ConfigDict({"warmup": 2, "repeats": 3}))
    assert (len(calls), len(seconds)) == (5, 3)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("benchmark")
    result = run_main(
        "--config=configs/benchmark_cpu.py:smoke",
        f"--workdir={workdir}",
        "--mode=benchmark",
        "--config.loss.repa_weight=0.5",
        "--config.loss.repa_layer=2",
        "--config.teacher.size=S",
    )
    assert result.returncode == 0, result.stderr
    for name in ("train step", "forward", "input batch"):
        assert f"  {name} " in result.stdout
    return json.loads((workdir / "benchmark.json").read_text())


def test_the_frozen_part_is_the_teacher_on_the_batch(report):
    """By its arithmetic; at this size it is nearly all of the step, so that their seconds can come out either way."""
    rows = report["rows"]
    frozen, step = (
        1e12 * rows[name]["tflop_per_second"] * rows[name]["seconds"]["median"]
        for name in ("its frozen part", "train step")
    )
    weights, tokens = 12 * 12 * 384**2, 4 * 4 + 1  # the matrices of ViT-S/14's 12 blocks; 32² pixels in patches of 8²
    assert frozen == pytest.approx(2 * weights * tokens * 8, rel=0.03)  # attention and the patches' embedding: 2 %
    assert frozen < step < 1.5 * frozen


def test_the_steps_memory(report):
    """The teacher's weights are among the step's arguments."""
    memory = report["train_step_bytes"]
    assert memory["arguments"] > 2 * 21e6  # ViT-S/14 in bfloat16
    assert sum(memory.values()) == 2 * memory["peak"]


def test_every_part_is_timed(report):
    rows = report["rows"]
    names = [
        "import",
        "build",
        "compile",
        "first step",
        "train step",
        "its frozen part",
        "forward",
        "sample one image",
        "sample 10",
        "input batch",
    ]
    assert list(rows) == names
    for row in rows.values():
        seconds = row["seconds"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert rows["train step"]["images_per_second"] == pytest.approx(8 / rows["train step"]["seconds"]["median"])
    assert report["chip"] is None
    assert "share_of_peak" not in rows["train step"]


def test_the_forward_pass_of_a_model_with_a_class_token():
    config = reg256.get_config("smoke")
    config.benchmark.parts, config.benchmark.repeats = "forward", 1
    found = {}
    benchmark.time_forward(config, sharding.make_mesh(1, 1), lambda name, seconds, *_: found.update({name: seconds}))
    assert len(found["forward"]) == 1

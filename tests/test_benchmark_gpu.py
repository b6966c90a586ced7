"""launch/benchmark_gpu.sh, which has to work the first time somebody has a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from configs import imagenet256
from deco_jax import config as config_lib
from launch import benchmark_gpu
from tests.helpers import ROOT


def test_at_smoke_size_on_this_machine(tmp_path):
    folder = tmp_path / "gpu"
    result = subprocess.run(
        ["launch/benchmark_gpu.sh", folder, "--smoke", "--minutes=5"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=330,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((folder / "benchmark.json").read_text())
    step, sampling, cudnn = (results[row.name] for row in benchmark_gpu.smoke_rows())
    assert step["status"] == sampling["status"] == "ok"
    assert step["rows"]["train step"]["images_per_second"] > 0
    assert step["train_step_bytes"]["peak"] > 0
    assert {"sample one image", "sample 10", "inception"} <= set(sampling["rows"])
    assert cudnn["status"] == "failed"  # a row, and not the end
    assert "needs an NVIDIA GPU" in cudnn["output"][-1]
    table = (folder / "benchmark.txt").read_text()
    for row in benchmark_gpu.smoke_rows():
        assert row.name in table


@pytest.mark.parametrize("row", benchmark_gpu.rows(), ids=lambda row: row.name)
def test_every_row_is_a_config_that_is_accepted(row, tmp_path):
    arguments = benchmark_gpu.command(row, tmp_path)
    assert "--mode=benchmark" in arguments
    config = imagenet256.get_config(row.variant)
    config.update_from_flattened_dict({"benchmark.parts": row.parts, "data.source": "digits", **row.settings})
    config_lib.check(config)


def test_rows_have_names_of_their_own_and_cover_what_was_asked_for():
    rows = benchmark_gpu.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert set(benchmark_gpu.PUBLISHED) <= {row.name for row in rows[:2]}  # the comparisons come first
    for variant in ("L", "XL"):
        of_it = [row.settings for row in rows if row.variant == variant and row.parts == "train"]
        assert {row["data.batch_size"] for row in of_it} == {16, 32, 64}
        assert {"full", "dots", "none"} <= {row.get("model.remat") for row in of_it}
        assert any(row.get("loss.repa_weight") == 0 for row in of_it)
        assert any(row.get("model.attention") == "xla" for row in of_it)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    measured = []
    answers = {"L, batch 32": "ok", "XL, sampling": "out of memory", "XL, batch 32": "failed"}

    def measure(row, folder, seconds):
        measured.append(row.name)
        status = answers.get(row.name, "out of time")
        seconds = {"median": 0.38, "min": 0.3, "max": 0.5}
        timed = {"rows": {"train step": {"seconds": seconds, "images_per_second": 84.2}}, "peak_memory_bytes": 2**34}
        return {"status": status, **(timed if status == "ok" else {"output": ["the last words"]})}

    names = [row.name for row in benchmark_gpu.rows()]
    assert benchmark_gpu.main([str(tmp_path)], measure) == 0
    assert measured == names
    printed = capsys.readouterr().out
    assert "the paper 0.19 s, here 2.00 x" in printed
    assert "failed: the last words" in printed
    measured.clear()
    benchmark_gpu.main([str(tmp_path)], measure)
    assert measured == names[2:]  # a figure and a full memory stand; what failed or was cut off is tried again
    measured.clear()
    assert benchmark_gpu.main([str(tmp_path), "--minutes=0"], measure) == 0
    assert measured == []
    assert "not done in 0 minutes: XL, batch 32; Inception" in capsys.readouterr().out


def process(monkeypatch, code):
    monkeypatch.setattr(benchmark_gpu, "command", lambda row, folder: [sys.executable, "-c", code])


ROW = benchmark_gpu.rows()[0]


def test_a_full_memory_is_told_from_other_failures(tmp_path, monkeypatch):
    process(monkeypatch, "import sys; sys.exit('jaxlib: RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.')")
    assert benchmark_gpu.measure(ROW, tmp_path / "row", 60)["status"] == "out of memory"
    process(monkeypatch, "raise ValueError('something else')")
    found = benchmark_gpu.measure(ROW, tmp_path / "row", 60)
    assert (found["status"], found["output"][-1]) == ("failed", "ValueError: something else")


def test_ctrl_c_leaves_no_process_on_the_gpu(tmp_path, monkeypatch):
    process(monkeypatch, "import time; time.sleep(600)")
    started, wait = [], subprocess.Popen.communicate

    def interrupted(self, input=None, timeout=None):
        started.append(self)
        if timeout is not None:
            raise KeyboardInterrupt
        return wait(self, input)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark_gpu.measure(benchmark_gpu.smoke_rows()[0], tmp_path / "row", 60.0)
    assert started[0].returncode == -signal.SIGKILL


def test_a_row_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    process(monkeypatch, "import time; print('compiling', flush=True); time.sleep(600)")
    found = benchmark_gpu.measure(ROW, tmp_path / "row", 1.0)
    assert found["status"] == "out of time"
    assert found["wall_seconds"] < 30

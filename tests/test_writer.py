"""What a run leaves for people and scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from deco_jax.programs.actions import Evaluate
from deco_jax.run import files
from deco_jax.run import writer as writer_lib
from deco_jax.run.writer import Writer
from tests.helpers import ROOT

pytestmark = pytest.mark.fast


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_events(tmp_path, capsys):
    writer = Writer(tmp_path, total_steps=10, resumed_at=0)
    writer.write(1, {"loss": 0.5, "unreadable_images": 2})
    writer.write(2, {"loss": float("nan"), "gradient_norm": float("inf")})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "unreadable_images": 2},
        {"step": 2, "loss": None, "gradient_norm": None},  # JSON has neither NaN nor infinity
    ]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"gradient_norm" in events.read_bytes()
    said = capsys.readouterr().out.splitlines()
    assert re.match(r"step 1/10  \dm\d\ds left  loss 0\.5$", said[0])
    assert len(said) == 2


def test_resuming_drops_what_will_be_done_again_and_a_line_cut_short(tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 6, "lo')
    writer = Writer(tmp_path, total_steps=10, resumed_at=3)
    writer.write(4, {"loss": 7.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 7.0)]


def test_a_value_that_comes_later_joins_its_line(tmp_path):
    writer = Writer(tmp_path, total_steps=10, resumed_at=0)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25})
    writer.add(2, "fid", 12.5)
    writer.write(3, {"loss": 0.125})
    writer.add(3, "fid", float("nan"))
    writer.close()
    expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "fid": 12.5}]
    assert lines(tmp_path) == [*expected, {"step": 3, "loss": 0.125, "fid": None}]
    resumed = Writer(tmp_path, total_steps=10, resumed_at=2)
    assert resumed.last == expected[1]
    resumed.write(3, {"loss": 0.1})
    resumed.add(3, "fid", 1.0)
    resumed.close()
    assert lines(tmp_path) == [*expected, {"step": 3, "loss": 0.1, "fid": 1.0}]


def test_parts_of_shared_files_that_a_kill_left_go_the_next_time(tmp_path):
    path, old, new = (tmp_path / name for name in ("a.npz", "a.npz.1.part", "a.npz.2.part"))
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * files.STALE,) * 2)
    with files.whole(path, shared=True) as part:
        part.write_bytes(b"all")
    assert (path.read_bytes(), old.exists(), new.exists()) == (b"all", False, True)  # new: somebody may be writing it


def test_other_hosts_write_nothing(tmp_path, capsys):
    writer = Writer(tmp_path, total_steps=10, resumed_at=0, active=False)
    writer.write(1, {"loss": 0.5})
    writer.write_image(1, "samples", np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
    writer.say("hello")
    writer.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_time_left(tmp_path, monkeypatch, capsys):
    """From the steps since this process began to train: 2 s a step, 90 left, is 3 minutes; then over an hour."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = Writer(tmp_path, total_steps=100, resumed_at=5)
    now[0] += 500  # compiling
    writer.start_clock()
    now[0] += 10
    writer.write(10, {"loss": 1.0})
    assert "3m00s left" in capsys.readouterr().out
    now[0] += 600
    writer.write(15, {"loss": 1.0})  # 61 s a step
    assert "1h26 left" in capsys.readouterr().out
    writer.close()


def test_live_line_is_overwritten_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((30, 10)))
    writer = Writer(tmp_path, total_steps=10, resumed_at=0)
    writer.write(1, {"a_metric_with_a_long_name": 0.5})
    writer.say("a line that stays")
    writer.close()
    said = capsys.readouterr().out
    live, stays = said.split("\r\033[K")[1:]
    assert live.startswith("step 1/10")
    assert len(live) == 29
    assert "\n" not in live
    assert stays.startswith("a line that stays\n")


def test_images(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    writer = Writer(tmp_path, total_steps=10, resumed_at=0)
    writer.write_image(3, "samples", image, tmp_path / "samples" / "step.png")
    writer.close()
    with Image.open(tmp_path / "samples" / "step.png") as file:
        np.testing.assert_array_equal(np.asarray(file), image)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step.png"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"PNG" in events.read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    writer_lib.write_atomically(path, b"old")
    (tmp_path / "config.json.part").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match="directory"):
        writer_lib.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_no_tensorflow():
    program = "import sys, deco_jax.programs.train, deco_jax.programs.sample; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_the_overview_counts_every_parameter(tmp_path):
    writer_lib.write_overview(tmp_path / "a.txt", {"a": {"w": np.zeros((3, 4), np.float32)}, "b": np.zeros(5, np.int8)})
    table = (tmp_path / "a.txt").read_text()
    assert [line.split("|")[1:5] for line in table.splitlines() if "/" in line or "| b" in line] == [
        [" a/w  ", " (3, 4) ", " float32 ", " 12   "],
        [" b    ", " (5,)   ", " int8    ", " 5    "],
    ]
    assert "Total: 17 -- 53 bytes" in table


def test_measuring_during_training_prints_nothing_between_json_lines(capsys):
    config = quickstart.get_config("smoke")
    config.train.log_json = True
    written = {}
    writer = types.SimpleNamespace(add=lambda step, name, value: written.update({name: value}))
    run = types.SimpleNamespace(config=config, writer=writer, best=None)

    def scores(state):
        print("6 of 6 images measured")
        return {"fid": 2.0}

    Evaluate(run, 2, scores)(2, None)
    said = capsys.readouterr()
    assert (said.out, said.err, written) == ("", "6 of 6 images measured\n", {"fid": 2.0})

"""Weights & Biases: what an offline run there holds is what metrics.jsonl holds."""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.programs import evaluate
from deco_jax.run import tracking
from deco_jax.run.writer import Writer
from tests.buckets import needs_gcs
from tests.helpers import ROOT, run_main
from tests.runs import NO_SAMPLES, SMOKE, rows, succeed

wandb = pytest.importorskip("wandb", reason="needs wandb")
BLOCK = 2**15


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def records(data: bytes) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # too little for a header: filled up
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + size], at + 7 + size
        whole = part if kind in (1, 2) else whole + part  # full, first, middle, last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def name_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


class Offline:
    """All that the offline runs of a workdir hold, in their order."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self.ids: set[str] = set()
        self.projects: set[str] = set()
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        wandb.teardown()  # its service may still be writing the file's end
        files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
        self.starts = len(files)
        for record in [record for file in files for record in records(file.read_bytes())]:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.ids.add(record.run.run_id)
                self.projects.add(record.run.project)
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if kind == "history":
                self.history.append({name_of(item): json.loads(item.value_json) for item in record.history.item})
            if kind == "summary":
                self.summary |= {name_of(item): json.loads(item.value_json) for item in record.summary.update}

    def by_step(self) -> dict[int, dict[str, Any]]:
        """{step: values}, of images the file's SHA-256, without what wandb adds of its own."""
        found: dict[int, dict[str, Any]] = {}
        for row in self.history:
            values = {k: v for k, v in row.items() if not k.startswith("_") and ("." not in k or k.endswith(".sha256"))}
            found.setdefault(values["step"], {}).update(values)
        return found


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_run_there_and_equals_metrics_jsonl(tmp_path):
    workdir = tmp_path / "xl"
    command = (SMOKE, f"--workdir={workdir}", "--config.train.wandb=pixels", "--config.train.log_every=1")
    said = succeed(*command, "--config.train.num_steps=2", "--config.train.sample_every=2").stdout
    assert f"Weights & Biases: offline, in {workdir}/wandb" in said
    succeed(*command, "--config.train.num_steps=4", NO_SAMPLES)

    there = Offline(workdir)
    assert there.starts == 2
    assert there.ids == {json.loads((workdir / "wandb.json").read_text())["id"]}
    assert there.projects == {"pixels"}
    assert there.config["train"]["num_steps"] == 4
    assert there.config["model"] == json.loads((workdir / "config.json").read_text())["model"]
    expected, found = rows(workdir), there.by_step()
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    (grid,) = (workdir / "wandb").glob("offline-run-*/files/media/images/*.png")
    assert found[2].pop("samples.sha256") == hashlib.sha256(grid.read_bytes()).hexdigest()
    from PIL import Image

    np.testing.assert_array_equal(Image.open(grid), Image.open(workdir / "samples" / "step_00000002.png"))
    assert found == expected


@pytest.mark.slow
def test_scores_join_their_steps_and_the_run(tmp_path):
    config = quickstart.get_config("smoke")
    config.train.wandb = "pixels"
    writer = Writer(tmp_path, total_steps=10, resumed_at=0, config=config)
    writer.write(1, {"loss": 0.1 + 0.2, "broken": float("nan")})
    writer.add(1, "fid", 12.5)
    writer.close()
    config.evaluate.samples = "samples.npz"
    evaluate._track(config, tmp_path, str(tmp_path), "", {"fid": 3.25})
    there = Offline(tmp_path)
    assert len(there.ids) == 1
    assert there.by_step() == {1: {"step": 1, "loss": 0.1 + 0.2, "fid": 12.5}}  # W&B has no null
    assert there.summary["evaluation/fid"] == 3.25


@pytest.mark.slow
def test_a_sweep_is_one_table_there(tmp_path):
    command = [sys.executable, "launch/sweep.py", SMOKE, f"--workdir={tmp_path / 'sweep'}", "--grid=seed=3"]
    command += ["--", NO_SAMPLES, "--config.train.num_steps=1", "--config.train.wandb=pixels"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "sweep" / "wandb").glob("offline-run-*/files/media/table/*.json")
    table = json.loads(path.read_text())
    ours = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    there = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [{k: v for k, v in row.items() if v is not None} for row in there] == [
        {k: v for k, v in row.items() if k in table["columns"]} for row in ours
    ]
    assert {"seed", "loss", "done"} <= set(table["columns"])
    groups = {
        record.run.run_group
        for file in (tmp_path / "sweep").glob("seed=*/wandb/offline-run-*/*.wandb")
        for record in records(file.read_bytes())
        if record.WhichOneof("record_type") == "run"
    }
    assert groups == {"sweep"}


@pytest.mark.slow
@needs_gcs
def test_an_offline_run_of_a_bucket_lies_there(here, tmp_path):
    from deco_jax.run import storage
    from tests.bucket_runs import assert_nothing_left_here
    from tests.buckets import download

    folder = storage.path("gs://bucket/runs/tracked")
    with tracking.Tracker("pixels", folder, {"seed": 1}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.sync()
        assert any(name.endswith(".wandb") for name in here.names("runs/tracked/wandb/"))
    assert_nothing_left_here(tmp_path)
    there = Offline(download(here, "runs/tracked", tmp_path / "copy"))
    assert there.by_step() == {1: {"step": 1, "loss": 0.5}}
    assert there.ids == {json.loads(here.files["runs/tracked/wandb.json"])["id"]}


def test_without_a_key_or_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "nobody"))
    result = run_main(SMOKE, f"--workdir={tmp_path / 'run'}", "--config.train.wandb=p", stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: Weights & Biases can't be used: No API key configured")
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'config.train.wandb=p needs .* pip install "deco_jax\[wandb\]"'):
        tracking.check("p")


def test_it_is_loaded_only_if_asked_for():
    code = "import sys, deco_jax.programs.train; print('wandb' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_what_fails_there_is_said_once_and_ends_nothing(tmp_path, caplog, monkeypatch):
    tracker = tracking.Tracker("pixels", tmp_path, {})

    def fail(*_: object) -> None:
        raise OSError("the service is gone")

    monkeypatch.setattr(tracker._run, "log", fail)
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert caplog.text.count("gets no more of this run (the service is gone)") == 1
    wandb.finish()


@pytest.mark.slow
def test_tensorboard_has_the_config_and_stdout_a_json_line_a_step(tmp_path):
    from tensorboardX.proto import event_pb2

    command = (SMOKE, f"--workdir={tmp_path}", NO_SAMPLES, "--config.train.num_steps=2", "--config.train.log_every=1")
    result = succeed(*command, "--config.train.log_json=True", "--config.seed=5")
    assert [json.loads(line) for line in result.stdout.splitlines()] == list(rows(tmp_path).values())
    assert "done: step 2" in result.stderr
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, at, texts = path.read_bytes(), 0, {}
    while at < len(data):  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[at : at + 8])
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        texts |= {value.tag: value.tensor.string_val[0] for value in event.summary.value if value.tensor.string_val}
        at += size + 16
    ((tag, text),) = texts.items()
    assert "config" in tag
    assert all(line.startswith("    ") for line in text.decode().splitlines())  # Markdown's code
    assert json.loads(text) == json.loads((tmp_path / "config.json").read_text())
    assert json.loads(text)["seed"] == 5

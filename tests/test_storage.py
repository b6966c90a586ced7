"""Runs, data and weights in a bucket are what they are on a disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
import torch

from configs import quickstart
from deco_jax import command_line
from deco_jax.config import saved, to_json
from deco_jax.data import features as features_lib
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.run import checksums, fetch, lock, storage
from deco_jax.run import files as files_lib
from tests.bucket_runs import FOUR_STEPS, RUN, Data, assert_nothing_left_here, killed_and_resumed, same_samples
from tests.buckets import download, make_images, needs_gcs, upload
from tests.helpers import ROOT, run_main
from tests.runs import SMOKE, assert_same_run, files, succeed
from tests.test_distributed import finish, together

pytestmark = needs_gcs


def test_a_run_killed_and_resumed_in_a_bucket_is_the_one_on_a_disk(here, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(here, images, "images")
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", f"--workdir={here.url}/runs/killed")
    killed_and_resumed(here, "runs/killed", *command)
    assert_same_run(download(here, "runs/killed", tmp_path / "copy"), expected, 4)
    assert any("tensorboard/events" in name for name in here.files)

    resolved = json.loads(here.files["runs/killed/config.json"])
    assert resolved["data"]["path"] == where
    (change,) = map(json.loads, here.files["runs/killed/config_history.jsonl"].splitlines())
    assert change["changed"] == {"train.num_steps": [400, 4]}
    assert_nothing_left_here(tmp_path)


def test_what_a_killed_process_left_here_is_removed(here, tmp_path):
    child = subprocess.Popen(["sleep", "0"])
    child.wait()
    left, ours = tmp_path / "temporary" / f"deco_jax_of_{child.pid}_x", tmp_path / "temporary" / "deco_jax_of_1_x"
    for folder in (left, ours):
        folder.mkdir()
        (folder / "grid.png").write_bytes(b"half")
    with files_lib.whole("gs://bucket/file.txt") as part:
        assert part.parent.name.startswith(f"deco_jax_of_{os.getpid()}_")
        part.write_text("text")
    assert not left.exists()
    assert ours.exists()  # of a process that runs
    assert os.listdir(tmp_path / "temporary") == [ours.name]


def test_checksums_of_a_checkpoint_in_a_bucket(here, tmp_path):
    """A changed, a missing and a replaced object are noticed; the same where the checkpoint was copied to a disk."""
    for name in ("params/d/a", "params/manifest", "ema/d/b"):
        here.upload(f"step/{name}", name.encode() * 100)
    here.upload("step/_CHECKPOINT_METADATA", b"may still change")
    folder = storage.path("gs://bucket/step")
    checksums.write(folder)
    noted = json.loads(here.files["step/checksums.json"])["service"]
    size, sums = noted["params/d/a"]
    data = here.files["step/params/d/a"]
    assert (size, sums["md5"]) == (len(data), hashlib.md5(data).hexdigest())
    assert sorted(noted) == ["ema/d/b", "params/d/a", "params/manifest"]
    copy = download(here, "step", tmp_path / "step")
    for place in (folder, copy):
        checksums.check(place)
    here.upload("step/params/d/a", data[::-1])
    (copy / "params" / "d" / "a").write_bytes(data[::-1])
    for place in (folder, copy):
        checksums.check(place, "ema")
        with pytest.raises(ValueError, match="params/d/a isn't what was written"):
            checksums.check(place)
        (place / "params" / "d" / "a").unlink()
        with pytest.raises(ValueError, match="params/d/a is missing"):
            checksums.check(place, "params")


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(here, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(here, images, "images4")
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", "--workdir=gs://bucket/runs/damaged")
    succeed(*command)
    name = max(here.names("runs/damaged/checkpoints/4/params/"), key=lambda name: len(here.files[name]))
    data = bytearray(here.files[name])
    data[len(data) // 2] ^= 1
    here.upload(name, bytes(data))
    result = succeed(*command)
    assert "isn't what was written: its checksum differs" in result.stderr
    assert "resumed at step 2" in result.stdout
    assert here.files[name.replace("/4/", "/4.damaged/")] == bytes(data)
    assert_same_run(download(here, "runs/damaged", tmp_path / "copy"), expected, 4)


@pytest.mark.slow
def test_two_hosts_killed_and_resumed_in_a_bucket_are_the_two_on_a_disk(here, whole_run, tmp_path):
    images, _ = whole_run
    where, expected = upload(here, images, "images5"), tmp_path / "expected"
    command = (*RUN[1:], *FOUR_STEPS, "--config.data.batch_size=8")
    finish(together(expected, *command, f"--config.data.path={images}"))
    command = (*command, f"--config.data.path={where}")
    processes = together("gs://bucket/runs/two", *command, "--config.train.num_steps=400")
    end = time.monotonic() + 400
    while not here.has("runs/two/checkpoints/2/commit_success.txt"):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
    for process in processes:
        process.kill()
        process.communicate()
    for name in here.names("runs/two/checkpoints/"):
        if "/2/" not in name:
            here.remove(name)
    outputs = finish(together("gs://bucket/runs/two", *command))
    assert "resumed at step 2" in outputs[0]
    assert_same_run(download(here, "runs/two", tmp_path / "copy"), expected, 4)
    assert_nothing_left_here(tmp_path)


@pytest.mark.slow
def test_a_sweep_its_report_and_an_export_in_a_bucket(here, whole_run, tmp_path):
    images, _ = whole_run
    where = upload(here, images, "images6")
    command = [sys.executable, "launch/sweep.py", SMOKE, "--workdir=gs://bucket/sweep", "--grid=seed=0,1"]
    command += ["--plot=loss", "--", *RUN[1:], *FOUR_STEPS, f"--config.data.path={where}"]
    for said in ("running seed=0, train", "already done: seed=1, train"):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
    table = json.loads(here.files["sweep/sweep.json"])
    assert {row["run"]: row["step"] for row in table} == {"seed=0": 4, "seed=1": 4}
    assert all(row["done"] for row in table)
    for row in table:
        last = json.loads(here.files[f"sweep/{row['run']}/metrics.jsonl"].splitlines()[-1])
        assert row["loss"] == last["loss"]
    assert b"| 1 | True |" in here.files["sweep/sweep.md"]
    assert here.files["sweep/loss.png"].startswith(b"\x89PNG")

    runs = "gs://bucket/sweep/seed=0,gs://bucket/sweep/seed=1"
    result = succeed(SMOKE, "--mode=report", "--workdir=gs://bucket/page", f"--config.report.workdirs={runs}")
    assert "wrote gs://bucket/page/report.html" in result.stdout
    assert "about 2 runs" in result.stdout
    page = here.files["page/report.html"].decode()
    assert "seed=0" in page
    assert "seed=1" in page

    copy = download(here, "sweep/seed=0", tmp_path / "copy")
    for workdir in ("gs://bucket/sweep/seed=0", copy):
        succeed("--mode=export", f"--workdir={workdir}")  # with the settings that lie there
    theirs = files(copy / "export")
    assert sorted(theirs) == ["classes.json", "config.json", "deco.ckpt", "ema.safetensors"]
    for name in ("config.json", "classes.json"):
        assert here.files[f"sweep/seed=0/export/{name}"] == theirs[name]
    # Not their bytes: the library writes the notes in the header in any order.
    ours, tensors = map(
        safetensors.numpy.load, (here.files["sweep/seed=0/export/ema.safetensors"], theirs["ema.safetensors"])
    )
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name], tensor)
    loaded = [
        torch.load(io.BytesIO(data)) for data in (here.files["sweep/seed=0/export/deco.ckpt"], theirs["deco.ckpt"])
    ]
    assert loaded[0]["state_dict"].keys() == loaded[1]["state_dict"].keys()
    for key, value in loaded[1]["state_dict"].items():
        assert torch.equal(loaded[0]["state_dict"][key], value)
    assert_nothing_left_here(tmp_path)


@pytest.mark.slow
def test_other_modes_read_and_write_there_and_leave_nothing_here(here, whole_run, tmp_path):
    _, expected = whole_run
    for name, data in files(expected).items():
        here.upload(f"runs/copied/{name}", data)
    for step in (2, 4):  # as a bucket's checkpoints end
        here.upload(f"runs/copied/checkpoints/{step}/commit_success.txt", b"Checkpoint commit was successful")
    common = (*RUN, "--config.sample.num_images=3", "--config.sample.batch_size=3", "--config.sample.num_steps=2")
    for workdir in ("gs://bucket/runs/copied", expected):
        succeed(*common, "--mode=sample", f"--workdir={workdir}", "--config.sample.npz=True")
    sample = here.files["runs/copied/samples/samples.npz"]
    assert sample == (expected / "samples" / "samples.npz").read_bytes()
    assert here.files["runs/copied/samples/grid.png"] == (expected / "samples" / "grid.png").read_bytes()
    assert not any("/parts/" in name for name in here.files)
    result = succeed(*RUN, "--mode=report", "--workdir=gs://bucket/runs/copied")
    assert "wrote gs://bucket/runs/copied/report.html" in result.stdout
    assert b"</html>" in here.files["runs/copied/report.html"]
    assert list((tmp_path / "temporary").glob("deco_jax_*")) == []


def test_a_run_in_a_bucket_knows_its_settings(here, tmp_path):
    config = json.dumps(to_json(quickstart.get_config("smoke"))).encode()
    here.upload("runs/known/config.json", config)
    here.upload("runs/known/checkpoints/4/config/metadata", config)
    for folder in ("", "/checkpoints", "/checkpoints/4"):
        assert saved.of_workdir(f"gs://bucket/runs/known{folder}") is not None
    assert saved.of_workdir("gs://bucket/runs") is None
    for given in ("--workdir=gs://bucket/runs/known", "--config=gs://bucket/runs/known"):
        named = command_line.find_config(["main", given])
        assert named is not None
        assert named.path.endswith("saved.py:gs://bucket/runs/known/config.json")
    settings = saved.get_config("gs://bucket/runs/known/config.json")
    assert to_json(settings) == json.loads(config)
    result = run_main("--mode=export", "--workdir=gs://bucket/runs/known")
    assert "there is no checkpoint in gs://bucket/runs/known; train first" in result.stderr


def test_a_bucket_that_is_not_there_is_one_line(here, tmp_path):
    result = run_main(
        *RUN, *FOUR_STEPS, f"--config.data.path={make_images(tmp_path / 'images')}", "--workdir=gs://other/run"
    )
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == [
        "error: gs://other/run can't be written: there is no such bucket; create it, or check the name"
    ]
    result = run_main(*RUN, *FOUR_STEPS, "--config.data.path=gs://bucket/nothing", f"--workdir={tmp_path / 'run'}")
    assert "error: no such folder: gs://bucket/nothing" in result.stderr
    result = run_main(*RUN, *FOUR_STEPS, "--workdir=hdfs://bucket/run")
    assert "error: --workdir=hdfs://bucket/run is neither a path nor in a bucket" in result.stderr


@pytest.mark.parametrize("source", ["image_folder", "captioned_folder"])
def test_folders_of_a_bucket(here, tmp_path, source):
    folder = make_images(tmp_path / "images", captions=source == "captioned_folder")
    (folder / ".hidden").write_text("")
    where = upload(here, folder, source)
    settings = {"source": source, "split": "", "image_size": 16, "num_workers": 0}
    ours = sources.open_source(Data(settings, path=where))
    same_samples(ours, sources.open_source(Data(settings, path=str(folder))))
    assert ours.name(0).startswith(where)


def test_tars_of_a_bucket_are_read_by_range_and_indexed_once(here, tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images", captions=True)
    (tmp_path / "tars").mkdir()
    for k in range(2):
        with tarfile.open(tmp_path / "tars" / f"{k}.tar", "w") as archive:
            for path in sorted(folder.rglob("*.*"))[k::2] if k else sorted(folder.rglob("*.*")):
                archive.add(path, path.name)
    where = upload(here, tmp_path / "tars", "tars")
    settings = {"source": "webdataset", "split": "", "image_size": 16, "num_workers": 0}
    ours = sources.open_source(Data(settings, path=where))
    same_samples(ours, sources.open_source(Data(settings, path=str(tmp_path / "tars"))))
    assert "tars/.webdataset.index.npz" in here.files
    opened: list[str] = []
    monkeypatch.setattr(storage, "open_blocks", opened.append)
    again = sources.open_source(Data(settings, path=where))
    assert opened == []
    read: list[int] = []
    real = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda name, at, size: read.append(size) or real(name, at, size))
    again[3]
    assert len(read) == 1
    assert read[0] < (tmp_path / "tars" / "0.tar").stat().st_size / 5


def test_parquet_of_a_bucket(here, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from tests.test_parquet import settings, write

    where = upload(here, write(tmp_path / "parquet"), "parquet")
    for more in ({"split": "train"}, {"split": "train", "caption_column": "text"}):
        ours = sources.open_source(settings(where, **more))
        same_samples(ours, sources.open_source(settings(tmp_path / "parquet", **more)))


def test_data_prepared_into_a_bucket(here, tmp_path):
    from deco_jax.programs.prepare import prepare
    from tests.test_prepared import config

    settings = config(make_images(tmp_path / "images"), prepared_images="files")
    prepare(settings, "gs://bucket/shards")
    ours = sources.open_source(config("gs://bucket/shards", source="prepared").data)
    same_samples(ours, sources.open_source(settings.data))
    assert list((tmp_path / "temporary").glob("deco_jax_*")) == []


def test_stored_text_features_of_a_bucket(here, tmp_path):
    key = {"captions": 6, "length": 4, "width": 8, "prefix": "", "encoder": "e"}
    values = np.random.default_rng(0).integers(0, 2**16, (6, 4, 8)).astype(np.uint16)
    hashes = np.asarray([features_lib.caption_hash(f"caption {i}") for i in range(6)])
    features_lib.create("gs://bucket/features", key)
    store = features_lib.Features("gs://bucket/features", key)
    assert not store.has(0)
    store.write(0, values, hashes)
    store.write_null(values[0])
    assert store.has(0)
    np.testing.assert_array_equal(store.null, values[0])
    for i in range(6):
        np.testing.assert_array_equal(store(i, f"caption {i}")["text"], values[i])
    with pytest.raises(UserError, match="belong to other captions"):
        store(1, "another")


def test_weights_are_fetched_once_and_checked(here, tmp_path, capsys, monkeypatch):
    here.upload("weights/model.bin", b"first" * 1000)
    here.upload("weights/sub/config.json", b"{}")
    folder = fetch.local("gs://bucket/weights")
    assert files(folder)["model.bin"] == b"first" * 1000
    assert (folder / "sub" / "config.json").read_text() == "{}"
    assert capsys.readouterr().err.count("as the bucket says") == 2
    assert fetch.local("gs://bucket/weights") == folder
    assert capsys.readouterr().err == ""
    here.upload("weights/model.bin", b"second")
    assert (fetch.local("gs://bucket/weights/model.bin")).read_bytes() == b"second"
    with pytest.raises(UserError, match="no such file"):
        fetch.local("gs://bucket/missing.bin")
    monkeypatch.setattr(storage, "md5", lambda info: b"0" * 16)
    here.upload("weights/model.bin", b"third")
    with pytest.raises(UserError, match="arrived damaged"):
        fetch.local("gs://bucket/weights/model.bin")
    monkeypatch.undo()


def test_what_fails_midway_leaves_the_object_as_it_was(here):
    with files_lib.whole("gs://bucket/file.txt") as part:
        part.write_text("before")

    def fail() -> None:
        with files_lib.whole("gs://bucket/file.txt") as part:
            part.write_text("after")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert here.files["file.txt"] == b"before"


def test_array_records_of_a_bucket(here, tmp_path):
    """As Grain and TFDS read them: by ArrayRecord's own reader."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for i in range(5):
        writer.write(b"record %d" % i)
    writer.close()
    here.upload("records/x.array_record", (tmp_path / "x.array_record").read_bytes())
    source = ArrayRecordDataSource(["gs://bucket/records/x.array_record"])
    assert [source[i] for i in range(5)] == [b"record %d" % i for i in range(5)]


def test_event_files_end_and_others_follow(here, monkeypatch):
    from deco_jax.run import event_files

    monkeypatch.setattr(event_files, "MAX_EVENT_BYTES", 100)
    monkeypatch.setattr(event_files.EventFile, "_open", [])
    file = event_files.EventFile("gs://bucket/events")
    for part in (b"a" * 60, b"b" * 60, b"c" * 10):
        file.write(part)
        event_files.EventFile.sync()
    assert here.files["events"] == b"a" * 60 + b"b" * 60
    assert here.files["events.0001"] == b"c" * 10


def test_a_process_that_ends_by_an_error_waits_for_no_log(here):
    """Python collects the log, here by its cycle, when the thread that speaks to the bucket has ended."""
    code = (
        "from deco_jax.run import event_files\n"
        "log = event_files.ObjectLog('gs://bucket/log')\n"
        "log.write('text')\n"
        "log.itself = log\n"
        "del log"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not here.has("log")


@pytest.mark.slow
def test_a_bucket_away_for_ten_seconds_delays_a_run(here, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(here, images, "images2")
    first = "runs/delayed/checkpoints/2/commit_success.txt"

    def interrupt() -> None:
        while not here.has(first):
            pass
        here.stop()
        time.sleep(10)
        here.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    succeed(*RUN, *FOUR_STEPS, f"--config.data.path={where}", "--workdir=gs://bucket/runs/delayed")
    thread.join()
    assert time.monotonic() - began > 10
    assert_same_run(download(here, "runs/delayed", tmp_path / "copy"), expected, 4)


@pytest.mark.slow
def test_a_bucket_gone_for_good_ends_a_run_with_one_line(here, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(here, images, "images3")
    first = "runs/ended/checkpoints/2/commit_success.txt"

    def interrupt() -> None:
        while not here.has(first):
            pass
        here.stop()

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", "--workdir=gs://bucket/runs/ended")
    try:
        result = run_main(*command, "--config.train.num_steps=2000", timeout=600)
    finally:
        thread.join()
        here.start()
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "resumed at step 2" in succeed(*command).stdout
    assert_same_run(download(here, "runs/ended", tmp_path / "copy"), expected, 4)
    assert os.listdir(tmp_path / "temporary") == []


def test_images_are_not_taken_for_damaged_when_the_bucket_refuses(here, tmp_path, monkeypatch):
    from gcsfs.retry import HttpError

    where = upload(here, make_images(tmp_path / "images"), "refused")
    source = sources.open_source(Data(source="image_folder", split="", image_size=16, num_workers=0, path=where))

    class Refusing:
        def cat_file(self, name, **_):
            raise HttpError({"code": 429, "message": "Too many requests"})

    monkeypatch.setattr(storage, "system", lambda name: Refusing())
    with pytest.raises(UserError, match=r"can't be read: the bucket did not answer as it should .*Too many requests"):
        source[0]


def test_one_run_at_a_time_in_a_bucket(here, monkeypatch):
    folder = storage.path("gs://bucket/locked")
    first, second = lock.RunLock(folder), lock.RunLock(folder)
    first.acquire()
    record = json.loads(here.files["locked/.lock"])
    assert record["process"] == os.getpid()
    monkeypatch.setattr(lock, "_held", {})  # as another process sees it
    monkeypatch.setattr(lock, "_read", lambda path: {})
    with pytest.raises(UserError, match="is in use by another process"):
        second.acquire()  # both found nothing; one was quicker
    monkeypatch.undo()


def test_a_bucket_lock_of_a_process_that_is_gone_is_taken_over(here, monkeypatch):
    folder = storage.path("gs://bucket/left")
    ours = {"machine": lock._machine(), "host": "here", "process": 2**22 + 1, "beat": 3, "time": time.time()}
    here.upload("left/.lock", json.dumps(ours).encode())
    held = lock.RunLock(folder)
    held.acquire()
    held.release()
    assert not here.has("left/.lock")
    monkeypatch.setattr(lock, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.3)
    here.upload("left/.lock", json.dumps({**ours, "machine": "another"}).encode())
    lock.RunLock(folder).acquire()  # after a silence
    monkeypatch.setattr(lock, "_held", {})
    monkeypatch.setattr(lock, "_machine", lambda: "a third")
    with pytest.raises(UserError, match="is in use by process"):
        lock.RunLock(folder).acquire()
    monkeypatch.undo()

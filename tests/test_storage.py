"""Runs, data and weights in a bucket are what they are on a disk."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import tarfile
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from deco_jax.data import features as features_lib
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.run import files as files_lib
from deco_jax.run import lock, storage
from deco_jax.run.checkpoint import Checkpoints
from tests.buckets import Bucket, needs_gcs
from tests.helpers import ROOT, run_main
from tests.runs import NO_SAMPLES, SMOKE, files, rows, signal_when, succeed

pytestmark = needs_gcs


@pytest.fixture(scope="module")
def bucket():
    made = Bucket()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def here(bucket: Bucket, monkeypatch, tmp_path):
    """This process uses the bucket, and keeps its copies and temporary files in folders of their own."""
    from etils.epath import backend

    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("DECO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage._filesystem.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield bucket
    storage._filesystem.cache_clear()


def make_images(folder: pathlib.Path, captions: bool = False) -> pathlib.Path:
    """Twelve pictures of noise, in three classes or with captions."""
    for i in range(12):
        path = folder / ("pairs" if captions else f"class {i % 3}") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"noise number {i}")
    return folder


def upload(bucket: Bucket, folder: pathlib.Path, name: str) -> str:
    for relative, data in files(folder).items():
        bucket.upload(f"{name}/{relative}", data)
    return f"gs://bucket/{name}"


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint."""
    import jax

    with ocp.StandardCheckpointer() as reader:
        found = {item: reader.restore(folder / item) for item in ("counters", "params", "ema", "optimizer")}
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def download(bucket: Bucket, prefix: str, folder: pathlib.Path) -> pathlib.Path:
    for name, data in bucket.files.items():
        if name.startswith(prefix + "/"):
            path = folder / name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


RUN = (SMOKE, "--config.data.source=image_folder", "--config.model.num_classes=3", "--config.data.batch_size=4")
FOUR_STEPS = ("--config.train.num_steps=4", "--config.train.save_every=2", "--config.train.log_every=1", NO_SAMPLES)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Images, and a run of four steps on them that nothing interrupts, on a disk."""
    folder = tmp_path_factory.mktemp("whole")
    images = make_images(folder / "images")
    succeed(*RUN, *FOUR_STEPS, f"--config.data.path={images}", f"--workdir={folder / 'run'}")
    return images, folder / "run"


def assert_same_run(bucket: Bucket, name: str, expected: pathlib.Path, folder: pathlib.Path) -> None:
    ours, theirs = rows(download(bucket, name, folder)), rows(expected)
    timed = ("images_per_second", "peak_memory_gib")
    for step in theirs:
        same = {key: value for key, value in theirs[step].items() if key not in timed}
        assert {key: ours[step][key] for key in same} == same
    assert ours.keys() == theirs.keys()
    here, there = arrays(folder / "checkpoints" / "4"), arrays(expected / "checkpoints" / "4")
    assert here.keys() == there.keys()
    for key in there:
        np.testing.assert_array_equal(here[key], there[key], err_msg=key)


def test_a_run_killed_and_resumed_in_a_bucket_is_the_one_on_a_disk(here, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(here, images, "images")
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", "--workdir=gs://bucket/runs/killed")
    committed = "runs/killed/checkpoints/2/commit_success.txt"
    slow = "--config.train.num_steps=400"  # it is killed on the way
    status, output = signal_when(signal.SIGKILL, lambda _: here.has(committed), *command, slow)
    assert status == -signal.SIGKILL, output
    assert any(json.loads(line)["step"] == 2 for line in here.files["runs/killed/metrics.jsonl"].splitlines())
    for name in [name for name in here.files if name.startswith("runs/killed/checkpoints/") and "/2/" not in name]:
        here._storage.delete_file("bucket", name)  # as if it had come no further
    result = succeed(*command)
    assert "resumed at step 2" in result.stdout
    assert_same_run(here, "runs/killed", expected, tmp_path / "copy")
    assert any("tensorboard/events" in name for name in here.files)

    resolved = json.loads(here.files["runs/killed/config.json"])
    assert resolved["data"]["path"] == where
    assert not (ROOT / "gs:").exists()


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


class Data(dict):
    """The data section of a config."""

    __getattr__ = dict.__getitem__


def same_samples(ours: sources.Source, theirs: sources.Source) -> None:
    assert len(ours) == len(theirs) > 0
    assert ours.class_names == theirs.class_names
    for i in range(len(theirs)):
        mine, other = ours[i], theirs[i]
        image = other["image"]
        assert mine["image"] == (image if isinstance(image, bytes) else pathlib.Path(image).read_bytes())
        assert {k: v for k, v in mine.items() if k != "image"} == {k: v for k, v in other.items() if k != "image"}
        assert ours.next_of_class(i) == theirs.next_of_class(i)


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
    with pytest.raises(UserError, match="of other captions"):
        store(1, "another")


def test_weights_are_fetched_once_and_checked(here, tmp_path, capsys, monkeypatch):
    here.upload("weights/model.bin", b"first" * 1000)
    here.upload("weights/sub/config.json", b"{}")
    folder = storage.local("gs://bucket/weights")
    assert files(folder)["model.bin"] == b"first" * 1000
    assert (folder / "sub" / "config.json").read_text() == "{}"
    assert capsys.readouterr().err.count("as the bucket says") == 2
    assert storage.local("gs://bucket/weights") == folder
    assert capsys.readouterr().err == ""
    here.upload("weights/model.bin", b"second")
    assert (storage.local("gs://bucket/weights/model.bin")).read_bytes() == b"second"
    with pytest.raises(UserError, match="no such file"):
        storage.local("gs://bucket/missing.bin")
    monkeypatch.setattr(storage, "_md5", lambda info: b"0" * 16)
    here.upload("weights/model.bin", b"third")
    with pytest.raises(UserError, match="arrived damaged"):
        storage.local("gs://bucket/weights/model.bin")
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
    assert_same_run(here, "runs/delayed", expected, tmp_path / "copy")


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
    assert_same_run(here, "runs/ended", expected, tmp_path / "copy")
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


def test_checkpoints_need_a_disk_or_gs(here, tmp_path):
    with pytest.raises(UserError, match=r"s3://bucket/run/checkpoints.* only to disks and gs://"):
        Checkpoints("s3://bucket/run", 1)

"""Runs, data and weights in s3:// are what they are on a disk."""

from __future__ import annotations

import json
import os
import tarfile
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import quickstart
from deco_jax.data import features as features_lib
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.evaluation.statistics import Accumulator
from deco_jax.models import network
from deco_jax.run import checksums, fetch, lock, orbax_s3, sharding, storage
from deco_jax.run.checkpoint import complete_steps, find, load_average
from tests.bucket_runs import FOUR_STEPS, RUN, Data, assert_nothing_left_here, killed_and_resumed, same_samples
from tests.buckets import download, make_images, needs_s3, upload
from tests.helpers import run_main
from tests.runs import assert_same_run, files, random_checkpoint

pytestmark = needs_s3


def test_checkpoints_go_to_s3_and_come_back(s3, tmp_path):
    """Those of a step that is not complete, as after a kill, are no checkpoints and are removed."""
    config = quickstart.get_config("smoke")
    local = find(str(random_checkpoint(tmp_path / "run", config)))
    s3.upload("run/checkpoints/7/params/d/0a1b", b"half")
    random_checkpoint(storage.path("s3://bucket/run"), config)
    assert complete_steps("s3://bucket/run") == [1]
    assert s3.names("run/checkpoints/7/") == []
    remote = find("s3://bucket/run")
    mesh, shapes = sharding.make_mesh(1, 1, jax.devices()[:1]), network.build(config.model.to_dict()).shapes
    ours, theirs = (load_average(path, shapes, config, mesh) for path in (remote, local))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # An object that was changed behind the service's back is noticed.
    name = max(s3.names("run/checkpoints/1/ema/"), key=lambda name: len(s3.files[name]))
    s3.upload(name, s3.files[name][::-1])
    with pytest.raises(UserError, match="isn't what was written: its checksum differs"):
        load_average(remote, shapes, config, mesh)


@pytest.mark.slow
def test_a_run_killed_and_resumed_in_s3_is_the_one_on_a_disk(s3, whole_run, tmp_path):
    images, expected = whole_run
    where = upload(s3, images, "images")
    command = (*RUN, *FOUR_STEPS, f"--config.data.path={where}", "--workdir=s3://bucket/runs/killed")
    killed_and_resumed(s3, "runs/killed", *command)
    copy = download(s3, "runs/killed", tmp_path / "copy")
    assert_same_run(copy, expected, 4)
    assert json.loads((copy / "checkpoints" / "4" / "checksums.json").read_text())["service"]
    for path in (copy / "checkpoints" / "4", storage.path("s3://bucket/runs/killed/checkpoints/4")):
        checksums.check(path)
    assert any((copy / "tensorboard").iterdir())
    assert_nothing_left_here(tmp_path)


def test_a_bucket_of_s3_that_is_not_there_is_one_line(s3, tmp_path):
    images = make_images(tmp_path / "images")
    result = run_main(*RUN, *FOUR_STEPS, f"--config.data.path={images}", "--workdir=s3://other/run")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error")] == [
        "error: s3://other/run can't be written: there is no such bucket; create it, or check the name"
    ]


def test_another_orbax_is_one_line(monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    orbax_s3.enable.cache_clear()
    monkeypatch.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(
        UserError, match=rf"Orbax {ocp.__version__}, which isn't built like 0\.12 .*; .* mount the bucket"
    ):
        orbax_s3.enable()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, {}),
        ({"AWS_REGION": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"AWS_ENDPOINT_URL": "http://a:1"}, {"endpoint": "http://a:1", "aws_region": "us-east-1"}),
        (
            {"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:1", "AWS_REGION": "auto"},
            {"endpoint": "http://b:1", "aws_region": "auto"},
        ),
        ({"AWS_ACCESS_KEY_ID": "k"}, {"aws_credentials": {"type": "environment"}}),
    ],
)
def test_where_checkpoints_go_is_what_the_environment_says(environment, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"driver": "s3", "bucket": "bucket", "path": "runs/xl/"}
    assert orbax_s3.driver("s3://bucket/runs/xl/") == {**given, **expected}


@pytest.mark.parametrize("source", ["image_folder", "captioned_folder"])
def test_folders_of_s3(s3, tmp_path, source):
    folder = make_images(tmp_path / "images", captions=source == "captioned_folder")
    where = upload(s3, folder, source)
    settings = {"source": source, "split": "", "image_size": 16, "num_workers": 0}
    ours = sources.open_source(Data(settings, path=where))
    same_samples(ours, sources.open_source(Data(settings, path=str(folder))))
    assert ours.name(0).startswith(where)


def test_tars_of_s3_are_read_by_range_and_indexed_once(s3, tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images", captions=True)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.add(path, path.name)
    where = upload(s3, tmp_path / "tars", "tars")
    settings = {"source": "webdataset", "split": "", "image_size": 16, "num_workers": 0}
    ours = sources.open_source(Data(settings, path=where))
    same_samples(ours, sources.open_source(Data(settings, path=str(tmp_path / "tars"))))
    assert "tars/.webdataset.index.npz" in s3.files
    opened: list[str] = []
    monkeypatch.setattr(storage, "open_blocks", opened.append)
    sources.open_source(Data(settings, path=where))
    assert opened == []


def test_parquet_of_s3(s3, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from tests.test_parquet import settings, write

    where = upload(s3, write(tmp_path / "parquet"), "parquet")
    for more in ({"split": "train"}, {"split": "train", "caption_column": "text"}):
        same_samples(
            sources.open_source(settings(where, **more)), sources.open_source(settings(tmp_path / "parquet", **more))
        )


@pytest.mark.parametrize("source", ["tfds", "prepared"])
def test_array_records_of_s3_are_refused(s3, source):
    with pytest.raises(UserError, match=r"ArrayRecord's reader opens disks and gs:// only; mount the bucket"):
        sources.open_source(Data(source=source, split="", path="s3://bucket/records"))


def test_stored_text_features_of_s3(s3):
    key = {"captions": 6, "length": 4, "width": 8, "prefix": "", "encoder": "e"}
    values = np.random.default_rng(0).integers(0, 2**16, (6, 4, 8)).astype(np.uint16)
    features_lib.create("s3://bucket/features", key)
    store = features_lib.Features("s3://bucket/features", key)
    store.write(0, values, np.asarray([features_lib.caption_hash(f"caption {i}") for i in range(6)]))
    store.write_null(values[0])
    np.testing.assert_array_equal(store.null, values[0])
    for i in range(6):
        np.testing.assert_array_equal(store(i, f"caption {i}")["text"], values[i])


def test_caches_of_evaluations_in_s3(s3):
    kept = Accumulator(fingerprint="of these images")
    kept.moments.add(np.random.default_rng(0).normal(size=(5, 2048)).astype(np.float32))
    kept.save("s3://bucket/cache/reference.npz")
    read = Accumulator.load("s3://bucket/cache/reference.npz")
    assert (read.count, read.fingerprint) == (5, "of these images")
    np.testing.assert_array_equal(read.moments.mean(), kept.moments.mean())


def test_weights_of_s3_are_fetched_once_and_checked(s3, capsys):
    s3.upload("weights/model.bin", b"first" * 1000)
    s3.upload("weights/sub/config.json", b"{}")
    folder = fetch.local("s3://bucket/weights")
    assert files(folder)["model.bin"] == b"first" * 1000
    assert (folder / "sub" / "config.json").read_text() == "{}"
    assert capsys.readouterr().err.count("as the bucket says") == 2
    assert fetch.local("s3://bucket/weights") == folder
    assert capsys.readouterr().err == ""
    s3.upload("weights/model.bin", b"second")
    assert fetch.local("s3://bucket/weights/model.bin").read_bytes() == b"second"
    with pytest.raises(UserError, match="no such file"):
        fetch.local("s3://bucket/missing.bin")


def test_an_etag_under_a_key_of_kms_is_no_md5(s3, monkeypatch, capsys):
    """moto's is one even then, so here it is another."""
    s3.upload("plain/a.bin", b"a" * 100)
    s3.upload("secret/a.bin", b"a" * 100, ServerSideEncryption="aws:kms")
    assert [storage.has_kms_key(f"s3://bucket/{name}/a.bin") for name in ("plain", "secret")] == [False, True]
    assert not storage.has_kms_key("gs://bucket/a.bin")
    monkeypatch.setattr(storage, "md5", lambda info: b"0" * 16)
    with pytest.raises(UserError, match="arrived damaged"):
        fetch.local("s3://bucket/plain/a.bin")
    assert fetch.local("s3://bucket/secret/a.bin").read_bytes() == b"a" * 100
    assert "which the bucket does not give" in capsys.readouterr().err
    assert checksums._listed("s3://bucket/plain") == {"a.bin": [100, {"md5": (b"0" * 16).hex()}]}
    assert checksums._listed("s3://bucket/secret") == {"a.bin": [100, {}]}


def record(beat: int = 0, **changes) -> bytes:
    """A lock of this machine and container, by a process that exists."""
    values = {"host": "here", "process": os.getppid(), "machine": lock._machine(), "beat": beat, "time": time.time()}
    return json.dumps({**values, "processes": lock._process_namespace(), **changes}).encode()


def test_a_lock_in_s3_counts_while_it_beats(s3, monkeypatch):
    """Containers of a machine number their processes on their own, and a number is given to others in time."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.5)
    folder, done = storage.path("s3://bucket/other"), threading.Event()

    def beat() -> None:
        for number in range(1, 1000):
            if done.wait(0.2):
                return
            s3.upload("other/.lock", record(number, process=os.getpid(), processes="pid:[another container]"))

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.5)
    with pytest.raises(UserError, match="is in use by process"):
        lock.RunLock(folder).acquire()
    done.set()
    thread.join()
    for name, left in {"silent": record(), "gone": record(process=2**22 + 1)}.items():
        s3.upload(f"{name}/.lock", left)
        began, ours = time.monotonic(), lock.RunLock(storage.path(f"s3://bucket/{name}"))
        ours.acquire()
        assert (time.monotonic() - began > 1) == (name == "silent")
        ours.release()


def test_one_run_at_a_time_in_s3(s3, monkeypatch):
    folder = storage.path("s3://bucket/locked")
    lock.RunLock(folder).acquire()
    assert json.loads(s3.files["locked/.lock"])["process"] == os.getpid()
    monkeypatch.setattr(lock, "_held", {})  # as another process sees it
    monkeypatch.setattr(lock, "_read", lambda path: {})
    with pytest.raises(UserError, match="is in use by another process"):
        lock.RunLock(folder).acquire()  # both found nothing; one was quicker

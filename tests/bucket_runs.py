"""Runs and data of which one is on a disk and one in a bucket, of Google or of Amazon."""

from __future__ import annotations

import json
import os
import pathlib
import signal

from deco_jax.data import sources
from tests.buckets import AnyBucket, make_images
from tests.helpers import ROOT
from tests.runs import NO_SAMPLES, SMOKE, signal_when, succeed

RUN = (SMOKE, "--config.data.source=image_folder", "--config.model.num_classes=3", "--config.data.batch_size=4")
FOUR_STEPS = ("--config.train.num_steps=4", "--config.train.save_every=2", "--config.train.log_every=1", NO_SAMPLES)


def finished_run(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Images, and a run of four steps on them that nothing interrupts, on a disk."""
    images = make_images(folder / "images")
    succeed(*RUN, *FOUR_STEPS, f"--config.data.path={images}", f"--workdir={folder / 'run'}")
    return images, folder / "run"


def killed_and_resumed(bucket: AnyBucket, name: str, *command: str) -> None:
    """Run a command of FOUR_STEPS whose workdir is `name` in a bucket: it is killed twice, and goes on from step 2."""
    checkpoint, slow = f"{name}/checkpoints/2/", "--config.train.num_steps=400"  # it is killed on the way
    # Once in the middle of its first save, and once after it.
    for due in (
        lambda _: bucket.names(checkpoint + "params/"),
        lambda _: bucket.has(checkpoint + "commit_success.txt"),
    ):
        status, output = signal_when(signal.SIGKILL, due, *command, slow)
        assert status == -signal.SIGKILL, output
        assert "resumed" not in output
    assert any(json.loads(line)["step"] == 2 for line in bucket.files[f"{name}/metrics.jsonl"].splitlines())
    for later in bucket.names(f"{name}/checkpoints/"):
        if "/2/" not in later:
            bucket.remove(later)  # as if it had come no further
    assert "resumed at step 2" in succeed(*command).stdout


def assert_nothing_left_here(folder: pathlib.Path) -> None:
    """Neither in the repository nor among the temporary files of the fixtures in `folder`."""
    assert not any((ROOT / name).exists() for name in ("gs:", "s3:"))
    assert [name for name in os.listdir(folder / "temporary") if "deco_jax" in name] == []


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

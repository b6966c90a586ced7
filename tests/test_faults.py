"""A run that is killed again and again ends where an undisturbed one does, on a disk and in a bucket."""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from deco_jax.run.distributed import RESTART
from tests.bucket_runs import assert_nothing_left_here
from tests.buckets import Bucket, download, needs_gcs
from tests.helpers import ROOT
from tests.runs import SMOKE, rows, succeed

KILLS, TERMS = 30, 5
STEPS = 500
RUN = (
    SMOKE,
    f"--config.train.num_steps={STEPS}",
    "--config.train.sample_every=0",
    "--config.train.save_every=5",
    "--config.train.log_every=1",
)
LAST = "--config.train.save_every=100"


class Disk:
    """A workdir on this machine."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.workdir, self.said = str(folder / "killed"), folder / "said.txt"

    def checkpoints(self) -> list[str]:
        """Names of files in the workdir's folder of checkpoints."""
        folder = pathlib.Path(self.workdir) / "checkpoints"
        return [entry.name + "/" for entry in folder.iterdir()] if folder.is_dir() else []

    def complete(self) -> set[int]:
        """Steps that have a complete checkpoint: Orbax gives it its number when it is."""
        return {int(name[:-1]) for name in self.checkpoints() if name[:-1].isdigit()}

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(not name[:-1].isdigit() for name in self.checkpoints())

    def rows(self) -> dict[int, dict]:
        return rows(pathlib.Path(self.workdir))


class InBucket(Disk):
    """A workdir in a bucket."""

    def __init__(self, folder: pathlib.Path, bucket: Bucket) -> None:
        super().__init__(folder)
        self._bucket, self._copy, self.workdir = bucket, folder / "copy", f"{bucket.url}/killed"

    def checkpoints(self) -> list[str]:
        return [name.removeprefix("killed/checkpoints/") for name in self._bucket.names("killed/checkpoints/")]

    def complete(self) -> set[int]:
        names = {name.partition("/")[::2] for name in self.checkpoints()}
        return {int(step) for step, rest in names if rest == "commit_success.txt"}

    def saving(self) -> bool:
        names = [name.partition("/")[0] for name in self.checkpoints()]
        return bool({int(name) for name in names if name.isdigit()} - self.complete())

    def rows(self) -> dict[int, dict]:
        return rows(download(self._bucket, "killed", self._copy))


def start(place: Disk, *more: str) -> subprocess.Popen:
    with place.said.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deco_jax.main", *RUN, *more, f"--workdir={place.workdir}"],
            cwd=ROOT,
            env=os.environ.copy(),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )


def steps_said(place: Disk) -> list[int]:
    """The steps that the last process has logged."""
    return [int(step) for step in re.findall(r"^step (\d+)/", place.said.read_text(), re.MULTILINE)]


def wait(process: subprocess.Popen, condition, seconds: float) -> None:
    """Until the condition, the process's end or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", pytest.param("bucket", marks=needs_gcs)])
def test_kills_at_random_moments_change_nothing(where, tmp_path, request):
    expected_folder = tmp_path / "undisturbed"
    place = Disk(tmp_path) if where == "disk" else InBucket(tmp_path, request.getfixturevalue("here"))
    succeed(*RUN, LAST, f"--workdir={expected_folder}", timeout=900)

    chance, counts, lost = random.Random(0), Counter(), []
    # The moment of each fault; the signals that ask to stop are spread among the kills.
    moments = ["starting"] * 5 + ["training"] * 10 + ["saving"] * (KILLS - 15) + ["asked"] * TERMS
    chance.shuffle(moments)
    for number, moment in enumerate(moments):
        print(f"fault {number + 1} of {len(moments)}, {moment}, complete are {sorted(place.complete())}", flush=True)
        process = start(place)
        try:
            if moment == "starting":
                wait(process, lambda: False, chance.uniform(0, 4))
            else:
                wait(process, lambda: bool(steps_said(place)), 120)
                wait(process, lambda: False, chance.uniform(0, 0.3))
            if moment == "saving":
                wait(process, place.saving, 10)
                wait(process, lambda: False, chance.uniform(0, 0.02))
            assert process.poll() is None, f"ended by itself before it was to be killed: {process.stderr.read()}"
            process.send_signal(signal.SIGTERM if moment == "asked" else signal.SIGKILL)
            code = process.wait(timeout=120)
            errors = process.stderr.read()
        finally:
            process.kill()
            process.stderr.close()
        if moment == "asked":
            assert code == RESTART, errors
        else:
            assert code == -signal.SIGKILL, errors
        counts[moment] += 1
        counts["mid-save"] += moment != "asked" and place.saving()
        if done := steps_said(place):
            lost.append(done[-1] - max(place.complete(), default=0))

    finished = start(place, LAST)  # nothing kills this one, and a save may take seconds
    try:
        _, errors = finished.communicate(timeout=900)
    finally:
        finished.kill()
    assert finished.returncode == 0, errors

    with_capture = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"faults: {with_capture}; most steps lost at once: {max(lost)}")
    assert counts["starting"] + counts["training"] + counts["saving"] >= KILLS
    assert counts["asked"] == TERMS
    assert counts["mid-save"] >= 5
    # A save starts every 5 steps and is complete before the next one starts.
    assert max(lost) <= 10
    expected, actual = rows(expected_folder), place.rows()
    assert list(actual) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        for name in ("loss", "pixel", "frequency", "gradient_norm"):
            assert actual[step][name] == row[name], f"step {step}: {name}"
    if where == "bucket":
        assert_nothing_left_here(tmp_path)

"""A run that is killed again and again ends where an undisturbed one does."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

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


def said(workdir: pathlib.Path) -> pathlib.Path:
    """What the last process printed."""
    return workdir.with_name(f"{workdir.name}.txt")


def start(workdir: pathlib.Path) -> subprocess.Popen:
    with said(workdir).open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deco_jax.main", *RUN, f"--workdir={workdir}"],
            cwd=ROOT,
            env=os.environ.copy(),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )


def saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written: Orbax gives it its number when it is complete."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(not entry.name.isdigit() for entry in folder.iterdir())


def trained(workdir: pathlib.Path) -> bool:
    """Whether the process that runs has logged a step."""
    return "\nstep " in said(workdir).read_text()


def wait(process: subprocess.Popen, condition, seconds: float) -> None:
    """Until the condition, the process's end or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    expected_folder, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    succeed(*RUN, "--config.train.save_every=100", f"--workdir={expected_folder}", timeout=400)

    chance, counts, lost = random.Random(0), Counter(), []
    # The moment of each fault; the signals that ask to stop are spread among the kills.
    moments = ["starting"] * 5 + ["training"] * 10 + ["saving"] * (KILLS - 15) + ["asked"] * TERMS
    chance.shuffle(moments)
    metrics = workdir / "metrics.jsonl"
    for moment in moments:
        process = start(workdir)
        try:
            if moment == "starting":
                wait(process, lambda: False, chance.uniform(0, 4))
            else:
                wait(process, lambda: trained(workdir), 120)
                wait(process, lambda: False, chance.uniform(0, 0.3))
            if moment == "saving":
                wait(process, lambda: saving(workdir), 10)
                wait(process, lambda: False, chance.uniform(0, 0.02))
            assert process.poll() is None, f"ended by itself before it was to be killed: {process.stderr.read()}"
            process.send_signal(signal.SIGTERM if moment == "asked" else signal.SIGKILL)
            code = process.wait(timeout=120)
            errors = process.stderr.read()
        finally:
            process.kill()
            process.stderr.close()
        if moment == "asked":
            assert code == 0, errors
        else:
            assert code == -signal.SIGKILL, errors
        counts[moment] += 1
        counts["mid-save"] += moment != "asked" and saving(workdir)
        if (workdir / "checkpoints").is_dir() and metrics.exists():
            saved = [int(e.name) for e in (workdir / "checkpoints").iterdir() if e.name.isdigit()]
            lines = metrics.read_text().count("\n")
            lost.append(lines - max(saved, default=0))

    finished = start(workdir)
    try:
        _, errors = finished.communicate(timeout=400)
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
    expected, actual = rows(expected_folder), rows(workdir)
    assert list(actual) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        for name in ("loss", "pixel", "frequency", "gradient_norm"):
            assert actual[step][name] == row[name], f"step {step}: {name}"

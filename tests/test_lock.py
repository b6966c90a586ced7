"""run/lock.py and two real processes in one workdir."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from deco_jax.errors import UserError
from deco_jax.run import lock
from tests.helpers import ROOT, run_main
from tests.runs import NO_SAMPLES, SMOKE, files, rows

HOLD = """
import pathlib, sys, time
from deco_jax.run.lock import RunLock
held = RunLock(pathlib.Path(sys.argv[1]))
held.acquire()
print("held", flush=True)
time.sleep(100)
"""


def hold(folder: pathlib.Path) -> subprocess.Popen:
    """A process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ.copy()
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_another_process_is_named_and_a_killed_one_needs_no_hand(tmp_path):
    with hold(tmp_path) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on \S+; wait"):
            lock.RunLock(tmp_path).acquire()
        process.kill()
    began = time.monotonic()
    ours = lock.RunLock(tmp_path)
    ours.acquire()
    assert time.monotonic() - began < 1
    again = lock.RunLock(tmp_path)  # the same process
    again.acquire()
    again.release()
    assert (tmp_path / lock.FILE).exists()
    ours.release()
    assert list(tmp_path.iterdir()) == []
    ours.release()


def from_elsewhere(folder: pathlib.Path, beat: int, **changes) -> None:
    record = {"host": "elsewhere", "process": 7, "machine": "another", "beat": beat, "time": time.time(), **changes}
    (folder / lock.FILE).write_text(json.dumps(record))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.5)


@pytest.mark.parametrize("without_flock", [False, True])
def test_a_holder_on_another_machine(tmp_path, quick, monkeypatch, without_flock):
    """Its beats are seen where flock doesn't reach, or doesn't exist."""
    if without_flock:

        def unsupported(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    from_elsewhere(tmp_path, 0)
    beating = threading.Event()

    def beat():
        for number in range(1, 1000):
            if beating.wait(0.05):
                return
            from_elsewhere(tmp_path, number)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
        lock.RunLock(tmp_path).acquire()
    beating.set()
    thread.join()
    ours = lock.RunLock(tmp_path)  # now it is silent
    ours.acquire()
    first = json.loads((tmp_path / lock.FILE).read_text())
    assert first["process"] == os.getpid()
    time.sleep(0.3)
    assert json.loads((tmp_path / lock.FILE).read_text())["beat"] > first["beat"]
    ours.release()


def test_a_holder_of_long_ago_is_not_waited_for(tmp_path):
    from_elsewhere(tmp_path, 0, time=time.time() - 3600)
    ours = lock.RunLock(tmp_path)
    began = time.monotonic()
    ours.acquire()
    ours.release()
    assert time.monotonic() - began < 1


def test_a_second_run_in_the_same_workdir_disturbs_nothing(tmp_path):
    """Started while the first trains: one line with its host and number, and the first one's losses are unchanged."""
    run = (SMOKE, NO_SAMPLES, "--config.train.log_every=1", "--config.train.save_every=4")
    workdir, alone = tmp_path / "two", tmp_path / "alone"
    command = [*run, "--config.train.num_steps=40"]
    with subprocess.Popen(
        [sys.executable, "-m", "deco_jax.main", *command, f"--workdir={workdir}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as first:
        end = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
            assert first.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        # In the middle of its work, wherever that is when the second one comes to look.
        first.send_signal(signal.SIGSTOP)
        second = run_main(*command, f"--workdir={workdir}")
        first.send_signal(signal.SIGCONT)
        output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"is in use by process {first.pid} on " in second.stderr
    assert not any(name.endswith(lock.FILE) for name in files(workdir))
    assert run_main(*command, f"--workdir={alone}").returncode == 0
    for step, row in rows(alone).items():
        assert rows(workdir)[step]["loss"] == row["loss"], step

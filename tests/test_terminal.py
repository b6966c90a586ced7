"""What is seen on a terminal of 80 columns, and what Ctrl-C gets at once while native code runs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from deco_jax.run import progress as progress_lib
from deco_jax.run.progress import Progress
from tests.helpers import ROOT
from tests.runs import NO_SAMPLES, SMOKE, signal_when, two_steps

LEFT = r"\d+m\d\ds left"


def on_terminal(*command: object, columns: int = 80) -> list[str]:
    """Run Python on a pseudo-terminal; what stood on it line by line, overwritten lines too."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said = b""
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE) as run:
        os.close(theirs)
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:  # the other end is closed
            pass
        errors = run.stderr.read().decode()
    os.close(ours)
    assert run.returncode == 0, errors
    return [line for line in re.split(r"\r\n|\r\x1b\[K", said.decode()) if line]


@pytest.mark.slow
def test_training(tmp_path):
    lines = on_terminal("-m", "deco_jax.main", SMOKE, NO_SAMPLES, f"--workdir={tmp_path}")
    live = [line for line in lines if line.startswith("step ")]
    assert len(live) == 4
    for number, line in enumerate(live, start=1):
        assert re.match(rf"step {number}/4  {LEFT}  \w+ \d", line)
        assert len(line) <= 79


@pytest.mark.slow
def test_sampling(tmp_path):
    run = two_steps(tmp_path)
    few = ("--config.sample.num_images=8", "--config.sample.batch_size=2")
    lines = on_terminal("-m", "deco_jax.main", f"--workdir={run}", "--mode=sample", *few)
    live = [line for line in lines if "of 8 images drawn" in line]
    assert re.fullmatch(r"2 of 8 images drawn \(compiled and drawn in \d+\.\d s\)", live[0])
    for count, line in zip((4, 6, 8), live[1:], strict=True):
        assert re.fullmatch(rf"{count} of 8 images drawn, {LEFT}, \S+ per second", line)


@pytest.mark.slow
def test_evaluating():
    """With the bookkeeping's stand-in for the Inception network, and a name that is longer than the line."""
    program = """
import numpy as np
from deco_jax.evaluation import image_sets, inception_features
from tests.test_evaluate import Projection, pictures
images = image_sets.drawn_images(lambda first: iter([pictures(12)[first:]]), 12, (16, 16), "drawn from " + 90 * "x")
inception_features.measure(images, Projection(), None, "digest", 0, 4)
"""
    lines = on_terminal("-c", program)
    assert re.match(r"4 of 12 images measured \(compiled and measured in \d+\.\d s\), drawn from xxx", lines[0])
    for count, line in zip((8, 12), lines[1:], strict=True):
        assert re.match(rf"{count} of 12 images measured, {LEFT}, \S+ per second, drawn from xxx", line)
    assert max(map(len, lines)) == 79


def test_compiling_is_not_in_the_rate(monkeypatch, capsys):
    """100 s for the first ten, which were compiled; then 2 a second, of 40 that are left 20 s."""
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    progress = Progress(70, 10, "images drawn", every=5.0)
    for seconds, done in ((100, 20), (5, 30), (1, 32), (9, 50), (10, 70)):
        now[0] += seconds
        progress(done)
    assert capsys.readouterr().out.splitlines() == [
        "20 of 70 images drawn (compiled and drawn in 100.0 s)",
        "30 of 70 images drawn, 0m20s left, 2 per second",
        "50 of 70 images drawn, 0m10s left, 2 per second",
        "70 of 70 images drawn, 0m00s left, 2 per second",
    ]


# Native code that takes longer than the test and asks for no signals, as a compiler does.
NATIVE = """
import hashlib
from deco_jax import interrupts
interrupts.raise_always()
with interrupts.waits_for("the compiler"):
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**29)
"""


def test_ctrl_c_is_answered_while_native_code_runs_and_twice_ends_it():
    run = subprocess.Popen(
        [sys.executable, "-c", NATIVE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with run:
        try:
            assert run.stdout.readline() == "here\n"
            time.sleep(0.2)
            run.send_signal(signal.SIGINT)
            assert run.stderr.readline() == "interrupted: waiting for the compiler; Ctrl-C again ends at once\n"
            assert run.poll() is None
            run.send_signal(signal.SIGINT)
            assert run.wait(timeout=20) == 130
            assert run.stderr.read() == "interrupted; the same command continues from what is saved\n"
        finally:
            run.kill()


@pytest.mark.slow
def test_ctrl_c_while_the_step_is_compiled(tmp_path):
    """A word at once; then the step, the save and the end."""
    command = (SMOKE, NO_SAMPLES, "--config.train.num_steps=1000", "--config.model.depth=3", f"--workdir={tmp_path}")
    code, said = signal_when(signal.SIGINT, lambda said: "compiling the training step" in said, *command)
    assert code == 130
    waiting, saved = "interrupted: waiting for the compiler; Ctrl-C again ends at once", "interrupted: saved step 1"
    assert 0 < said.index(waiting) < said.index("compiled in") < said.index(saved)

"""Ctrl-C in the first seconds, and a device that is full: one line each."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from deco_jax import interrupts
from tests.helpers import ROOT
from tests.runs import SMOKE, signal_when


@pytest.mark.parametrize("seconds", [1.0, 2.0, 4.0])
def test_one_line_whenever_it_comes(tmp_path, seconds):
    command = [sys.executable, "-m", "deco_jax.main", SMOKE, f"--workdir={tmp_path}", "--config.train.num_steps=100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    assert "Traceback" not in errors
    assert "ignored" not in errors
    assert process.returncode == 130, errors
    assert errors.count("interrupted; the same command continues") <= 1


def test_the_status_is_130_also_where_it_struck_code_from_a_string(tmp_path):
    (tmp_path / "struck.py").write_text("""
from deco_jax import interrupts
try:
    exec("raise KeyboardInterrupt")  # as in the making of a dataclass
except KeyboardInterrupt:
    interrupts.end()
""")
    search = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", "struck"], env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (130, f"{interrupts.LINE}\n")


def test_an_interrupt_that_a_callback_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGINT)

    def callback(phase, info):
        gc.callbacks.remove(callback)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

    def collect_and_wait():
        gc.collect()
        time.sleep(5)

    try:
        interrupts.raise_always()
        gc.callbacks.append(callback)
        with pytest.raises(KeyboardInterrupt):
            collect_and_wait()
    finally:
        signal.signal(signal.SIGINT, before)


def test_out_of_memory_is_one_line_with_remedies(tmp_path):
    program = f"""
import sys
from deco_jax import main
from deco_jax.programs import train
def full(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes")
train.train = full
sys.argv = ["main", "{SMOKE}", "--workdir={tmp_path}"]
main.cli()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\\n") <= 1
    assert "a device is out of memory; raise --config.optimizer.accumulate_steps" in done.stderr


# ---------------------------------------------------------------------------------------- a command that is run

SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)  # longer than subprocess.run waits
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("runs", flush=True)
time.sleep(60)
"""
RUNS = "import sys; from deco_jax import interrupts; sys.exit(interrupts.run(sys.argv[1:], '.'))"


@pytest.mark.parametrize("number, to_both", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_command_that_is_asked_to_stop_may_save(number, to_both, tmp_path):
    """A terminal's Ctrl-C goes to both processes, a scheduler's SIGTERM perhaps only to the first."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNS, sys.executable, "-c", SAVES, str(tmp_path / "saved")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "runs\n"
        (os.killpg if to_both else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == "interrupted; the same command continues from what is saved\n"
    assert (tmp_path / "saved").exists()
    assert interrupts.run([sys.executable, "-c", "raise SystemExit(3)"], ROOT) == 3


def test_a_compilation_that_goes_on_in_jaxs_threads_is_left_alone(tmp_path, monkeypatch):
    """The first ones are those of the state's arrays, during which nothing asks to wait."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    run = (SMOKE, f"--workdir={tmp_path}")
    for seconds in (0.0, 0.3, 0.6):
        began = []

        def due(_, began=began, seconds=seconds):
            if not began and (tmp_path / ".lock").exists():  # it is compiled from then on
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] >= seconds

        code, said = signal_when(signal.SIGINT, due, *run)
        assert (code, "Fatal" in said) == (130, False), said

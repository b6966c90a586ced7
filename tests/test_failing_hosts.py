"""Hosts that hang or die: what they say, with which status they end, and that the run goes on as before."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, fake_devices
from tests.runs import NO_SAMPLES, SMOKE, rows, signal_when, succeed

VALUES = ("loss", "pixel", "frequency", "gradient_norm")


def the_same(expected: dict[int, dict], actual: dict[int, dict]) -> None:
    assert list(actual) == list(expected)
    for step, row in expected.items():
        assert [actual[step][name] for name in VALUES] == [row[name] for name in VALUES], step


# ---------------------------------------------------------------------------------------- a step that hangs

HANGING = """
from deco_jax.data import pipeline
read = pipeline.Batches.__next__
count = 0
def stuck(self):
    global count
    count += 1
    if count == 4:
        time.sleep(600)
    return read(self)
pipeline.Batches.__next__ = stuck
"""


def run_changed(change: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run the program after `change` has replaced parts of it."""
    script = f"import sys, time\nfrom deco_jax import main\n{change}\nsys.argv[0] = 'main'\nmain.cli()\n"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_hung_step_names_the_host_and_leaves_its_stacks(tmp_path):
    done = run_changed(HANGING, SMOKE, f"--workdir={tmp_path}", NO_SAMPLES, "--config.train.step_timeout=3")
    assert done.returncode == 75, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "host 0 of 1" in line
    assert "step 4 has not ended after 3 s (config.train.step_timeout), it waits for this host" in line
    (stacks,) = (tmp_path / "stacks").iterdir()
    assert stacks.name == "step_00000004_host_0000.txt"
    text = stacks.read_text()
    assert re.match(r"host 0 of 1, \S+, process \d+: step 4 waits for this host", text)
    assert "in stuck" in text  # where it hangs
    assert "in _wait" in text  # and the other threads


DEVICES = """
import pathlib, sys, threading, time
from deco_jax.run.goodput import StepClock
from deco_jax.run.watchdog import Watchdog
class Never:
    def block_until_ready(self):
        threading.Event().wait()
clock = StepClock(time.monotonic())
with Watchdog(pathlib.Path(sys.argv[1]), 1.0, clock) as watchdog:
    with watchdog.resting():
        time.sleep(2.5)  # an evaluation
    print("rested", flush=True)
    clock.handed_over(7, Never())
    while True:
        watchdog.handed_over(7)  # the host goes on
        time.sleep(0.01)
"""


ENDING = """
from deco_jax.method import objective
from deco_jax.programs import train
lower = train.lower_train_step
count = 0
def slowly(*arguments):
    global count
    count += 1
    if count == 2:
        time.sleep(6)
    return lower(*arguments)
train.lower_train_step = slowly
objective.Method.ends = (2,)
"""


@pytest.mark.slow
def test_compiling_again_where_a_loss_ends_is_no_hung_step(tmp_path):
    done = run_changed(ENDING, SMOKE, f"--workdir={tmp_path}", NO_SAMPLES, "--config.train.step_timeout=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiling the training step") == 2


def test_a_step_that_hangs_on_the_devices(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):  # the second can't be written
        done = subprocess.run(
            [sys.executable, "-c", DEVICES, folder], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 75, done.stderr
        assert done.stdout == "rested\n"
        assert "step 7 has not ended after 1 s" in done.stderr
        assert "it waits for its devices" in done.stderr
        place = re.search(r"(\S+) has the stacks of all threads;", done.stderr)[1]
        assert "Thread 0x" in pathlib.Path(place).read_text()


# ---------------------------------------------------------------------------------------- copies on the hosts' disks

COPIES = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from configs import quickstart
from deco_jax.run import sharding
from deco_jax.run.local_copies import LocalCopies
folder = pathlib.Path(sys.argv[1])
config = quickstart.get_config("smoke")
config.train.local_copies = str(folder / "local")
(folder / "run").mkdir()
mesh = sharding.make_mesh(2, 4)
split, rows, whole = (NamedSharding(mesh, P(*spec)) for spec in ((None, "fsdp"), (("data", "fsdp"),), ()))
random = np.random.default_rng(0)
def values(step):
    return {
        "step": (np.int32(step), whole),
        "a": {"kernel": (random.standard_normal((6, 8)).astype(np.float32), split)},
        "b": (random.standard_normal(16).astype(jnp.bfloat16), rows),
        "empty": (np.zeros((0, 3), np.float32), whole),
    }
leaf = lambda x: isinstance(x, tuple)
def put(values):
    return jax.tree.map(lambda pair: jax.device_put(*pair), values, is_leaf=leaf)
copies = LocalCopies(config, folder / "run")
kept = {}
for step in (3, 5, 7):
    kept[step] = values(step)
    state = put(kept[step])
    assert copies.save(step, state)
    jax.tree.map(lambda array: array.delete(), state)  # as the next step takes its memory
    copies.wait()
assert copies.steps() == [5, 7]
shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), put(values(0)))
def check(step, newer_than=0, who=copies, shapes=shapes):
    state = who.restore(shapes, newer_than)
    if step is None:
        assert state is None
        return
    def same(pair, array):
        assert array.sharding == pair[1] and array.dtype == pair[0].dtype
        np.testing.assert_array_equal(np.asarray(array), pair[0])
    jax.tree.map(same, kept[step], state, is_leaf=leaf)
check(7)
check(7, newer_than=6)
check(None, newer_than=7)
other = quickstart.get_config("smoke")
other.train.local_copies, other.model.depth = config.train.local_copies, config.model.depth + 1
check(None, who=LocalCopies(other, folder / "run"))
(folder / "new").mkdir()
check(None, who=LocalCopies(config, folder / "new"))  # another run
turned = NamedSharding(mesh, P("fsdp"))
check(None, shapes={**shapes, "b": jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=turned)})
newest = copies.folder / "7.npz"
data = bytearray(newest.read_bytes())
data[data.index(kept[7]["a"]["kernel"][0][0][:2].tobytes())] ^= 1  # one bit
newest.write_bytes(data)
check(5)
copies.remove()
check(None)
print("done")
"""


def test_local_copies_are_exact_and_only_of_this_run(tmp_path):
    """Eight devices, split and whole arrays, types that NumPy doesn't know."""
    done = subprocess.run(
        [sys.executable, "-c", COPIES, tmp_path],
        cwd=ROOT,
        env={**os.environ, **fake_devices(8)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_local_copy(tmp_path):
    whole, killed, local = tmp_path / "whole", tmp_path / "killed", tmp_path / "local"
    run = (
        SMOKE,
        NO_SAMPLES,
        "--config.train.num_steps=150",
        "--config.train.log_every=1",
        "--config.train.save_every=140",
    )
    succeed(*run, f"--workdir={whole}")
    copies = (f"--config.train.local_copies={local}", "--config.train.local_copies_every=1", f"--workdir={killed}")
    code, _ = signal_when(signal.SIGKILL, lambda text: "\nstep 30/" in text, *run, *copies)
    assert code == -signal.SIGKILL
    (kept,) = local.glob("*/process_0_of_1")
    newest = max(int(path.stem) for path in kept.glob("*.npz"))
    assert 20 < newest < 140
    assert not (killed / "checkpoints" / "140").exists()
    # Half of the newest copy is lost: the one before it serves.
    data = (kept / f"{newest}.npz").read_bytes()
    (kept / f"{newest}.npz").write_bytes(data[: len(data) // 2])
    result = succeed(*run, *copies)
    before = max(int(step) for step in re.findall(r"copies of step (\d+) on the hosts' own disks", result.stderr))
    assert f"resumed at step {before}" in result.stdout
    assert before < newest
    assert f"the copy of step {newest}" in result.stderr
    the_same(rows(whole), rows(killed))
    assert not kept.exists()  # nobody needs them any more

    goodput = json.loads((killed / "goodput.json").read_text())
    assert goodput["processes"] == 2
    assert goodput["seconds"]["lost"] >= 0
    last = rows(killed)[150]
    assert 0 < last["goodput"] < 1
    shares = [value for name, value in last.items() if name.startswith("time_")]
    assert last["goodput"] + sum(shares) == pytest.approx(1)
    assert re.search(r"goodput [\d.]+% of \S+ in 2 processes: the rest is ", result.stdout)
    assert any("save_blocked_seconds" in row for row in rows(whole).values())


# ---------------------------------------------------------------------------------------- a process that is killed


JOINED = """
import sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from deco_jax.run import distributed
port, index, works = sys.argv[1:]
distributed.start(f"127.0.0.1:{port}", 2, int(index), heartbeat_timeout=4)
print("joined", flush=True)
with distributed.ending_with_the_others():
    while True:
        if works == "together":
            multihost_utils.process_allgather(np.int32(1))
        time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim, works", [(0, "alone"), (1, "alone"), (1, "together")])
def test_a_lost_process_ends_the_other_with_one_line(victim, works):
    """The coordinator or the other one, while they exchange something and while they don't."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, str(port), str(i), works],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:  # Gloo prints lines of its own
            assert any(line == "joined\n" for line in iter(process.stdout.readline, ""))
        processes[victim].kill()
        _, errors = processes[1 - victim].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode == 75, errors
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert f"[process {1 - victim} of 2, " in line
    assert "ending with status 75: start all processes again" in line
    assert "Traceback" not in errors
    assert "Fatal Python error" not in errors


def process_of(launcher: subprocess.Popen, index: int) -> int | None:
    """The number of the launcher's process with a --process_id; None if it isn't there."""
    for folder in pathlib.Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"--process_id={index}\0" in (folder / "cmdline").read_text():
                return int(folder.name)
        except (OSError, ValueError, IndexError):
            continue
    return None


def launch(workdir: pathlib.Path, log: pathlib.Path, *arguments: str) -> subprocess.Popen:
    """Two processes of four devices, each a slice."""
    command = ["launch/local_processes.sh", "2", "--devices=4", "--restarts=1", "--", SMOKE, f"--workdir={workdir}"]
    environment = {**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": fake_devices(4)["XLA_FLAGS"]}
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, "--config.mesh.slices=2", "--config.mesh.fsdp=4", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_launcher_goes_on(victim, tmp_path):
    run = ("--config.train.num_steps=40", "--config.train.save_every=5", "--config.train.log_every=1", NO_SAMPLES)
    undisturbed = launch(tmp_path / "whole", tmp_path / "whole.txt", *run)
    try:
        assert undisturbed.wait(timeout=600) == 0, (tmp_path / "whole.txt").read_text()
    finally:
        undisturbed.terminate()

    log, workdir = tmp_path / "killed.txt", tmp_path / "killed"
    launcher = launch(workdir, log, *run)
    try:
        metrics, end = workdir / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.01)
        other = process_of(launcher, 1 - victim)
        os.kill(process_of(launcher, victim), signal.SIGKILL)
        killed = time.monotonic()
        while process_of(launcher, 1 - victim) == other:
            assert time.monotonic() - killed < 60, "the other goes on after a minute"
            time.sleep(0.05)
        print(f"the other ended after {time.monotonic() - killed:.1f} s")
        assert launcher.wait(timeout=600) == 0, log.read_text()
    finally:
        launcher.terminate()
    text = log.read_text()
    assert "starting all again (1 of 1)" in text
    first = text.partition("starting all again")[0]
    lines = [line for line in first.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, first
    assert "ending with status 75" in lines[0]
    assert "Traceback" not in first
    the_same(rows(tmp_path / "whole"), rows(workdir))

"""Killed, asked to stop, damaged, diverged: a run goes on as if nothing had been, to the bit."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from deco_jax.run import distributed, preemption
from tests.helpers import ROOT, run_main
from tests.runs import NO_SAMPLES, SMOKE, depends_on_time, files, rows, signal_when, steps, succeed, two_steps

TOTAL = 40
LONG = (SMOKE, NO_SAMPLES, f"--config.train.num_steps={TOTAL}", "--config.train.save_every=5")
SHORT = (SMOKE, NO_SAMPLES, "--config.train.num_steps=5", "--config.train.save_every=5")


def losses(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """All that is logged and depends on the computation alone."""
    return {step: {k: v for k, v in row.items() if not depends_on_time(k)} for step, row in rows(workdir).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run logs that nothing happens to: its first 5 steps are those of SHORT."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    succeed(*LONG, "--config.train.save_every=1000", f"--workdir={workdir}")
    expected = losses(workdir)
    assert list(expected) == list(range(1, TOTAL + 1))
    assert len({row["loss"] for row in expected.values()}) > TOTAL / 2
    return expected


def saving(workdir: pathlib.Path) -> bool:
    return any("orbax-checkpoint-tmp" in entry.name for entry in (workdir / "checkpoints").iterdir())


def test_killed(tmp_path, undisturbed):
    """While it compiles, between saves, in the middle of a save."""

    def saving_late(said: str) -> bool:
        return "step 20/" in said and saving(tmp_path)

    for due in (lambda said: "compiling" in said, lambda said: "step 8/" in said, saving_late):
        code, _ = signal_when(signal.SIGKILL, due, *LONG, f"--workdir={tmp_path}")
        assert code == -signal.SIGKILL
    said = succeed(*LONG, f"--workdir={tmp_path}").stdout
    resumed = re.search(r"resumed at step (\d+)", said)
    assert resumed
    assert 10 <= int(resumed[1]) < TOTAL
    assert losses(tmp_path) == undisturbed
    assert not saving(tmp_path)
    assert len(steps(tmp_path)) == 3  # config.train.keep_checkpoints

    said = succeed(*LONG, f"--workdir={tmp_path}").stdout
    assert f"already trained to step {TOTAL}" in said
    assert losses(tmp_path) == undisturbed


def test_asked_to_stop(tmp_path, undisturbed):
    """SIGTERM and Ctrl-C save first, whatever the save interval."""
    command = [*LONG, "--config.train.save_every=1000", f"--workdir={tmp_path}"]
    before = 0
    for number, expected_code, line in (
        (signal.SIGTERM, distributed.RESTART, "step 8/"),
        (signal.SIGINT, 130, "step 25/"),
    ):
        code, said = signal_when(number, functools.partial(lambda line, said: line in said, line), *command)
        assert code == expected_code, said
        assert "Traceback" not in said
        saved = re.search(r"saved step (\d+); the same command continues", said)
        assert saved, said
        assert before < int(saved[1]) < TOTAL
        assert steps(tmp_path)[-1] == saved[1]
        if before:
            assert f"resumed at step {before}" in said
        before = int(saved[1])
    assert f"resumed at step {before}" in succeed(*command).stdout
    assert losses(tmp_path) == undisturbed


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, undisturbed, damage):
    workdir = two_steps(tmp_path)
    newest = workdir / "checkpoints" / "2"
    if damage == "cut":
        for file in (newest / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        shutil.rmtree(newest / "optimizer")
        shutil.rmtree(newest / "config")
    result = run_main(*SHORT, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "resumed at step 1" in result.stdout
    assert f"{newest} is damaged and passed over" in result.stderr
    assert "Traceback" not in result.stderr
    assert steps(workdir) == ["1", "5", "2.damaged"]
    assert losses(workdir) == {step: undisturbed[step] for step in range(1, 6)}


def test_goes_on_from_another_runs_checkpoint(tmp_path, undisturbed):
    """--checkpoint with a new workdir: the same steps as in the run it comes from; then it goes on with its own."""
    source = two_steps(tmp_path) / "checkpoints" / "1"
    command = [*SHORT, f"--workdir={tmp_path / 'fork'}", f"--checkpoint={source}"]
    said = succeed(*command, "--config.train.num_steps=3").stdout
    assert "resumed at step 1" in said
    said = succeed(*command).stdout
    assert "resumed at step 3" in said
    assert losses(tmp_path / "fork") == {step: undisturbed[step] for step in range(2, 6)}
    refused = run_main(*command, f"--config.init_from={source}")
    assert (refused.returncode, "give only one of them" in refused.stderr) == (1, True)
    # A run that began with another's weights is gone on with like any other, by its own settings.
    began = [f"--workdir={tmp_path / 'began'}", f"--config.init_from={source}", "--config.train.num_steps=1"]
    succeed(*SHORT, *began)
    said = succeed(f"--workdir={tmp_path / 'on'}", f"--checkpoint={tmp_path / 'began'}", *began[2:]).stdout
    assert f"config.init_from={source} is left out" in said
    assert "resumed at step 1" in said


def test_a_model_of_ten_classes_learns_two_of_ones_own(tmp_path):
    """init_from with other classes: the label table, and only it, starts from scratch, and a message says so."""
    source, chance = two_steps(tmp_path), np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            pixels = chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    command = [SMOKE, NO_SAMPLES, "--config.data.source=image_folder", f"--config.data.path={tmp_path / 'data'}"]
    command += ["--config.data.split=", "--config.model.num_classes=2", f"--config.init_from={source}"]
    command += ["--config.optimizer.learning_rate=1e-12", "--config.data.batch_size=8", "--config.train.num_steps=1"]
    said = succeed(*command, f"--workdir={tmp_path / 'own'}").stdout
    assert "the label table starts from scratch, with 2 classes instead of the 10 of" in said
    with ocp.StandardCheckpointer() as reader:
        before = reader.restore(source / "checkpoints" / "2" / "params")["denoiser"]
        after = reader.restore(tmp_path / "own" / "checkpoints" / "1" / "params")["denoiser"]
    assert before.pop("label_embed")["embedding"].shape[0] == 11
    assert after.pop("label_embed")["embedding"].shape[0] == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), before, after)
    refused = run_main(*command, "--config.init_optimizer=True", f"--workdir={tmp_path / 'other'}")
    assert (refused.returncode, "set config.init_optimizer=False" in refused.stderr) == (1, True)


def test_other_classes_of_the_same_number_are_refused(tmp_path):
    workdir = two_steps(tmp_path)
    names = json.loads((workdir / "classes.json").read_text())
    assert names == [str(digit) for digit in range(10)]
    (workdir / "classes.json").write_text(json.dumps(["zero", *names[1:]]))
    before = files(workdir)
    result = run_main(*SHORT, f"--workdir={workdir}")
    assert result.returncode == 1
    assert "was trained on other classes: 0 was 'zero' and is '0'" in result.stderr
    assert files(workdir) == before


def test_a_killed_data_worker_is_named_after_saving(tmp_path):
    command = [SMOKE, NO_SAMPLES, "--config.data.num_workers=1", "--config.train.num_steps=100000"]
    command += ["--config.train.save_every=100000", "--config.train.log_every=1", f"--workdir={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-m", "deco_jax.main", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                break
        threads = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in thread.read_text().split()]
        workers = [pid for pid in children if "spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 1
        os.kill(int(workers[0]), signal.SIGKILL)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a data worker was killed (exit code -9)" in errors
    assert "Traceback" not in errors
    saved = re.search(r"saved step (\d+)", said)
    assert steps(tmp_path) == [saved[1]]


@pytest.fixture
def hangup() -> Iterator[Callable]:
    """Sets what SIGHUP does. These tests may themselves run under nohup, which ignores it."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_ends_nothing(hangup):
    hangup(signal.SIG_IGN)
    with preemption.Watch() as watch:
        signal.raise_signal(signal.SIGHUP)
        assert not watch.reached()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_scheduler_s_warning_save_too(number, hangup):
    hangup(signal.SIG_DFL)
    with preemption.Watch() as watch:
        signal.raise_signal(number)
        assert watch.reached()
        assert watch.reason == f"asked to end ({number.name})"
        assert watch.exit_code == distributed.RESTART  # launchers start the run again
    assert not preemption.Watch().reached()


def test_a_stop_is_noticed_between_the_batches_of_a_grid():
    preemption.check()
    with preemption.Watch() as watch:
        signal.raise_signal(signal.SIGTERM)
        preemption.check()  # training goes to the end of its step
        with pytest.raises(preemption.StopRequestedError), watch.leaving():
            preemption.check()
        preemption.check()


def test_asked_to_stop_while_a_grid_is_drawn(tmp_path):
    """In a grid of half an hour: the step before it is saved at once, and there is no grid."""
    command = [SMOKE, "--config.train.num_steps=3", "--config.train.sample_every=1", "--config.sample.num_images=64"]
    command += ["--config.sample.num_steps=500", "--config.sample.batch_size=1", "--config.train.save_every=100"]
    command += ["--config.train.log_every=1", f"--workdir={tmp_path}"]
    code, said = signal_when(signal.SIGTERM, lambda said: "step 1/" in said, *command)
    assert code == distributed.RESTART, said
    assert "asked to end (SIGTERM): saved step 1" in said
    assert steps(tmp_path) == ["1"]
    assert not (tmp_path / "samples").exists()


def test_ctrl_c_reaches_all_hosts(monkeypatch):
    """With several hosts the preemption service, which takes SIGTERM, makes them stop at one step."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", lambda step: bool(received))
    try:
        with preemption.Watch() as watch:
            assert not watch.reached()
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGTERM]
            assert watch.reached()
            assert (watch.reason, watch.exit_code) == ("interrupted", distributed.RESTART)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_loss_that_is_not_finite(tmp_path, undisturbed):
    """Stops with the step named; the last good checkpoint stays, and the run goes on from it."""
    workdir = two_steps(tmp_path)
    good = files(workdir / "checkpoints" / "2")
    command = [*SHORT, f"--workdir={workdir}"]
    # The third step is still finite and moves every weight out of range.
    diverging = [*command, "--config.optimizer.learning_rate=1e30"]

    result = run_main(*diverging, "--config.train.max_skipped_steps=0")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.fullmatch(
        r"error: step 4: the loss or its gradient is not finite [^\n]*the checkpoint of step 2 is good[^\n]*\n",
        result.stderr,
    )
    assert steps(workdir) == ["1", "2"]
    assert files(workdir / "checkpoints" / "2") == good

    allowed = pathlib.Path(shutil.copytree(workdir, tmp_path / "allowed"))
    result = run_main(*diverging, f"--workdir={allowed}", "--config.train.max_skipped_steps=2")
    assert result.returncode == 0, result.stderr
    for step in (4, 5):
        assert f"step {step} skipped: the loss or its gradient is not finite" in result.stderr
    assert rows(allowed)[3]["loss"] == undisturbed[3]["loss"]
    assert rows(allowed)[4]["gradient_norm"] is None  # JSON has no NaN

    succeed(*command)
    assert losses(workdir) == {step: undisturbed[step] for step in range(1, 6)}

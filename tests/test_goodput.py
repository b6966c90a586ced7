"""Where the time goes, and what a save takes from the steps."""

from __future__ import annotations

import json
import threading
import time
import types

import numpy as np
import pytest

from configs import quickstart
from deco_jax.programs.actions import Save
from deco_jax.run import checkpoint, checksums
from deco_jax.run import goodput as goodput_lib


class Result:
    """What a step returns, ready when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(30)
        return self


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def sums(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput_lib, "process_age", lambda: 2.0)
    return goodput_lib.Goodput(tmp_path)


def take(sums, step: int, seconds: float) -> None:
    """A step that takes so long on the devices."""
    result = Result()
    sums.handed_over(step, result)
    until(lambda: sums.clock.running is not None)
    time.sleep(seconds)
    result.done.set()
    until(lambda: sums.clock.running is None)


def test_all_of_the_time_is_somewhere_and_each_part_where_it_belongs(sums, tmp_path):
    began = time.monotonic() - 2.0
    with sums.spending("restore"), sums.spending("compile"):
        time.sleep(0.1)
    take(sums, 1, 0.3)
    with sums.spending("data"):
        time.sleep(0.2)
    ahead = Result()
    sums.handed_over(2, ahead)
    until(lambda: sums.clock.running is not None)
    with sums.spending("data"):  # while the devices work: not lost
        time.sleep(0.4)
    ahead.done.set()
    until(lambda: sums.clock.running is None)
    with sums.spending("saving"):
        time.sleep(0.1)
    line = sums.close(2)
    whole = time.monotonic() - began
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.1)
    assert 0.7 <= seconds["training"] < whole - 2.4
    for name, least in (("start", 2.0), ("compile", 0.1), ("data", 0.2), ("saving", 0.1)):
        assert least <= seconds[name] < least + 0.2, name
    assert "restore" not in seconds or seconds["restore"] < 0.01  # it was compiling
    assert line.startswith(f"goodput {seconds['training'] / sum(seconds.values()):.1%} of 0m0")
    assert "start" in line
    shares = sums.shares()
    assert sum(shares.values()) == pytest.approx(1)


def test_what_a_kill_took_is_lost_and_no_longer_training(sums, tmp_path, monkeypatch):
    take(sums, 1, 0.1)
    sums.note(1)  # a checkpoint
    take(sums, 2, 0.1)
    take(sums, 3, 0.3)
    sums.note(3)
    before = json.loads((tmp_path / "goodput.json").read_text())
    (_, at_1), (_, at_3) = before["marks"][-2:]
    monkeypatch.setattr(goodput_lib.time, "time", lambda: before["time"] + 52.0)  # it was gone for 50 s
    again = goodput_lib.Goodput(tmp_path)
    again.resumed(1)
    take(again, 2, 0.1)
    again.close(2)
    after = json.loads((tmp_path / "goodput.json").read_text())
    assert after["seconds"]["lost"] == pytest.approx(at_3 - at_1, abs=0.01)
    assert after["seconds"]["training"] == pytest.approx(at_1 + 0.1, abs=0.08)
    assert after["away"] == pytest.approx(50.0, abs=0.1)
    assert after["processes"] == 2
    # Between two marks a step counts in proportion.
    third = goodput_lib.Goodput(tmp_path)
    (tmp_path / "goodput.json").write_text(
        json.dumps({**after, "marks": [[0, 0.0], [10, 5.0]], "seconds": {"training": 5.0}})
    )
    third.resumed(4)
    assert third._seconds == {"training": pytest.approx(2.0), "lost": pytest.approx(3.0)}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": {}}', '{"marks": [], "seconds": {"training": 1}}'])
def test_a_damaged_note_begins_anew(sums, tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    sums.resumed(7)
    take(sums, 8, 0.01)
    assert "goodput" in sums.close(8)


def test_steps_wait_for_a_copy_of_the_state_not_for_its_writing(tmp_path, monkeypatch):
    """On a disk on which the writing takes three seconds."""
    write, slow = checksums.write, 3.0

    def slowly(folder):
        time.sleep(slow)
        write(folder)

    monkeypatch.setattr(checksums, "write", slowly)
    config = quickstart.get_config("smoke")
    weights = {"denoiser": {"kernel": np.ones((512, 512), np.float32)}}
    state = {"step": np.int32(1), "skipped": np.int32(0), "params": weights, "averages": {"ema": weights["denoiser"]}}
    checkpoints = checkpoint.Checkpoints(tmp_path, 3)
    began = time.monotonic()
    checkpoints.save(1, state, config)
    blocked = time.monotonic() - began
    assert not checkpoints.free(0.0)
    assert checkpoints.free(60.0)
    written = time.monotonic() - began
    checkpoints.close()
    assert blocked < slow / 3
    assert written >= slow
    assert checkpoint.complete_steps(tmp_path) == [1]


def test_a_save_that_would_wait_too_long_comes_later():
    done, free = [], [False]
    train = types.SimpleNamespace(
        num_steps=100, save_every=10, keep_every=40, log_every=5, save_wait=7.0, validate_every=0
    )
    waited = []
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(train=train, evaluate=types.SimpleNamespace(every=0)),
        best=None,
        at=lambda step, every, last=False: bool(every) and step % every == 0,
        checkpoints=types.SimpleNamespace(
            free=lambda wait: waited.append(wait) or free[0], save=lambda step, state, config: done.append(step)
        ),
        writer=types.SimpleNamespace(sync=lambda: None),
        goodput=types.SimpleNamespace(note=lambda step: None),
    )
    log = types.SimpleNamespace(check=lambda step: None, blocked=0.0)
    save = Save(run, log)
    postponed = []
    for step in range(1, 41):
        if step == 23:
            free[0] = True
        if step == 38:
            free[0] = False
        if save.due(step, stopping=False) and not save(step, {}):
            postponed.append(step)
    # 10, 15 and 20 found the disk busy; 25 makes up for them; 40 is a milestone, which waits.
    assert (done, postponed) == ([25, 30, 40], [10, 15, 20])
    assert set(waited) == {7.0}
    assert log.blocked > 0
    assert save.due(41, stopping=True)
    save(41, {})
    assert done[-1] == 41

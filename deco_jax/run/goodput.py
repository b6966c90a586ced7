"""Where a run's wall time goes: the share in which the devices train, and what takes the rest.

A thread waits for each step and notes when it began and ended on the devices. Between two steps the devices wait for
this host, and that time counts towards what the host did. WORKDIR/goodput.json carries the sums from one process of the
run to the next:

    {"seconds": {"training": 3512.0, "lost": 41.2, "start": 30.1, "compile": 95.0, ...}, "away": 310.0, "processes": 3,
     "marks": [[0, 0.0], [5000, 3100.5]], "time": 1795649525.0}

"lost" is training that a kill destroyed: steps after the checkpoint from which the next process continued. "away" is
the time between the last note of one process and the start of the next; it isn't included in the total.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from deco_jax.run import storage

FILE = "goodput.json"
TRAINING, LOST, START, OTHER = "training", "lost", "start", "other"
NOTE_SECONDS = 10.0  # between two notes; in a bucket, storage.PUT_SECONDS
MARKS = 200  # steps whose training time is remembered, to compute what a later process lost


class Running(NamedTuple):
    """The step that the devices are working on."""

    step: int
    since: float  # time.monotonic


class StepClock:
    """Notes when steps begin and end on the devices; a step begins once it is dispatched and the last one has ended.

    Args:
        began: the time.monotonic from which the devices wait for the first step.
    """

    def __init__(self, began: float) -> None:
        self.training = 0.0  # seconds spent in steps
        self.running: Running | None = None
        self.gaps: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()
        self._ended = began
        self._steps: queue.SimpleQueue[tuple[int, Any, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def handed_over(self, step: int, result: Any) -> None:
        """Note that a step was dispatched; `result` is ready when it has ended."""
        self._steps.put((step, result, time.monotonic()))

    def _wait(self) -> None:
        for step, result, at in iter(self._steps.get, None):
            began = max(at, self._ended)
            self.gaps.put((self._ended, began))
            self.running = Running(step, began)
            with contextlib.suppress(Exception):  # the training loop gets the same error
                jax.block_until_ready(result)
            del result
            self._ended = time.monotonic()
            self.running = None
            self.training += self._ended - began

    def close(self) -> float:
        """Wait for the last step; return the time at which it ended."""
        self._steps.put(None)
        self._thread.join()
        return self._ended


class Goodput:
    """Sums up where the time went, over all processes of a run.

    Args:
        folder: the workdir; None on hosts other than the first, which write nothing.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._began = time.monotonic() - process_age()
        self._spans: list[tuple[str, float, float]] = []  # what the host did, in order
        self._seconds: dict[str, float] = {TRAINING: 0.0}
        self._away, self._processes = 0.0, 1
        self._marks: list[tuple[int, float]] = [(0, 0.0)]
        self._before = 0.0  # training of earlier processes
        self._first_gap, self._noted = True, 0.0
        self.clock = StepClock(self._began)

    def resumed(self, step: int) -> None:
        """Take over the sums of earlier processes; this one continues from `step`."""
        earlier = _read(self._path)
        if not earlier:
            self._marks = [(step, 0.0)]
            return
        self._seconds = {TRAINING: 0.0, **earlier["seconds"]}
        marks = [(int(at), float(done)) for at, done in earlier["marks"]]
        done = self._seconds[TRAINING]
        kept = float(np.interp(step, [at for at, _ in marks], [spent for _, spent in marks]))
        self._seconds[TRAINING] = kept
        self._seconds[LOST] = self._seconds.get(LOST, 0.0) + done - kept
        self._marks = [*[mark for mark in marks if mark[0] < step], (step, kept)]
        self._before = kept
        self._away = float(earlier["away"]) + max(0.0, time.time() - process_age() - float(earlier["time"]))
        self._processes = int(earlier["processes"]) + 1

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Count the host's time in here under `name`; the innermost name counts."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spans.append((name, began, time.monotonic()))

    def handed_over(self, step: int, result: Any) -> None:
        """Note that a step was dispatched."""
        self.clock.handed_over(step, result)
        pause = storage.PUT_SECONDS if self._path is not None and storage.is_remote(self._path) else NOTE_SECONDS
        if time.monotonic() - self._noted > pause:
            self.note(step - 1)

    def shares(self) -> dict[str, float]:
        """Return {"goodput": share of the time in training steps that counted, "time_NAME": other shares, ...}."""
        self._account()
        whole = sum(self._seconds.values())
        if not whole:
            return {}
        rest = {f"time_{name}": value / whole for name, value in self._seconds.items() if name != TRAINING and value}
        return {"goodput": self._seconds[TRAINING] / whole, **rest}

    def note(self, step: int) -> None:
        """Write down the sums after a step."""
        self._account()
        self._noted = time.monotonic()
        done = self._seconds[TRAINING]
        self._marks = [*[mark for mark in self._marks if mark[0] < step][-MARKS:], (step, done)]
        if self._path is None:
            return
        values = {
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "away": round(self._away, 3),
            "processes": self._processes,
            "marks": [[at, round(seconds, 3)] for at, seconds in self._marks],
            "time": time.time(),
        }
        from deco_jax.run.writer import write_atomically

        write_atomically(self._path, (json.dumps(values) + "\n").encode())

    def close(self, step: int) -> str:
        """Account for the time since the last step, write it down, and return it as a line."""
        ended = self.clock.close()
        self.clock.gaps.put((ended, time.monotonic()))
        self.note(step)
        whole = sum(self._seconds.values())
        rest = sorted(((v, n) for n, v in self._seconds.items() if n != TRAINING), reverse=True)
        parts = ", ".join(f"{name} {value / whole:.1%}" for value, name in rest if value / whole >= 0.0005)
        several = f" in {self._processes} processes" if self._processes > 1 else ""
        away = f"; {_words(self._away)} between them" if self._away >= 1 else ""
        return (
            f"goodput {self._seconds[TRAINING] / whole:.1%} of {_words(whole)}{several}"
            + (f": the rest is {parts}" if parts else "")
            + away
        )

    def _account(self) -> None:
        self._seconds[TRAINING] = self._before + self.clock.training
        while not self.clock.gaps.empty():
            begin, end = self.clock.gaps.get()
            left = end - begin
            for name, share in _shares_of(self._spans, begin, end).items():
                self._seconds[name] = self._seconds.get(name, 0.0) + share
                left -= share
            name = START if self._first_gap else OTHER
            self._first_gap = False
            self._seconds[name] = self._seconds.get(name, 0.0) + max(0.0, left)
            self._spans = [span for span in self._spans if span[2] > end]


def _shares_of(spans: list[tuple[str, float, float]], begin: float, end: float) -> dict[str, float]:
    """Return the seconds of [begin, end] in each name's spans; in nested spans the inner one (it ends first) counts."""
    found: dict[str, float] = {}
    taken: list[tuple[float, float]] = []
    for name, first, last in spans:
        first, last = max(first, begin), min(last, end)
        if last <= first:
            continue
        inside = sum(max(0.0, min(last, b) - max(first, a)) for a, b in taken)
        found[name] = found.get(name, 0.0) + last - first - inside
        taken = [(a, b) for a, b in taken if not (first <= a and b <= last)] + [(first, last)]
    return found


def process_age() -> float:
    """Return the seconds since the system started this process; 0 if it doesn't say."""
    try:
        ticks = float(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, up - ticks / os.sysconf("SC_CLK_TCK"))


def _read(path: pathlib.Path | None) -> dict[str, Any]:
    """Read the sums so far; {} if there are none, or they can't be read."""
    try:
        values = json.loads(path.read_bytes()) if path is not None and path.exists() else {}
        return values if values and values["marks"] and values["seconds"].get(TRAINING, 0.0) >= 0 else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _words(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{int(seconds) % 60:02d}s"

"""Ends a process whose training step hangs: a hung host or link would otherwise block all devices for nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax

from deco_jax.run import files
from deco_jax.run.distributed import RESTART
from deco_jax.run.goodput import StepClock

FOLDER = "stacks"
WRITING_SECONDS = 20.0  # for the workdir, which may be what hangs


class Watchdog:
    """While entered: if a step takes longer than allowed, writes all threads' stacks, says so and ends the process.

    A step begins with the host's work for it: reading its batch and dispatching it. Work within `resting` (saving,
    evaluation, grids) isn't watched; compilation is done before.

    Args:
        workdir: stacks go to WORKDIR/stacks/step_STEP_host_INDEX.txt.
        limit: seconds; 0: no limit.
        clock: knows the step that the devices are working on.
    """

    def __init__(self, workdir: pathlib.Path, limit: float, clock: StepClock) -> None:
        self._workdir, self._limit, self._clock = workdir, limit, clock
        self._step, self._since, self._resting = 0, time.monotonic(), False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._limit:
            self._thread.join()

    def handed_over(self, step: int) -> None:
        """Note that the host has finished its part of a step and begins with the next one."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Don't count the host's work in here as part of a step."""
        self._resting = True
        try:
            yield
        finally:
            self._since, self._resting = time.monotonic(), False

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit / 10)):
            now, running = time.monotonic(), self._clock.running
            if running is not None and now - running.since > self._limit:
                self._end(running.step, "its devices")
            elif not self._resting and now - self._since > self._limit:
                # Dispatching waits for the devices if they are far behind.
                self._end(self._step + 1, "its devices" if running else "this host, which fetches its batch")

    def _end(self, step: int, where: str) -> None:
        host = f"host {jax.process_index()} of {jax.process_count()}"
        head = f"{host}, {socket.gethostname()}, process {os.getpid()}: step {step} waits for {where}\n\n"
        descriptor, local = tempfile.mkstemp(prefix="deco_jax_stacks_", suffix=".txt")
        with os.fdopen(descriptor, "w") as file:
            file.write(head)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        path = self._workdir / FOLDER / f"step_{step:08d}_host_{jax.process_index():04d}.txt"
        written = threading.Event()

        def copy() -> None:
            with files.whole(path) as part:
                part.write_text(pathlib.Path(local).read_text())
            written.set()

        threading.Thread(target=copy, daemon=True).start()
        place = path if written.wait(WRITING_SECONDS) else local
        print(
            f"error: [{host}, {socket.gethostname()}] step {step} has not ended after {self._limit:g} s "
            f"(config.train.step_timeout), it waits for {where}; {place} has the stacks of all threads; ending with "
            f"status {RESTART}: start again to continue from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(RESTART)

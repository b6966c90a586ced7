"""Stops on request: SIGTERM (a pod is taken away, a scheduler's limit), SIGUSR1 (SLURM's warning), SIGHUP (a closed
terminal) and Ctrl-C end a run after saving, all but Ctrl-C in a single process with a status on which launchers start
it again."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from deco_jax.run.distributed import RESTART

_interruptible: Watch | None = None  # for work that may be left between two batches


class StopRequestedError(Exception):
    """The run was asked to stop during work that can be interrupted."""


def check() -> None:
    """Raise StopRequestedError if the run should stop now; call it between the batches of work that takes minutes.

    All hosts have to call it equally often, because they leave before the same batch.
    """
    if _interruptible is not None and _interruptible.reached():
        raise StopRequestedError


class Watch:
    """While entered, the signals above only ask the loop to stop; a second Ctrl-C ends at once.

    With several hosts, JAX's preemption service spreads SIGTERM, and all hosts agree on one step; the other signals are
    passed on to it as a SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._calls = 0  # calls of the service, equally many on all hosts, which do the same things in order

    def __enter__(self) -> Watch:
        handled = [signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
            handled.append(signal.SIGHUP)
        if jax.process_count() == 1:  # with several, SIGTERM belongs to the preemption service
            handled.append(signal.SIGTERM)
        for number in handled:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGHUP:
            _leave_terminal()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Return whether to save and stop now; the same answer on every host."""
        if jax.process_count() == 1:
            return self._signal is not None
        self._calls += 1
        # The service names the next call that no host has made yet.
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self._signal = self._signal or signal.SIGTERM
            return True
        return False

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Let a request to stop end the work in here between two batches, with a StopRequestedError."""
        global _interruptible
        _interruptible = self
        try:
            yield
        finally:
            _interruptible = None

    @property
    def reason(self) -> str:
        if self._signal == signal.SIGINT:
            return "interrupted"
        return f"asked to end ({signal.Signals(self._signal or signal.SIGTERM).name})"

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C on a single host, so that scripts stop, too; else RESTART: the training isn't finished."""
        return 130 if self._signal == signal.SIGINT and jax.process_count() == 1 else RESTART


def _leave_terminal() -> None:
    """Discard output instead of writing to a closed terminal, where each line would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if os.isatty(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

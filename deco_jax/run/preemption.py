"""Stopping on request: SIGTERM (a pod taken away, a scheduler's limit) and Ctrl-C end a run after saving."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Watch:
    """While entered, SIGTERM and the first Ctrl-C only ask the loop to stop; a second Ctrl-C ends at once.

    With several hosts JAX's preemption service spreads the signal, and all hosts agree on one step; a Ctrl-C is passed
    on to it as a SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        # With several hosts SIGTERM belongs to the preemption service, which jax.distributed starts.
        handled = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
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
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopping(self, step: int) -> bool:
        """Whether to save after this step and stop; the same answer on every host."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._signal = self._signal or signal.SIGTERM
            return True
        return self._signal is not None and jax.process_count() == 1

    @property
    def reason(self) -> str:
        return "interrupted" if self._signal == signal.SIGINT else "asked to end (SIGTERM)"

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, which asked for this; 130 after Ctrl-C on a single host, so that scripts stop too."""
        return 130 if self._signal == signal.SIGINT and jax.process_count() == 1 else 0

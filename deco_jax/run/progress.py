"""Shows the progress of work that takes minutes, and the time left; on a terminal as one live line."""

from __future__ import annotations

import os
import sys
import time

import jax


class Progress:
    """Prints lines such as "40 of 200 images drawn, 1m12s left, 2.2 per second".

    The first part includes compilation, so the rate, and with it the time left, count from the end of that part.

    Args:
        total: how many there are.
        done: how many were done before.
        what: what they are and what happens to them, such as "images drawn".
        every: seconds between two lines if there is no terminal.
        after: text at the end of the lines.
        active: whether this host prints; None: only the first does.
    """

    def __init__(
        self, total: int, done: int, what: str, *, every: float = 0.0, after: str = "", active: bool | None = None
    ) -> None:
        self._total, self._what, self._every, self._after = total, what, every, after
        self._active = jax.process_index() == 0 if active is None else active
        self._live = self._active and sys.stdout.isatty()
        self._began = self._spoke = time.monotonic()
        self._first: int | None = None  # done when the clock was started
        self._done = done

    def __call__(self, done: int) -> None:
        """Report how many are done now."""
        now, since = time.monotonic(), self._began
        started, self._done = self._first is None, done
        if self._first is None:
            self._first, self._began = done, now
            note = f" (compiled and {self._what.split()[-1]} in {now - since:.1f} s)"
        else:
            rate = (done - self._first) / max(now - self._began, 1e-9)
            note = f", {time_left((self._total - done) / rate)}, {rate:.3g} per second"
        last = done >= self._total
        if self._active and (self._live or started or last or now - self._spoke >= self._every):
            self._spoke = now
            self._print(f"{done:,} of {self._total:,} {self._what}{note}{self._after}", last)

    def _print(self, text: str, last: bool) -> None:
        if not self._live:
            print(text, flush=True)
            return
        width = os.get_terminal_size().columns
        print(f"\r\033[K{text[: width - 1]}", end="\n" if last else "", flush=True)


def time_left(seconds: float) -> str:
    """Return a time as "1h05 left" or "2m03s left"."""
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    return f"{hours}h{minutes:02d} left" if hours else f"{minutes}m{int(seconds) % 60:02d}s left"

"""Watches a run from inside: profiler traces, unexpected compilations, device memory."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from deco_jax.run import storage

COMPILATION = "/jax/core/compile/backend_compile_duration"


class Profiler:
    """Traces a few steps for TensorBoard or xprof, into WORKDIR/profile.

    Args:
        start: steps of this process before the trace begins; 0: no trace.
        steps: number of steps in the trace.
    """

    def __init__(self, workdir: pathlib.Path, start: int, steps: int) -> None:
        self.folder = workdir / "profile"
        self._first, self._last = start + 1, start + steps if start else 0
        self._running = False
        self._written = contextlib.ExitStack()

    def before(self, done: int) -> None:
        """Call this before a step, with the number of steps that this process has done."""
        if self._last and done + 1 == self._first:
            jax.profiler.start_trace(str(self._written.enter_context(storage.staged_folder(self.folder))))
            self._running = True

    def after(self, done: int, result: Any) -> bool:
        """Call this after a step; returns True once the trace is written."""
        if not self._running or done < self._last:
            return False
        jax.block_until_ready(result)  # steps run asynchronously
        self.close()
        return True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._written.close()
            self._running = False


class CompileWatch:
    """While entered, logs each unexpected compilation as a warning, because it stalls every device."""

    def __init__(self) -> None:
        self.unexpected = 0
        self._expected = 0

    def __enter__(self) -> CompileWatch:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Treat compilations in here as expected."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event != COMPILATION or self._expected:
            return
        self.unexpected += 1
        name = kwargs.get("fun_name", "a function")
        logging.warning(
            "%s was compiled after the first step (%.1f s): does a shape or a type change?", name, duration_secs
        )


def peak_memory() -> int | None:
    """Return the most bytes that this host's first device has held so far; None if the device doesn't report it."""
    try:
        stats = jax.local_devices()[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return None
    return stats.get("peak_bytes_in_use")


def program_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the memory that a compiled program needs on a device: its parts, and their sum as "peak"."""
    analysis: Any = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return {**parts, "peak": sum(parts.values())}

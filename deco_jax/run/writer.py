"""A run's output for people: metrics.jsonl, TensorBoard events, W&B, image files, and one live line."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from PIL import Image

from deco_jax.config import to_json
from deco_jax.run import event_files, files, storage, tracking
from deco_jax.run.metrics import read_rows
from deco_jax.run.progress import time_left


class Writer:
    """Writes metrics.jsonl, TensorBoard events and the live line of one run.

    Args:
        workdir: an existing folder.
        total_steps: the run's last step, for the time left.
        resumed_at: the step from which the run continues. Later lines of metrics.jsonl are dropped, because those steps
            are repeated.
        active: false on hosts other than the first, which write nothing.
        config: of the run, for TensorBoard; `wandb` and `log_json` of its section "train" apply.

    Raises:
        UserError: Weights & Biases was asked for and can't start a run.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        total_steps: int,
        resumed_at: int,
        active: bool = True,
        config: ml_collections.ConfigDict | None = None,
    ) -> None:
        self._active, self._total = active, total_steps
        self._json = config is not None and config.train.log_json
        self._tracker: tracking.Tracker | None = None
        self._start_step, self._start_time = resumed_at, time.monotonic()
        self._live = active and not self._json and sys.stdout.isatty()
        self._synced_at = time.monotonic()
        self.last: dict[str, Any] = {}  # the line from which a resumed run continues
        if not active:
            return
        path = workdir / "metrics.jsonl"
        self.last = _keep_until(path, resumed_at)
        self._file: Any = event_files.ObjectLog(path) if storage.is_remote(path) else path.open("a")
        event_files.register(path)
        # Events of later steps, which are repeated, must not be shown twice.
        purge = resumed_at + 1 if resumed_at else None
        self._board = event_files.tensorboard().SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)
        if config is not None:
            values = to_json(config)
            self._board.add_text("config", textwrap.indent(json.dumps(values, indent=2), "    "), resumed_at)
            if config.train.wandb:
                self._tracker = tracking.Tracker(config.train.wandb, workdir, values)
                self.say(f"Weights & Biases: {self._tracker.where}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl and one live line."""
        if not self._active:
            return
        # JSON has no NaN, so non-finite values become null.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._row, self._row_at = {"step": step, **row}, self._file.tell()
        self._put(step, {k: v for k, v in metrics.items() if isinstance(v, int | float)})
        if self._json:
            print(json.dumps(self._row), flush=True)
            return
        # The time left comes first: a narrow terminal cuts the end.
        shown = {name: value for name, value in metrics.items() if not name.startswith("time_")}
        line = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, float))
        self.say(f"step {step}/{self._total}  {self._time_left(step)}  {line}", live=True)

    def add(self, step: int, name: str, value: float) -> None:
        """Add a value that took a while to measure to its step's line, which must be the last one written."""
        if not self._active:
            return
        self._row[name] = value if math.isfinite(value) else None
        self._file.truncate(self._row_at)
        self._put(step, {name: value})
        if self._json:
            print(json.dumps({"step": step, name: self._row[name]}), flush=True)
            return
        self.say(f"step {step}/{self._total}  {name} {value:.4g}")

    def _put(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps(self._row) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, float(value), step)
        self._board.flush()
        if self._tracker:
            self._tracker.log(step, {name: self._row[name] for name in scalars})
        if time.monotonic() - self._synced_at > storage.PUT_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make everything written so far outlast this process; called before each checkpoint."""
        if self._active and isinstance(self._file, event_files.ObjectLog):
            self._file.sync()
            self._board.flush()
            event_files.EventFile.sync()
            if self._tracker:
                self._tracker.sync()
            self._synced_at = time.monotonic()

    def _time_left(self, step: int) -> str:
        done = max(1, step - self._start_step)
        return time_left((time.monotonic() - self._start_time) / done * (self._total - step))

    def write_image(self, step: int, name: str, image: np.ndarray, path: pathlib.Path) -> None:
        """Save an image, uint8 [height, width, 3], as a PNG file and for TensorBoard."""
        if self._active:
            save_png(path, image)
            self._board.add_image(name, image, step, dataformats="HWC")
            if self._tracker:
                self._tracker.image(step, name, image)

    def start_clock(self) -> None:
        """Start measuring the time per step, which gives the time left; called once compilation is over."""
        self._start_time = time.monotonic()

    def say(self, text: str, live: bool = False) -> None:
        """Print a line; on a terminal, the next line overwrites a live one. With log_json, stdout only gets JSON."""
        if not self._active:
            return
        if self._json:
            print(text, file=sys.stderr, flush=True)
            return
        if self._live:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else 200
            print(f"\r\033[K{text[: width - 1]}" if live else f"\r\033[K{text}\n", end="", flush=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._active:
            if self._live:
                print()
            if isinstance(self._file, event_files.ObjectLog):
                self._file.sync()
            self._file.close()
            self._board.close()
            event_files.EventFile.sync()
            if self._tracker:
                self._tracker.close()


def _keep_until(path: pathlib.Path, step: int) -> dict[str, Any]:
    """Drop lines of later steps and lines that a kill cut short; return the last one kept, {} if there is none."""
    if not path.exists():
        return {}
    rows, damaged = read_rows(path)
    if damaged:
        logging.warning("dropped %d damaged line(s) of %s", damaged, path)
    kept = [row for row in rows if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept[-1] if kept else {}


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write all of a file, or none of it."""
    with files.whole(path) as part:
        part.write_bytes(data)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Write plain values as an indented JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Write an image, uint8 [height, width, 3], as a PNG file, whole or not at all."""
    with files.whole(path) as part:
        Image.fromarray(image).save(part, format="png")


def write_overview(path: pathlib.Path, parameters: Any) -> None:
    """Write a table of a model's parameters: the name, shape, type and size of each."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parameters)
    table = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    write_atomically(path, (table + "\n").encode())

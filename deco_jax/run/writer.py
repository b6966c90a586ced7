"""What a run leaves for people: metrics.jsonl, TensorBoard events, image files, and one live line."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from deco_jax.run import files

# clu imports TensorFlow for its own TensorBoard writer, which isn't used here: an empty stand-in keeps it out.
sys.modules.setdefault("clu.metric_writers.summary_writer", types.SimpleNamespace(SummaryWriter=None))  # type: ignore[arg-type]
from clu import metric_writers  # noqa: E402


class TensorBoardWriter(metric_writers.MetricWriter):
    """clu's writer interface over tensorboardX, which needs no TensorFlow."""

    def __init__(self, folder: pathlib.Path, resumed_at: int = 0) -> None:
        import tensorboardX

        # Events of later steps, which are done again, are not shown twice.
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        for name, batch in images.items():
            self._writer.add_images(name, np.asarray(batch), step, dataformats="NHWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_summaries(self, step: int, values: Any, metadata: Any = None) -> None:
        raise ValueError("raw summaries need TensorFlow")

    def write_videos(self, step: int, videos: Any) -> None:
        raise ValueError("videos are not written")

    def write_audios(self, step: int, audios: Any, *, sample_rate: int) -> None:
        raise ValueError("audio is not written")

    def write_histograms(self, step: int, arrays: Any, num_buckets: Any = None) -> None:
        for name, values in arrays.items():
            self._writer.add_histogram(name, np.asarray(values), step)

    def write_pointcloud(self, step: int, point_clouds: Any, **options: Any) -> None:
        raise ValueError("point clouds are not written")

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._writer.add_text("config", f"```\n{json.dumps(hparams, indent=2)}\n```", 0)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Writer:
    """metrics.jsonl, TensorBoard and the live line of one run; on hosts other than the first it writes nothing.

    Args:
        workdir: exists.
        total_steps: for the time that is left.
        resumed_at: later lines of metrics.jsonl belong to steps that will be done again, and are dropped.
    """

    def __init__(self, workdir: pathlib.Path, total_steps: int, resumed_at: int, active: bool = True) -> None:
        self._active, self._total = active, total_steps
        self._start_step, self._start_time = resumed_at, time.monotonic()
        self._live = active and sys.stdout.isatty()
        self.last: dict[str, Any] = {}  # the line that a resumed run goes on from
        if not active:
            return
        path = workdir / "metrics.jsonl"
        self.last = _keep_until(path, resumed_at)
        self._file = path.open("a")
        self._board = TensorBoardWriter(workdir / "tensorboard", resumed_at)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one live line."""
        if not self._active:
            return
        # JSON has no NaN: what isn't finite is null there.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._row, self._row_at = {"step": step, **row}, self._file.tell()
        self._put(step, {k: v for k, v in metrics.items() if isinstance(v, int | float)})
        line = f"step {step}/{self._total}  " + "  ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
        )
        self.say(f"{line}  {self._time_left(step)}", live=True)

    def add(self, step: int, name: str, value: float) -> None:
        """A value that took long to measure, into the line of its step, which must be the last one written."""
        if not self._active:
            return
        self._row[name] = value if math.isfinite(value) else None
        self._file.truncate(self._row_at)
        self._put(step, {name: value})
        self.say(f"step {step}/{self._total}  {name} {value:.4g}")

    def _put(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps(self._row) + "\n")
        self._file.flush()
        self._board.write_scalars(step, scalars)
        self._board.flush()

    def _time_left(self, step: int) -> str:
        done = max(1, step - self._start_step)
        seconds = (time.monotonic() - self._start_time) / done * (self._total - step)
        hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
        return f"{hours}h{minutes:02d} left" if hours else f"{minutes}m{int(seconds) % 60:02d}s left"

    def write_image(self, step: int, name: str, image: np.ndarray, path: pathlib.Path) -> None:
        """A uint8 [height, width, 3] as PNG and into TensorBoard."""
        if self._active:
            save_png(path, image)
            self._board.write_images(step, {name: image[None]})

    def start_clock(self) -> None:
        """From here on time counts for the time that is left: compiling doesn't."""
        self._start_time = time.monotonic()

    def say(self, text: str, live: bool = False) -> None:
        """A line for the person watching; a live one is overwritten by the next on a terminal."""
        if not self._active:
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
            self._file.close()
            self._board.close()


def _keep_until(path: pathlib.Path, step: int) -> dict[str, Any]:
    """Drop the lines of later steps, and a last line that a kill cut short; the last one kept, {} if there is none."""
    if not path.exists():
        return {}
    kept, last = [], {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            logging.warning("dropped a damaged line of %s", path)
            continue
        if row["step"] <= step:
            kept.append(line)
            last = row
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
    return last


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """All of the file or none of it."""
    with files.whole(path) as part:
        part.write_bytes(data)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Plain values as an indented JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """uint8 [height, width, 3] as a PNG file, whole or not at all."""
    with files.whole(path) as part:
        Image.fromarray(image).save(part, format="png")

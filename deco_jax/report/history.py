"""What a workdir holds, read back for people: metrics, settings, scores, spectra and pictures."""

from __future__ import annotations

import base64
import io
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deco_jax.errors import UserError
from deco_jax.run.metrics import read_rows

MAX_ENLARGEMENT = 64


class Picture(NamedTuple):
    """A picture as it goes into the page."""

    uri: str  # data:image/png;base64,...
    size: tuple[int, int]  # (width, height) to show it at
    pixels: bool  # stored at one pixel for a block of equal ones, and to be enlarged without smoothing
    reduced: bool  # stored smaller than it is


class Run(NamedTuple):
    """What a workdir holds. Missing parts are None or empty; damaged parts are named in `notes`."""

    name: str
    folder: pathlib.Path
    steps: list[int]
    metrics: dict[str, list[float | None]]  # by name, one value a logged step; None: absent or not finite
    not_finite: int  # logged values
    config: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]  # by folder, as a sweep's "guidance=1.5"; "": the run's own, and the first
    spectrum: list[tuple[str, list[tuple[str, str, list[float]]]]] | None  # see `_curves`
    spectrum_picture: Picture | None
    grids: dict[int, Picture]  # by step
    num_grids: int  # in the folder
    sampled: Picture | None  # samples/grid.png
    notes: list[str]

    def setting(self, key: str) -> Any:
        """Return a setting by its dotted key; None without a config or such a setting."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def known(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) wherever there is a value."""
        values = self.metrics.get(metric, [])
        return [(step, value) for step, value in zip(self.steps, values, strict=False) if value is not None]


def read_run(folder: pathlib.Path, name: str, max_grids: int, grid_pixels: int) -> Run:
    """Read everything that a report shows of a workdir.

    Args:
        max_grids: the most sample grids over time to keep; more are thinned out evenly, and the last is kept.
        grid_pixels: the most pixels of a grid's longer side; larger ones are stored reduced.

    Raises:
        UserError: the workdir has neither metrics nor, as with imported weights, anything measured or drawn.
    """
    if not folder.is_dir():
        raise UserError(f"no such workdir: {folder}; give the folder of a run")
    notes: list[str] = []
    try:
        steps, metrics, not_finite = _read_metrics(folder / "metrics.jsonl", notes)
    except UserError:
        made = ("evaluation.json", "*/evaluation.json", "spectrum.json", "samples/*.png")
        if not any(next(folder.glob(pattern), None) for pattern in made):
            raise
        steps, metrics, not_finite = [], {}, 0
        notes.append("no metrics: nothing was trained in this workdir")
    spectrum = _read_json(folder / "spectrum.json", notes)
    curves = None
    if spectrum is not None:
        try:
            curves = _curves(spectrum, name)
        except (KeyError, TypeError, ValueError, AttributeError):
            notes.append("spectrum.json is not as --mode=spectrum writes it, and is left out")
    picture = _read_picture(folder / "spectrum.png", 2 * grid_pixels, notes) if curves is None else None
    files = {
        int(match[1]): path
        for path in sorted((folder / "samples").glob("step_*.png"))
        if (match := re.fullmatch(r"step_(\d+)\.png", path.name))
    }
    chosen = sorted(files)
    if len(chosen) > max_grids:
        places = np.linspace(len(chosen) - 1, 0, max_grids).round().astype(int)  # the last is always among them
        chosen = sorted({chosen[i] for i in places})
    grids = {step: _read_picture(files[step], grid_pixels, notes) for step in chosen}
    return Run(
        name,
        folder,
        steps,
        metrics,
        not_finite,
        _read_json(folder / "config.json", notes),
        _read_evaluations(folder, notes),
        curves,
        picture,
        {step: grid for step, grid in grids.items() if grid is not None},
        len(files),
        _read_picture(folder / "samples" / "grid.png", grid_pixels, notes),
        notes,
    )


def _read_metrics(path: pathlib.Path, notes: list[str]) -> tuple[list[int], dict[str, list[float | None]], int]:
    """Read metrics.jsonl as (steps, metrics by name, number of values that are not finite)."""
    if not path.exists():
        raise UserError(f"{path.parent} has no metrics.jsonl, so there is nothing to report; train there first")
    read, damaged = read_rows(path)
    rows = {row["step"]: row for row in read}
    if not rows:
        raise UserError(f"{path} has no line of metrics, so there is nothing to report; train there first")
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of metrics.jsonl left out")
    steps = sorted(rows)
    names = {name: None for step in steps for name in rows[step] if name != "step"}
    values = {name: [rows[step].get(name) for step in steps] for name in names}
    metrics = {
        name: [float(f"{v:.9g}") if finite(v) else None for v in column]
        for name, column in values.items()
        if all(v is None or is_number(v) for v in column)
    }
    # The writer puts null for a value that isn't finite; a metric that a line doesn't have is merely absent.
    not_finite = sum(name in metrics and not finite(v) for row in rows.values() for name, v in row.items())
    return steps, metrics, not_finite


def _read_evaluations(folder: pathlib.Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Read the run's own evaluation, and those that a sweep's --measure left in the folders directly below."""
    paths = [folder / "evaluation.json", *sorted(folder.glob("*/evaluation.json"))]
    read = {path.parent: _read_json(path, notes, str(path.relative_to(folder))) for path in paths}
    return {"" if parent == folder else parent.name: values for parent, values in read.items() if values is not None}


def _read_json(path: pathlib.Path, notes: list[str], name: str = "") -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            return values
    except (OSError, ValueError):
        pass
    notes.append(f"{name or path.name} can't be read, and is left out")
    return None


def _read_picture(path: pathlib.Path, max_side: int, notes: list[str]) -> Picture | None:
    """Read a picture as a PNG of at most max_side pixels on its longer side; None if there is none."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, Image.open(opened) as file:
            whole = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"{path.name} can't be read, and is left out")
        return None
    pixels = np.asarray(whole)
    factor = enlargement(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels[::factor, ::factor]))
    reduced = max(image.size) > max_side
    if reduced:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return Picture(uri, whole.size if factor > 1 else image.size, factor > 1 and not reduced, reduced)


def enlargement(pixels: np.ndarray) -> int:
    """Return the largest factor by which [height, width, channels] is a smaller picture with each pixel repeated."""
    height, width = pixels.shape[:2]
    common = math.gcd(height, width)
    for factor in range(min(common, MAX_ENLARGEMENT), 1, -1):
        if common % factor == 0:
            blocks = pixels.reshape(height // factor, factor, width // factor, factor, -1)
            if np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape)):
                return factor
    return 1


def _curves(spectrum: dict[str, Any], name: str) -> list[tuple[str, list[tuple[str, str, list[float]]]]]:
    """Turn spectrum.json into [(plot, [(curve, kind, values)])], kind one of "model", "data", "Y", "Cb"."""
    checkpoints = spectrum["checkpoints"]

    def of_models(part: str) -> list[tuple[str, str, list[float]]]:
        named = [(name if len(checkpoints) == 1 else f"{name}: {c['name']}", c[part]) for c in checkpoints]
        return [
            (title + (f" ({p['block']:d}×{p['block']:d})" if p["block"] != 8 else ""), "model", _values(p["spectrum"]))
            for title, p in named
        ]

    weights, data = spectrum["frequency_weights"], ("data", "data", _values(spectrum["data"]["spectrum"]))
    return [
        ("DiT output: log(1 + energy) / maximum", of_models("dit")),
        (
            "velocity, data and loss weights",
            [
                *of_models("velocity"),
                data,
                (f"loss weights Y, quality {float(weights['quality']):g}", "Y", _values(weights["Y"])),
                ("loss weights Cb, Cr", "Cb", _values(weights["Cb"])),
            ],
        ),
    ]


def _values(numbers: Iterable[Any]) -> list[float]:
    values = [float(f"{float(v):.5g}") for v in numbers]
    if not all(map(math.isfinite, values)):
        raise ValueError("it holds values that are not finite")
    return values


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)

"""--mode=report: one HTML file of a run, or of several side by side, that opens without a network.

    metrics.jsonl, config.json, samples/*.png, evaluation.json, spectrum.json ─ Run ─ report.html's places ─ WORKDIR

Tables and pictures are written here; the curves are drawn by the script in report.html from the numbers beside it.
Everything that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from PIL import Image

from deco_jax.config import flatten
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.run.workdir import listed, make_folder, short_names
from deco_jax.run.writer import write_atomically

TEMPLATE = pathlib.Path(__file__).with_name("report.html")
# Metrics that have a place of their own; every other is drawn among the losses.
ELSEWHERE = ("step", "fid", "images_per_second", "peak_memory_gib", "unreadable_images")
MAX_ENLARGEMENT = 64
GREY = 7  # among the colours of report.html
DASHES = {"data": "6 4", "Y": "2 3", "Cb": "8 3 2 3"}


class Picture(NamedTuple):
    """A picture as it goes into the page."""

    uri: str  # data:image/png;base64,...
    size: tuple[int, int]  # (width, height) to show it at
    pixels: bool  # stored at one pixel for a block of equal ones, and to be enlarged without smoothing
    reduced: bool  # stored smaller than it is


class Run(NamedTuple):
    """What a workdir holds. What is missing is None or empty, what is damaged is said in `notes`."""

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
        """A setting by its dotted key; None without a config or such a setting."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def known(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever there is a value."""
        values = self.metrics.get(metric, [])
        return [(step, value) for step, value in zip(self.steps, values, strict=False) if value is not None]


def report(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Write WORKDIR/report.html about it, or about config.report.workdirs."""
    settings, folder = config.report, pathlib.Path(workdir)
    folders = listed(settings.workdirs) or [folder]
    if len({path.absolute() for path in folders}) < len(folders):
        raise UserError(f"config.report.workdirs={settings.workdirs} names a workdir twice; give each once")
    runs = [
        read_run(path, name, settings.grids, settings.grid_pixels)
        for path, name in zip(folders, short_names(folders), strict=True)
    ]
    make_folder(folder)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    where = folder / "report.html"
    write_atomically(where, page(runs).encode())
    print(f"wrote {where} ({where.stat().st_size / 2**20:.1f} MiB) of {len(runs)} run{'s' if len(runs) > 1 else ''}")


# ---------------------------------------------------------------------------------------- reading


def read_run(folder: pathlib.Path, name: str, max_grids: int, grid_pixels: int) -> Run:
    """Everything that a report shows of a workdir.

    Args:
        max_grids: of the sample grids over time at most so many, evenly spread.
        grid_pixels: the longer side of a grid as it is embedded, at most.

    Raises:
        UserError: there are neither metrics nor, as of imported weights, anything that was made of them.
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
            notes.append("spectrum.json is not as --mode=spectrum writes it, and left out")
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
    """(steps, metrics, values that are not finite) of metrics.jsonl; a run may be writing to it."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        raise UserError(
            f"{path.parent} has no metrics.jsonl, so there is nothing to report; train there first"
        ) from None
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in lines:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if not rows:
        raise UserError(f"{path} has no line of metrics, so there is nothing to report; train there first")
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of metrics.jsonl left out")
    steps = sorted(rows)
    names = {name: None for step in steps for name in rows[step] if name != "step"}
    values = {name: [rows[step].get(name) for step in steps] for name in names}
    metrics = {
        name: [float(f"{v:.9g}") if _finite(v) else None for v in column]
        for name, column in values.items()
        if all(v is None or _is_number(v) for v in column)
    }
    # The writer stands null for what isn't finite; what a line hasn't got is merely absent.
    not_finite = sum(name in metrics and not _finite(v) for row in rows.values() for name, v in row.items())
    return steps, metrics, not_finite


def _read_evaluations(folder: pathlib.Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """The run's own, and those that a sweep's --measure left in the folders right below."""
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
    """A picture as a PNG of at most max_side pixels a side; None if there is none."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as file:
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
    """The largest factor by which [height, width, channels] is a smaller picture with each pixel repeated."""
    height, width = pixels.shape[:2]
    common = math.gcd(height, width)
    for factor in range(min(common, MAX_ENLARGEMENT), 1, -1):
        if common % factor == 0:
            blocks = pixels.reshape(height // factor, factor, width // factor, factor, -1)
            if np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape)):
                return factor
    return 1


def _curves(spectrum: dict[str, Any], name: str) -> list[tuple[str, list[tuple[str, str, list[float]]]]]:
    """spectrum.json as [(plot, [(curve, kind, values)])], kind one of "model", "data", "Y", "Cb"."""
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
    return [float(f"{float(v):.5g}") for v in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


# ---------------------------------------------------------------------------------------- the page


def page(runs: list[Run]) -> str:
    """The whole file."""
    title = "Run report: " + ", ".join(run.name for run in runs)
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts = {
        "TITLE": _text(title),
        "SUBTITLE": _text(" · ".join(str(run.folder.absolute()) for run in runs)),
        "RUNS": "".join(_button(i, run) for i, run in enumerate(runs)),
        "SUMMARY": _summary(runs),
        "LOSS_NOTES": _loss_notes(runs),
        "FID": _scores(runs),
        "SAMPLES": _samples(runs),
        "SPECTRA": _spectra(runs),
        "SPEED": _speed(runs),
        "CONFIG": _config(runs),
        "FOOTER": _text(f"Written by deco_jax, --mode=report, {now}. Nothing on this page is loaded from elsewhere."),
        "DATA": json.dumps(_data(runs), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: what is put in is not looked at again.
    return re.sub(r"<!--([A-Z_]+)-->", lambda match: parts[match[1]], TEMPLATE.read_text())


def _data(runs: list[Run]) -> dict[str, Any]:
    """What the script draws."""
    names: dict[str, None] = {"loss": None}
    for run in runs:
        names |= dict.fromkeys(sorted(run.metrics, key=lambda name: (name == "gradient_norm", name)))
    losses = [n for n in names if n not in ELSEWHERE and any(run.known(n) for run in runs)]
    if "gradient_norm" in losses:  # the parts of the loss stand together
        losses = [name for name in losses if name != "gradient_norm"] + ["gradient_norm"]
    return {
        "runs": [
            {
                "name": run.name,
                "steps": run.steps,
                "metrics": run.metrics,
                "batch_size": size if _finite(size := run.setting("data.batch_size")) else None,
            }
            for run in runs
        ],
        "losses": losses,
        "memory": any(run.known("peak_memory_gib") for run in runs),
        "sample_steps": sorted({step for run in runs for step in run.grids}),
        "spectra": _plots(runs),
    }


def _plots(runs: list[Run]) -> list[dict[str, Any]]:
    """The spectra of all runs in one pair of plots; data and weights that are equal are drawn once."""
    plots: dict[str, list[dict[str, Any]]] = {}
    with_spectra = [(i, run) for i, run in enumerate(runs) if run.spectrum]
    several = any(sum(kind == "model" for _, kind, _ in run.spectrum[0][1]) > 1 for _, run in with_spectra)  # type: ignore[index]
    for i, run in with_spectra:
        for title, curves in run.spectrum or ():
            plot = plots.setdefault(title, [])
            for name, kind, values in curves:
                if kind == "model":
                    models = sum(c["run"] is not None for c in plot)
                    curve = {"colour": models if several else i, "dash": "", "run": i}
                elif any(c["run"] is None and c["values"] == values for c in plot):
                    continue
                else:
                    if any(c["run"] is None and c["name"] == name for c in plot):
                        name = f"{name} of {run.name}"
                    curve = {"colour": None if kind == "data" else GREY, "dash": DASHES[kind], "run": None}
                plot.append({"name": name, "values": values, **curve})
    for plot in plots.values():
        plot.sort(key=lambda curve: curve["run"] is None)  # the models' first
    return [{"title": title, "curves": curves} for title, curves in plots.items()]


def _summary(runs: list[Run]) -> str:
    def model(run: Run) -> str | None:
        name = run.setting("model.name")
        if name is None:
            return None
        keys = {"width": "width", "depth": "blocks", "patch_size": "patch"}
        sizes = [f"{label} {run.setting(f'model.{key}')}" for key, label in keys.items() if run.setting(f"model.{key}")]
        return ", ".join([str(name), *sizes])

    def size(run: Run) -> str | None:
        value = run.setting("data.image_size")
        height, width = value if isinstance(value, list) and len(value) == 2 else (value, value)
        return None if value is None else f"{height}×{width}"

    def done(run: Run) -> str | None:
        if not run.steps:
            return None
        total = run.setting("train.num_steps")
        return f"{run.steps[-1]:,}" + (f" of {total:,}" if isinstance(total, int) else "")

    def seen(run: Run) -> str | None:
        batch = run.setting("data.batch_size")
        return f"{run.steps[-1] * batch:,}" if run.steps and isinstance(batch, int) else None

    def last(run: Run) -> str | None:
        known = run.known("loss")
        return f"{known[-1][1]:.4g} at step {known[-1][0]:,}" if known else None

    def best(run: Run) -> str | None:
        known = run.known("fid")
        if not known:
            return None
        step, value = min(known, key=lambda pair: pair[1])
        return f"{value:.2f} at step {step:,}"

    def fids(run: Run) -> str | None:
        known = [(where, _score(values, "fid")) for where, values in run.evaluations.items()]
        return ", ".join(f"{fid} ({where})" if where else fid for where, fid in known if fid) or None

    rows: list[tuple[str, Callable[[Run], str | None], str]] = [
        ("model", model, "not known"),
        ("data", lambda run: run.setting("data.source"), "not known"),
        ("image size", size, "not known"),
        ("batch size", lambda run: run.setting("data.batch_size"), "not known"),
        ("steps", done, "none trained here"),
        ("images seen", seen, "not known"),
        ("last loss", last, "no finite loss was logged"),
        ("lowest FID while training", best, "no FID was measured"),
        ("FID, --mode=evaluate", fids, "not evaluated"),
        ("images per second, median", lambda run: _median(run, "images_per_second"), "not logged"),
    ]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    cells = [(title, [(value(run), why) for run in runs]) for title, value, why in rows]
    return _table([run.name for run in runs], cells) + _notes(notes)


def _median(run: Run, metric: str) -> str | None:
    known = [value for _, value in run.known(metric)]
    return f"{statistics.median(known):.4g}" if known else None


def _loss_notes(runs: list[Run]) -> str:
    return _notes(
        f"{run.name}: {run.not_finite:,} logged value{'s are' if run.not_finite > 1 else ' is'} not finite; "
        "the curves have gaps there"
        for run in runs
        if run.not_finite
    )


def _score(evaluation: dict[str, Any], name: str) -> str | None:
    value = evaluation.get(name)
    return f"{value:.4g}" if _finite(value) else None


def _scores(runs: list[Run]) -> str:
    lines = ['<div class="charts" data-charts="fid"></div>'] if any(run.known("fid") for run in runs) else []
    lines += [
        _missing(run, "no FID was measured while training (config.evaluate.every is 0 unless asked for)", runs)
        for run in runs
        if not run.known("fid")
    ]
    lines.append("<h3>Evaluation</h3>")
    lines += [
        _missing(run, "no evaluation.json that can be read; --mode=evaluate writes it", runs)
        for run in runs
        if not run.evaluations
    ]
    measured = {f"{run.name} {where}".strip(): values for run in runs for where, values in run.evaluations.items()}
    if not measured:
        return "".join(lines)

    def reason(evaluation: dict[str, Any], name: str) -> str:
        missing = evaluation.get("missing")
        return str(missing.get(name, "not measured")) if isinstance(missing, dict) else "not measured"

    def counted(evaluation: dict[str, Any], side: str) -> str | None:
        what = evaluation.get(side)
        if not isinstance(what, dict):
            return None
        count = what.get("images")
        return f"{count:,} ({what.get('from')})" if isinstance(count, int) else str(what.get("from"))

    def sampling(evaluation: dict[str, Any]) -> str | None:
        config = evaluation.get("config")
        sample = config.get("sample") if isinstance(config, dict) else None
        if not isinstance(sample, dict) or not str(evaluation.get("samples", {})).count("drawn from"):
            return None
        keys = ("sampler", "num_steps", "guidance", "guidance_interval", "shift", "seed")
        return ", ".join(f"{key.replace('_', ' ')} {sample.get(key)}" for key in keys)

    columns = measured.values()
    rows = [
        (title, [(_score(values, name), reason(values, name)) for values in columns]) for name, title in TITLES.items()
    ]
    rows += [
        ("samples", [(counted(values, "samples"), "not said") for values in columns]),
        ("reference", [(counted(values, "reference"), "not said") for values in columns]),
        ("sampling", [(sampling(values), "images that were there already") for values in columns]),
    ]
    lines.append(_table(measured, rows))
    warnings = [(name, values.get("warnings")) for name, values in measured.items()]
    lines.append(_notes(f"{name}: {line}" for name, said in warnings if isinstance(said, list) for line in said))
    return "".join(lines)


def _samples(runs: list[Run]) -> str:
    lines = [
        _missing(run, "no grids of samples (samples/step_*.png) in this run", runs) for run in runs if not run.grids
    ]
    steps = sorted({step for run in runs for step in run.grids})
    if steps:
        last = len(steps) - 1
        if last:
            lines.append(
                '<div class="controls"><label>step '
                f'<input type="range" id="time" min="0" max="{last}" step="1" value="{last}"></label>'
                f'<output for="time" id="time-value">step {steps[-1]:,}</output> '
                '<button type="button" id="play">Play</button></div>'
            )
        figures = []
        for i, run in enumerate(runs):
            if not run.grids:
                continue
            newest = max(run.grids)
            images = "".join(
                _image(grid, f"samples of {run.name} at step {step:,}", f' data-step="{step}"', hidden=step != newest)
                for step, grid in run.grids.items()
            )
            caption = f'{_swatch(i)}{_text(run.name)}, <span class="when">step {newest:,}</span>'
            figures.append(
                f'<figure class="over-time" data-pictures="{i}"><figcaption>{caption}</figcaption>{images}</figure>'
            )
        lines.append(f'<div class="pictures">{"".join(figures)}</div>')
    notes = []
    for run in runs:
        if len(run.grids) < run.num_grids:
            notes.append(f"{run.name}: {len(run.grids)} of {run.num_grids} grids")
        if any(grid.reduced for grid in [*run.grids.values(), run.sampled] if grid):
            notes.append(f"{run.name}: grids are embedded smaller than they are; the files have every pixel")
    lines.append(_notes(notes))
    sampled = [(i, run) for i, run in enumerate(runs) if run.sampled]
    if sampled:
        lines.append("<h3>Drawn by --mode=sample</h3>")
        figures = [
            f'<figure data-pictures="{i}"><figcaption>{_swatch(i)}{_text(run.name)}</figcaption>'
            f"{_image(run.sampled, f'samples/grid.png of {run.name}')}</figure>"
            for i, run in sampled
            if run.sampled
        ]
        lines.append(f'<div class="pictures">{"".join(figures)}</div>')
    return "".join(lines)


def _spectra(runs: list[Run]) -> str:
    lines = [
        _missing(run, "no spectrum was measured; --mode=spectrum does it", runs)
        for run in runs
        if not run.spectrum and not run.spectrum_picture
    ]
    if any(run.spectrum for run in runs):
        lines.append('<div class="charts" data-charts="spectra"></div>')
    figures = [
        f'<figure data-pictures="{i}"><figcaption>{_swatch(i)}{_text(run.name)}</figcaption>'
        f"{_image(run.spectrum_picture, f'spectrum.png of {run.name}')}</figure>"
        for i, run in enumerate(runs)
        if run.spectrum_picture
    ]
    return "".join([*lines, f'<div class="pictures">{"".join(figures)}</div>' if figures else ""])


def _speed(runs: list[Run]) -> str:
    def seconds(run: Run) -> str | None:
        batch = run.setting("data.batch_size")
        known = [value for _, value in run.known("images_per_second") if value > 0]
        return f"{batch / statistics.median(known):.4g}" if known and _finite(batch) else None

    def memory(run: Run) -> str | None:
        known = [value for _, value in run.known("peak_memory_gib")]
        return f"{max(known):.3g} GiB" if known else None

    def unreadable(run: Run) -> str | None:
        known = run.known("unreadable_images")
        return f"{known[-1][1]:,.0f}" if known else None

    rows: list[tuple[str, Callable[[Run], str | None], str]] = [
        ("images per second, median", lambda run: _median(run, "images_per_second"), "not logged"),
        ("seconds per step, median", seconds, "not known"),
        ("peak memory of a device", memory, "the device did not say"),
        ("unreadable images", unreadable, "not logged"),
    ]
    cells = [(title, [(value(run), why) for run in runs]) for title, value, why in rows]
    return "<br>" + _table([run.name for run in runs], cells)


def _config(runs: list[Run]) -> str:
    lines = [_missing(run, "no config.json that can be read", runs) for run in runs if run.config is None]
    with_config = [run for run in runs if run.config is not None]
    if not with_config:
        return "".join(lines)
    names = [run.name for run in with_config]
    flat = [{key: json.dumps(value) for key, value in flatten(run.config or {}).items()} for run in with_config]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = {key: [(settings.get(key), "no such setting") for settings in flat] for key in keys}
    differ = {key for key, values in rows.items() if len({value for value, _ in values}) > 1}
    if len(with_config) > 1:
        lines.append("<h3>Differences</h3>")
        lines.append(
            _table(names, [(key, rows[key]) for key in rows if key in differ], "config")
            if differ
            else '<p class="missing">The settings are the same.</p>'
        )
    whole = _table(names, list(rows.items()), "config", differ if len(with_config) > 1 else ())
    lines.append(f"<details><summary>All {len(rows)} settings, as they were resolved</summary>{whole}</details>")
    return "".join(lines)


# ---------------------------------------------------------------------------------------- pieces of HTML


def _text(value: Any) -> str:
    """Escaped, for content and for attributes in double quotes."""
    return html.escape(str(value), quote=True)


def _swatch(run: int) -> str:
    return f'<span class="swatch" style="--colour: var(--c{run % 8})"></span>'


def _button(i: int, run: Run) -> str:
    return f'<button type="button" data-run="{i}" aria-pressed="true">{_swatch(i)}{_text(run.name)}</button>'


def _image(picture: Picture | None, alternative: str, attributes: str = "", hidden: bool = False) -> str:
    assert picture is not None
    width, height = picture.size
    kind = ' class="pixels"' if picture.pixels else ""
    return (
        f'<img src="{picture.uri}" alt="{_text(alternative)}" width="{width}" height="{height}"{kind}{attributes}'
        f"{' hidden' if hidden else ''}>"
    )


def _missing(run: Run, what: str, runs: list[Run]) -> str:
    return f'<p class="missing">{_text(f"{run.name}: {what}" if len(runs) > 1 else what[0].upper() + what[1:])}.</p>'


def _notes(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _table(
    names: Iterable[str], rows: list[tuple[str, list[tuple[Any, str]]]], kind: str = "", marked: Iterable[str] = ()
) -> str:
    """A row for each title, a column for each name; cells are (value, what to say if it is None)."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    body = ""
    for title, cells in rows:
        columns = "".join(
            f'<td class="missing">{_text(why)}</td>' if value is None else f"<td>{_text(value)}</td>"
            for value, why in cells
        )
        body += f'<tr{" class=differs" if title in marked else ""}><th scope="row">{_text(title)}</th>{columns}</tr>'
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )

"""The page of a report: what stands in each section, and the numbers that its script draws.

    history.Run ─ a section each ─ the places of page.html ─ one file

Everything that comes from a file is escaped.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

from deco_jax.config import flatten
from deco_jax.evaluation import ADM_TITLES, titles_of
from deco_jax.report.history import Run, finite
from deco_jax.report.pieces import button, image, missing, note_list, swatch, table, text

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
# Metrics that have a place of their own; every other is drawn among the losses.
ELSEWHERE = (
    "step",
    "fid",
    "images_per_second",
    "peak_memory_gib",
    "unreadable_images",
    "goodput",
    "save_blocked_seconds",
)
GREY = 7  # among the colours of page.html
# Of the spectra's curves that no model drew: the dash and the width of each.
STYLES: dict[str, tuple[str, float]] = {"data": ("", 3), "Y": ("2 4", 1.75), "Cb": ("9 4 2 4", 1.75)}


def page(runs: list[Run]) -> str:
    """Fill the template with everything that is known of the runs."""
    title = "Run report: " + ", ".join(run.name for run in runs)
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts = {
        "TITLE": text(title),
        "SUBTITLE": text(" · ".join(str(run.folder.absolute()) for run in runs)),
        "RUNS": "".join(button(i, run) for i, run in enumerate(runs)),
        "SUMMARY": _summary(runs),
        "LOSS_NOTES": _loss_notes(runs),
        "FID": _scores(runs),
        "SAMPLES": _samples(runs),
        "SPECTRA": _spectra(runs),
        "SPEED": _speed(runs),
        "CONFIG": _config(runs),
        "FOOTER": text(f"Written by deco_jax, --mode=report, {now}. Nothing on this page is loaded from elsewhere."),
        "DATA": json.dumps(_data(runs), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: what is put in is not looked at again.
    return re.sub(r"<!--([A-Z_]+)-->", lambda match: parts[match[1]], TEMPLATE.read_text())


def _data(runs: list[Run]) -> dict[str, Any]:
    """Gather the numbers that the script draws."""
    names: dict[str, None] = {"loss": None}
    for run in runs:
        names |= dict.fromkeys(sorted(run.metrics, key=lambda name: (name == "gradient_norm", name)))
    losses = [
        n for n in names if n not in ELSEWHERE and not n.startswith("time_") and any(run.known(n) for run in runs)
    ]
    if "gradient_norm" in losses:  # the parts of the loss stand together
        losses = [name for name in losses if name != "gradient_norm"] + ["gradient_norm"]
    return {
        "runs": [
            {
                "name": run.name,
                "steps": run.steps,
                "metrics": run.metrics,
                "batch_size": size if finite(size := run.setting("data.batch_size")) else None,
            }
            for run in runs
        ],
        "losses": losses,
        "memory": any(run.known("peak_memory_gib") for run in runs),
        "sample_steps": sorted({step for run in runs for step in run.grids}),
        "spectra": _plots(runs),
    }


def _plots(runs: list[Run]) -> list[dict[str, Any]]:
    """Put the spectra of all runs into one pair of plots; data and weights that are equal are drawn once."""
    plots: dict[str, list[dict[str, Any]]] = {}
    with_spectra = [(i, run) for i, run in enumerate(runs) if run.spectrum]
    several = any(sum(kind == "model" for _, kind, _ in run.spectrum[0][1]) > 1 for _, run in with_spectra)  # type: ignore[index]
    for i, run in with_spectra:
        for title, curves in run.spectrum or ():
            plot = plots.setdefault(title, [])
            for name, kind, values in curves:
                if kind == "model":
                    models = sum(c["run"] is not None for c in plot)
                    curve: dict[str, Any] = {"colour": models if several else i, "run": i}
                elif any(c["run"] is None and c["values"] == values for c in plot):
                    continue
                else:
                    if any(c["run"] is None and c["name"] == name for c in plot):
                        name = f"{name} of {run.name}"
                    dash, width = STYLES[kind]
                    curve = {"colour": None if kind == "data" else GREY, "dash": dash, "width": width, "run": None}
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
    return table([run.name for run in runs], cells) + note_list(notes)


def _median(run: Run, metric: str) -> str | None:
    known = [value for _, value in run.known(metric)]
    return f"{statistics.median(known):.4g}" if known else None


def _loss_notes(runs: list[Run]) -> str:
    return note_list(
        f"{run.name}: {run.not_finite:,} logged value{'s are' if run.not_finite > 1 else ' is'} not finite; "
        "the curves have gaps there"
        for run in runs
        if run.not_finite
    )


def _score(evaluation: dict[str, Any], name: str) -> str | None:
    value = evaluation.get(name)
    return f"{value:.4g}" if finite(value) else None


def _scores(runs: list[Run]) -> str:
    lines = ['<div class="charts" data-charts="fid"></div>'] if any(run.known("fid") for run in runs) else []
    lines += [
        missing(run, "no FID was measured while training (config.evaluate.every is 0 unless asked for)", runs)
        for run in runs
        if not run.known("fid")
    ]
    lines.append("<h3>Evaluation</h3>")
    lines += [
        missing(run, "no evaluation.json that can be read; --mode=evaluate writes it", runs)
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

    def not_drawn(evaluation: dict[str, Any]) -> str:
        return "images that were there already" if "samples" in evaluation else "no images"

    columns = measured.values()
    drawn = ADM_TITLES if any({"samples", *ADM_TITLES} & values.keys() for values in columns) else {}
    rows = [
        (title, [(_score(values, name), reason(values, name)) for values in columns])
        for name, title in titles_of([*drawn, *(name for values in columns for name in values)]).items()
    ]
    rows += [
        ("samples", [(counted(values, "samples"), "not said") for values in columns]),
        ("reference", [(counted(values, "reference"), "not said") for values in columns]),
        ("sampling", [(sampling(values), not_drawn(values)) for values in columns]),
    ]
    lines.append(table(measured, rows))
    warnings = [(name, values.get("warnings")) for name, values in measured.items()]
    lines.append(note_list(f"{name}: {line}" for name, said in warnings if isinstance(said, list) for line in said))
    return "".join(lines)


def _samples(runs: list[Run]) -> str:
    lines = [
        missing(run, "no grids of samples (samples/step_*.png) in this run", runs) for run in runs if not run.grids
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
                image(grid, f"samples of {run.name} at step {step:,}", f' data-step="{step}"', hidden=step != newest)
                for step, grid in run.grids.items()
            )
            caption = f'{swatch(i)}{text(run.name)}, <span class="when">step {newest:,}</span>'
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
    lines.append(note_list(notes))
    sampled = [(i, run) for i, run in enumerate(runs) if run.sampled]
    if sampled:
        lines.append("<h3>Drawn by --mode=sample</h3>")
        figures = [
            f'<figure data-pictures="{i}"><figcaption>{swatch(i)}{text(run.name)}</figcaption>'
            f"{image(run.sampled, f'samples/grid.png of {run.name}')}</figure>"
            for i, run in sampled
            if run.sampled
        ]
        lines.append(f'<div class="pictures">{"".join(figures)}</div>')
    return "".join(lines)


def _spectra(runs: list[Run]) -> str:
    lines = [
        missing(run, "no spectrum was measured; --mode=spectrum does it", runs)
        for run in runs
        if not run.spectrum and not run.spectrum_picture
    ]
    if any(run.spectrum for run in runs):
        lines.append('<div class="charts" data-charts="spectra"></div>')
    figures = [
        f'<figure data-pictures="{i}"><figcaption>{swatch(i)}{text(run.name)}</figcaption>'
        f"{image(run.spectrum_picture, f'spectrum.png of {run.name}')}</figure>"
        for i, run in enumerate(runs)
        if run.spectrum_picture
    ]
    return "".join([*lines, f'<div class="pictures">{"".join(figures)}</div>' if figures else ""])


def _speed(runs: list[Run]) -> str:
    def seconds(run: Run) -> str | None:
        batch = run.setting("data.batch_size")
        known = [value for _, value in run.known("images_per_second") if value > 0]
        return f"{batch / statistics.median(known):.4g}" if known and finite(batch) else None

    def memory(run: Run) -> str | None:
        known = [value for _, value in run.known("peak_memory_gib")]
        return f"{max(known):.3g} GiB" if known else None

    def unreadable(run: Run) -> str | None:
        known = run.known("unreadable_images")
        return f"{known[-1][1]:,.0f}" if known else None

    rows: list[tuple[str, Callable[[Run], str | None], str]] = [
        ("images per second, median", lambda run: _median(run, "images_per_second"), "not logged"),
        ("seconds per step, median", seconds, "not known"),
        ("peak memory per device", memory, "not reported by the device"),
        ("unreadable images", unreadable, "not logged"),
    ]
    cells = [(title, [(value(run), why) for run in runs]) for title, value, why in rows]
    return "<br>" + table([run.name for run in runs], cells)


def _config(runs: list[Run]) -> str:
    lines = [missing(run, "no config.json that can be read", runs) for run in runs if run.config is None]
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
            table(names, [(key, rows[key]) for key in rows if key in differ], "config")
            if differ
            else '<p class="missing">The settings are the same.</p>'
        )
    whole = table(names, list(rows.items()), "config", differ if len(with_config) > 1 else ())
    lines.append(f"<details><summary>All {len(rows)} settings, as they were resolved</summary>{whole}</details>")
    return "".join(lines)

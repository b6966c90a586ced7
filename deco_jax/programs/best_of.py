"""Searches the best way to sample from a checkpoint: averages × guidance × interval × steps, with fewer samples each.

Authors do this before they report a score. Every combination is measured with config.evaluate.search_images samples,
against a reference that is measured once; --mode=evaluate then measures the best with config.sample.num_images. Rows
are written as they are measured, so an interrupted search continues with the combination it was at.

Writes WORKDIR/best_of.json, best_of.md (the table) and best_of.png.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections

from deco_jax import api
from deco_jax import config as config_lib
from deco_jax.config import to_json
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES, lpips, titles_of
from deco_jax.evaluation.evaluator import Evaluator, Scores, metric_names
from deco_jax.report import style
from deco_jax.run import checkpoint, distributed, files, storage
from deco_jax.run.writer import write_atomically, write_json
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling

Row = dict[str, Any]
NAME = "best_of"
# Setting of config.evaluate → the setting of config.sample that takes its values.
VARIED = {
    "averages": "average",
    "guidances": "guidance",
    "guidance_intervals": "guidance_interval",
    "steps": "num_steps",
}


def wanted(config: ml_collections.ConfigDict) -> bool:
    """Return whether there is anything to search."""
    return any(config.evaluate[name] for name in VARIED)


def check(config: ml_collections.ConfigDict, model: api.Model | None, evaluators: Sequence[Evaluator]) -> None:
    """Raise UserError if the search can't run to its end.

    There may be no model, an average that it lacks, a score that isn't measured, or a combination that can't be drawn.
    """
    if model is None:
        raise UserError(
            "config.evaluate.samples names existing images, so there is no choice of how to draw them; leave it or "
            f"{', '.join(f'config.evaluate.{name}' for name in VARIED)} empty"
        )
    there = checkpoint.average_names(storage.path(model.name))
    for average in _averages(config):
        if average not in there:
            raise UserError(
                f"config.evaluate.averages: {model.name} has no average {average!r}; it has {', '.join(there)}"
            )
    for candidate in candidates(config):
        config_lib.check(candidate)
        Sampling.of(candidate).table()
    by = config.evaluate.best_by
    if not any(by in evaluator.titles for evaluator in evaluators):
        raise UserError(
            f"config.evaluate.best_by={by} is not measured by config.evaluate.metrics={config.evaluate.metrics}; "
            "add the metric that has it"
        )
    if config.sample.num_images < config.evaluate.search_images:
        raise UserError(
            f"config.sample.num_images={config.sample.num_images} is less than config.evaluate.search_images="
            f"{config.evaluate.search_images}, but the best settings are measured with the former; make it larger"
        )


def candidates(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """Return a config for each combination, averages outermost; without guidance, the interval doesn't matter."""
    values = {name: config.evaluate[name] or (config.sample[setting],) for name, setting in VARIED.items()}
    values["averages"] = _averages(config)
    found, seen = [], set()
    for combination in itertools.product(*values.values()):
        average, guidance, interval, steps = combination
        same = (average, guidance, None if guidance == 1 else tuple(interval), steps)
        if same in seen:
            continue
        seen.add(same)
        candidate = config.copy_and_resolve_references()
        candidate.sample.average, candidate.sample.guidance = average, float(guidance)
        candidate.sample.guidance_interval, candidate.sample.num_steps = tuple(map(float, interval)), steps
        found.append(candidate)
    return found


def _averages(config: ml_collections.ConfigDict) -> list[str]:
    names = [name for entry in config.evaluate.averages for name in entry.split(",")]
    return list(dict.fromkeys(names)) or [config.sample.average]


def search(
    config: ml_collections.ConfigDict,
    model: api.Model,
    folder: pathlib.Path,
    scores_of: Callable[[api.Model, ml_collections.ConfigDict], Scores],
    measured_with: str = "",
) -> tuple[ml_collections.ConfigDict, api.Model]:
    """Score all combinations; return the settings of the best, and the model with its average.

    Args:
        model: with any average of the weights.
        scores_of: (model, settings) → scores of samples drawn that way.
        measured_with: names the reference and the weights that scores depend on, besides the settings.
    """
    by, path = config.evaluate.best_by, folder / f"{NAME}.json"
    known = {row["key"]: row for row in _read(path)}
    tried, rows = candidates(config), []
    for number, candidate in enumerate(tried, start=1):
        small = candidate.copy_and_resolve_references()
        small.sample.num_images = config.evaluate.search_images
        row = _described(small, _key(small, model.name, measured_with))
        if distributed.from_main_host(row["key"] in known):
            row = known.get(row["key"], row)
        else:
            model = _with_average(model, small)
            scores = scores_of(model, small)
            row |= {"scores": scores.values, "missing": scores.missing}
        rows.append(row)
        if by not in row["scores"]:
            raise UserError(
                f"config.evaluate.best_by={by} can't be measured ({row['missing'].get(by, 'no evaluator has it')}); "
                "choose another score"
            )
        if jax.process_index() == 0:
            score = row["scores"][by]
            print(f"{number} of {len(tried)}: {_named(row)}: {TITLES[by]} {score:.4g}", flush=True)
            # Rows of earlier searches that this one hasn't come to yet, or won't, aren't lost.
            keys = {row["key"] for row in rows}
            others = [row for row in known.values() if row["key"] not in keys]
            _write(folder, {"best_by": by, "rows": rows, "others": others})
    best = distributed.from_main_host(
        min(range(len(rows)), key=lambda i: rows[i]["scores"][by]) if jax.process_index() == 0 else 0
    )
    if jax.process_index() == 0:
        print(f"best: {_named(rows[best])}; now measuring it with {config.sample.num_images:,} samples", flush=True)
        _write(folder, {"best_by": by, "rows": rows, "others": others, "best": rows[best]["key"]})
    return tried[best], _with_average(model, tried[best])


def _with_average(model: api.Model, config: ml_collections.ConfigDict) -> api.Model:
    """Return the model with the average that config.sample names; compiled programs serve both models."""
    if config.sample.average == model.config.sample.average:
        return model
    where = storage.path(model.name)
    params = checkpoint.load_average(where, model.denoiser.network.shapes, config, model.mesh, config.sample.average)
    other = api.Model(config, params, model.mesh, model.name, model.condition, model.class_names, model.denoiser)
    other.generator = model.generator
    other.share_inputs(model)
    return other


def _key(config: ml_collections.ConfigDict, name: str, measured_with: str) -> str:
    """Return a digest of everything that a score depends on: how samples are drawn and how they are measured."""
    varied = (*VARIED, "search_images", "best_by", "save_every", "cache", "batch_size", "every")
    values = to_json(config)
    measured = {name: value for name, value in values["evaluate"].items() if name not in varied}
    drawn = generate.fingerprint(config, name)
    if "lpips" in metric_names(config):
        measured |= {"lpips": values["lpips"], "version": lpips.VERSION}
    everything = [drawn, measured, values["data"], values["text"], measured_with]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def _described(config: ml_collections.ConfigDict, key: str) -> Row:
    sample = config.sample
    return {
        "key": key,
        "average": sample.average,
        "guidance": sample.guidance,
        "interval": list(sample.guidance_interval),
        "steps": sample.num_steps,
        "images": sample.num_images,
    }


def _named(row: Row) -> str:
    guided = "" if row["guidance"] == 1 else " in ({:g}, {:g}]".format(*row["interval"])
    return f"{row['average']}, guidance {row['guidance']:g}{guided}, {row['steps']} steps"


# ---------------------------------------------------------------------------------------- files


def _read(path: pathlib.Path) -> list[Row]:
    """Return the rows of earlier searches; their keys say what each one measured."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        return [row for row in [*found["rows"], *found.get("others", [])] if {"key", "scores"} <= row.keys()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove it to search again") from error


def _write(folder: pathlib.Path, result: dict[str, Any]) -> None:
    write_json(folder / f"{NAME}.json", result)
    write_atomically(folder / f"{NAME}.md", table(result).encode())
    draw(result, folder / f"{NAME}.png")


def finish(folder: pathlib.Path, evaluation: dict[str, Any]) -> None:
    """Add the full evaluation of the best combination to the table."""
    result = json.loads((folder / f"{NAME}.json").read_text())
    result["evaluation"] = {name: evaluation[name] for name in titles_of(evaluation)}
    result["evaluation"]["images"] = evaluation["samples"]["images"]
    _write(folder, result)
    print(f"wrote {', '.join(str(folder / f'{NAME}.{end}') for end in ('json', 'md', 'png'))}")


def table(result: dict[str, Any]) -> str:
    """Return all rows as a Markdown table, the best first, followed by the best one's full scores."""
    by, rows = result["best_by"], result["rows"]
    names = titles_of(name for row in rows for name in row["scores"])
    lines = [_line(["average", "guidance", "interval", "steps", *names.values()])]
    lines.append(_line(["---"] * (4 + len(names))))
    for row in sorted(rows, key=lambda row: row["scores"][by]):
        interval = "" if row["guidance"] == 1 else "({:g}, {:g}]".format(*row["interval"])
        scores = [f"{row['scores'][name]:.4f}" if name in row["scores"] else "" for name in names]
        lines.append(_line([row["average"], f"{row['guidance']:g}", interval, str(row["steps"]), *scores]))
    lines += ["", f"{rows[0]['images']:,} samples each."]
    if "evaluation" in result:
        full = result["evaluation"]
        scores = [f"{title} {full[name]:.4f}" for name, title in names.items() if full.get(name) is not None]
        best = next(row for row in rows if row["key"] == result["best"])
        lines += ["", f"{_named(best)}, {full['images']:,} samples: {', '.join(scores)}."]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(result: dict[str, Any], where: pathlib.Path) -> None:
    """Plot the score over guidance, and against recall if that is measured."""
    from matplotlib.figure import Figure

    by, rows = result["best_by"], result["rows"]
    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["average"], row["steps"], *row["interval"]), []).append(row)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, ((average, steps, low, high), found) in enumerate(curves.items()):
        found = sorted(found, key=lambda row: row["guidance"])
        label = f"{average}, ({low:g}, {high:g}], {steps} steps"
        options = style.curve(i, markers=True)
        left.plot([row["guidance"] for row in found], [row["scores"][by] for row in found], label=label, **options)
        recalled = [row for row in found if "recall" in row["scores"]]
        points = [[row["scores"][name] for row in recalled] for name in ("recall", by)]
        right.plot(*points, label=label, **options)
    left.set(xlabel="guidance", ylabel=TITLES[by])
    right.set(xlabel="recall", ylabel=TITLES[by])
    if not any("recall" in row["scores"] for row in rows):
        right.set_title("recall is not measured", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    with files.whole(where) as part:
        figure.savefig(part, dpi=150, format="png")

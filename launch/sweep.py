"""Starts runs that differ in a few settings, one after another or as a SLURM array; puts their last metrics in a table.

    python launch/sweep.py --config=configs/cifar10.py --workdir=runs/sweep \\
        --grid optimizer.learning_rate=1e-4,2e-4 --grid seed=0,1 [-- --config.train.num_steps=50000]

    --variants A,B     variants of the config, as in configs/ablation.py:A
    --grid KEY=A,B     combine each value with those of the other grids; commas within brackets don't split
    --list FILE        one run per line, as KEY=VALUE words; with --grid: combine each line with the grid
    --modes A,B        what to do with each run, in order; default: train. train,evaluate also measures it
    --measure KEY=A,B  run the modes after training with each value, such as sample.guidance=1.0,1.5: one training,
                       one row per value
    --plot KEY         also plot a logged value, such as fid, over the steps, one line per run: WORKDIR/KEY.png
    --sort KEY         column to sort the table by, ascending; default: loss. --descending reverses the order
    --slurm            submit as an array, one task per run; options such as --sbatch=--gpus=1 are passed on
    --gather           only write the table; --dry-run: print what would run

A run's folder is WORKDIR/NAME, where NAME consists of its settings; each value of --measure has a folder inside it.
Runs that have reached their last step are skipped, and interrupted ones continue. Measurements are only repeated after
more training or with other overrides. A folder that holds a run with other settings is an error. The table is
WORKDIR/sweep.md and sweep.json. It shows the paper's figures for a variant beside ours if the config file lists them as
PAPER. With --config.train.wandb=PROJECT after the --, it is also a table at Weights & Biases, where the runs form a
group with WORKDIR's name. The exit status is 1 if a run failed or ended before its last step.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that isn't installed

from deco_jax import config_files, interrupts  # noqa: E402
from deco_jax.errors import UserError  # noqa: E402
from deco_jax.report import curves  # noqa: E402
from deco_jax.run import files, storage, tracking  # noqa: E402
from deco_jax.run.metrics import read_rows  # noqa: E402
from launch.slurm_array import array_script  # noqa: E402

METRICS = "metrics.jsonl"
# Settings after the -- that a trained run can't have got since.
TRAINED = ("seed", "path.", "loss.", "optimizer.", "lora.", "data.batch_size", "model.prediction", "model.dropout")
# Modes that a sweep can run, and the file that each writes in the workdir when it is done.
MODES = {"train": "", "sample": "samples/grid.png", "evaluate": "evaluation.json", "spectrum": "spectrum.json"}
VARIANT = "variant"


class Run(NamedTuple):
    """One run: its overrides by key, without the leading "config."; the key VARIANT has the config's variant."""

    settings: dict[str, str]
    folder: pathlib.Path
    trained: pathlib.Path | None = None  # the run whose newest checkpoint is measured here; None: its own

    def command(self, config: str, mode: str, more: list[str]) -> list[str]:
        overrides = [f"--config.{key}={value}" for key, value in self.settings.items() if key != VARIANT]
        if VARIANT in self.settings:
            config = f"{config}:{self.settings[VARIANT]}"
        checkpoint = [f"--checkpoint={self.trained}"] if self.trained else []
        return [
            os.environ.get("PYTHON", sys.executable),
            "-m",
            "deco_jax.main",
            f"--config={config}",
            f"--workdir={self.folder}",
            f"--mode={mode}",
            *checkpoint,
            *more,
            *overrides,
        ]


def split_values(text: str) -> list[str]:
    """Split comma-separated values; commas within brackets belong to a value."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--").removeprefix("config.").partition("=")
    if not key or not equals or not value:
        raise SystemExit(f"error: {text!r} is not KEY=VALUE")
    return key, value


def name_of(settings: dict[str, str]) -> str:
    """Name a folder after settings, without commas: settings that list workdirs separate them by commas."""
    name = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    return re.sub(r"[^\w=.+-]", "_", name)


def grid_axes(grids: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Turn each KEY=A,B into its (key, value) pairs."""
    return [[(key, value) for value in split_values(values)] for key, values in map(setting, grids)]


def folders(points: Iterable[dict[str, str]], parent: pathlib.Path) -> dict[pathlib.Path, dict[str, str]]:
    """Assign a folder to each distinct set of settings, named after them, in order."""
    found: dict[pathlib.Path, dict[str, str]] = {}
    for settings in points:
        folder = parent / (name_of(settings) or "run")
        while folder in found and found[folder] != settings:  # values that only differ in a replaced character
            folder = folder.with_name(f"{folder.name}+")
        found.setdefault(folder, settings)
    return found


def measurements(run: Run, grids: Sequence[str]) -> list[Run]:
    """List the measurements of a trained run: every combination of the grids' values; without grids, the run itself."""
    if not grids:
        return [run]
    points = folders(map(dict, itertools.product(*grid_axes(grids))), run.folder)
    return [Run(run.settings | settings, folder, run.folder) for folder, settings in points.items()]


def plan(workdir: pathlib.Path, grids: list[str], lines: list[str], variants: list[str] | None = None) -> list[Run]:
    """List all runs, in order; two with the same settings are one."""
    variant_axis = [[(VARIANT, name) for name in variants]] if variants else []
    points = [dict(point) for point in itertools.product(*variant_axis, *grid_axes(grids))]
    rows = [dict(map(setting, shlex.split(line, comments=True))) for line in lines]
    rows = [row for row in rows if row] or [{}]
    settings_of_all = (row | point for row, point in itertools.product(rows, points))
    return [Run(settings, folder) for folder, settings in folders(settings_of_all, workdir).items()]


def last_metrics(run: Run) -> dict[str, Any]:
    """Gather a run's last logged line, its evaluation and its hours of training; {} if there is nothing yet.

    The hours only include the steps, not compiling, sampling and measuring; they are summed from the logged speeds.
    """
    rows, _ = read_rows((run.trained or run.folder) / METRICS)
    metrics = dict(rows[-1]) if rows else {}
    if "fid" in metrics:  # it is from a few samples during training and must not be sorted with evaluations
        metrics["quick_fid"] = metrics.pop("fid")
    config = (run.trained or run.folder) / "config.json"
    if rows and config.exists() and all("images_per_second" in row for row in rows):
        batch_size = json.loads(config.read_text())["data"]["batch_size"]
        steps = itertools.pairwise([0, *(row["step"] for row in rows)])
        seconds = [
            (end - start) * batch_size / row["images_per_second"] for (start, end), row in zip(steps, rows, strict=True)
        ]
        metrics["hours"] = sum(seconds) / 3600
    evaluation = run.folder / "evaluation.json"
    values = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    measured = str((values.get("samples") or values.get("weights") or {}).get("from", ""))
    step = re.search(r"/checkpoints/(\d+)$", measured)
    if step is None or int(step[1]) >= metrics.get("step", 0):  # not one from before the run was trained on
        metrics |= {key: value for key, value in values.items() if isinstance(value, int | float)}
    return metrics


def overrides(words: Sequence[str]) -> dict[str, str]:
    """Parse command-line words --config.KEY=VALUE or --config.KEY VALUE into {key: value}."""
    found: dict[str, str] = {}
    for word, following in itertools.pairwise([*words, ""]):
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            found[key] = value if equals else following
    return found


def equal(text: str, value: Any) -> bool:
    """Return whether an override's text means a value of config.json."""
    try:
        read = json.loads(json.dumps(ast.literal_eval(text)))  # tuples are lists there
    except (ValueError, SyntaxError):
        read = {"true": True, "false": False}.get(text, text)
    return value in (read, text) or value == [read, read]  # one side means both of data.image_size


def check_settings(run: Run, settings: dict[str, str]) -> None:
    """Raise SystemExit if the folder holds a run with others; names leave out sections, so sweeps can clash."""
    path = run.folder / "config.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for key, text in settings.items():
        value: Any = stored
        for part in key.split("."):
            value = value.get(part, text) if isinstance(value, dict) else text
        if key != VARIANT and not equal(text, value):
            raise SystemExit(f"error: {run.folder} holds a run with {key}={value}, not {text}; give another --workdir")


def measured_with(run: Run, mode: str) -> pathlib.Path:
    """Return the file in which a sweep records the overrides of a mode."""
    return run.folder / f"sweep_{mode}.json"


def is_done(run: Run, mode: str = "train", more: Sequence[str] = ()) -> bool:
    """Return whether a run has saved its last step; or, for other modes, written its file since it was trained.

    Args:
        more: overrides of all runs, which may ask for more steps than the run had, or for another measurement.
    """
    config, metrics = run.folder / "config.json", (run.trained or run.folder) / METRICS
    if mode != "train":
        left, note = run.folder / MODES[mode], measured_with(run, mode)
        if not left.exists() or (note.exists() and json.loads(note.read_text()) != overrides(more) | run.settings):
            return False
        return not metrics.exists() or modified(left) >= modified(metrics)
    if not config.exists():
        return False
    try:
        asked = (overrides(more) | run.settings).get("train.num_steps")
        steps = int(asked) if asked else json.loads(config.read_text())["train"]["num_steps"]
    except ValueError:  # the run reports this itself
        return False
    remote = storage.is_remote(run.folder)  # where what is put last makes a checkpoint whole, on a disk its name
    entries = [entry for entry in (run.folder / "checkpoints").glob("*") if entry.name.isdigit()]
    saved = [int(entry.name) for entry in entries if not remote or (entry / "commit_success.txt").exists()]
    return last_metrics(run).get("step", 0) >= steps and max(saved, default=0) >= steps


def modified(path: pathlib.Path) -> float:
    """Return when a file was last written, in seconds."""
    return storage.modified(path) if storage.is_remote(path) else path.stat().st_mtime_ns / 1e9


def papers_figures(config: str) -> dict[str, dict[str, float]]:
    """Return what the paper reports for a config file's variants: {variant: {metric: value}}; {} without any."""
    config_files.make_importable()
    spec = importlib.util.spec_from_file_location("_swept_config", ROOT / config.partition(":")[0])
    if spec is None or spec.loader is None:
        return {}
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception:  # each run reports this itself, in one line
        return {}
    return getattr(module, "PAPER", {})


def gather(
    runs: list[Run],
    workdir: pathlib.Path,
    sort: str,
    descending: bool,
    paper: dict[str, dict[str, float]] | None = None,
    more: Sequence[str] = (),
    measure: Sequence[str] = (),
) -> str:
    """Write sweep.json and sweep.md; return the latter. `paper` is shown beside ours, as "paper's METRIC"."""
    rows = []
    measured = [(run, of_run) for run in runs for of_run in measurements(run, measure)]
    for trained, run in measured:
        theirs = (paper or {}).get(run.settings.get(VARIANT, ""), {})
        beside = {f"paper's {metric}": value for metric, value in theirs.items()}
        name = str(run.folder.relative_to(workdir))
        found = {"done": is_done(trained, more=more), **last_metrics(run), **beside, "run": name}
        rows.append({**run.settings, **found})

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        value = row.get(sort)
        if not isinstance(value, int | float):
            return True, 0.0
        return False, -value if descending else value

    rows.sort(key=rank)
    settings = list(dict.fromkeys(key for _, run in measured for key in run.settings))
    names = list(dict.fromkeys(key for row in rows for key in row if key not in (*settings, "run", "done")))
    ours = [*([sort] if sort in names else []), *(name for name in names if name != sort and "paper's" not in name)]
    compared = [column for name in ours for column in (name, f"paper's {name}") if column in names]
    columns = [*settings, "done", *compared, *(name for name in names if name not in compared)]

    def cell(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    table = "\n".join(lines) + "\n"
    if project := overrides(more).get("train.wandb"):
        with tracking.Tracker(project, workdir, {}, job="sweep") as tracker:
            tracker.table("sweep", columns, [[row.get(column) for column in columns] for row in rows])
    for name, text in (("sweep.json", json.dumps(rows, indent=2) + "\n"), ("sweep.md", table)):
        with files.whole(workdir / name) as part:
            part.write_text(text)
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--list", type=pathlib.Path)
    parser.add_argument("--variants", type=split_values, default=[])
    parser.add_argument("--modes", type=split_values, default=["train"])
    parser.add_argument("--measure", action="append", default=[])
    parser.add_argument("--plot", default="")
    parser.add_argument("--sort", default="loss")
    parser.add_argument("--descending", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--sbatch", action="append", default=[])
    parser.add_argument("--only", type=int)
    parser.add_argument("--gather", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    at = argv.index("--") if "--" in argv else len(argv)
    arguments, more = parser.parse_args(argv[:at]), argv[at + 1 :]
    arguments.list = arguments.list and arguments.list.expanduser()
    if arguments.list and not arguments.list.is_file():
        raise SystemExit(f"error: there is no file {arguments.list} (--list)")
    lines = arguments.list.read_text().splitlines() if arguments.list else []
    if unknown := [mode for mode in arguments.modes if mode not in MODES]:
        raise SystemExit(f"error: a sweep has no mode {unknown[0]!r}; choose from {', '.join(MODES)}")
    if arguments.variants and ":" in arguments.config:
        raise SystemExit(f"error: {arguments.config} already names a variant; leave it out, or --variants")
    # The runs start in this repository, wherever the sweep does.
    try:
        arguments.workdir = storage.absolute(os.path.expanduser(arguments.workdir))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if arguments.slurm and storage.is_remote(arguments.workdir):
        raise SystemExit("error: SLURM can only write its logs to a disk; with --slurm, give a --workdir on one")
    runs = plan(arguments.workdir, arguments.grid, lines, arguments.variants)

    if arguments.slurm:
        again = [os.environ.get("PYTHON", sys.executable), "launch/sweep.py", f"--config={arguments.config}"]
        again += [f"--workdir={arguments.workdir}", *(f"--grid={grid}" for grid in arguments.grid)]
        again += [f"--list={arguments.list.absolute()}"] if arguments.list else []
        again += [f"--variants={','.join(arguments.variants)}"] if arguments.variants else []
        again += [f"--modes={','.join(arguments.modes)}", *(f"--measure={grid}" for grid in arguments.measure)]
        script = array_script(len(runs), arguments.sbatch, arguments.workdir, again, more)
        if arguments.dry_run:
            print(script, end="")
            return 0
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        return subprocess.run(["sbatch"], input=script, text=True).returncode

    os.environ.setdefault("WANDB_RUN_GROUP", arguments.workdir.name)  # the group of the runs at Weights & Biases
    failed = []
    for run in runs:
        check_settings(run, run.settings)
    if arguments.only is not None and arguments.only not in range(len(runs)):
        raise SystemExit(f"error: --only={arguments.only}: the runs are 0 to {len(runs) - 1}")
    chosen = runs if arguments.only is None else [runs[arguments.only]]
    for run in [] if arguments.gather else chosen:
        tasks = [
            (mode, task)
            for mode in arguments.modes
            for task in ([run] if mode == "train" else measurements(run, arguments.measure))
        ]
        for mode, task in tasks:
            name = task.folder.relative_to(arguments.workdir)
            command = task.command(arguments.config, mode, more)
            if is_done(task, mode, more):
                if mode == "train":
                    given = overrides(more).items()
                    check_settings(task, {key: text for key, text in given if key.startswith(TRAINED)})
                print(f"already done: {name}, {mode}", flush=True)
            elif arguments.dry_run:
                print(shlex.join(command))
            else:
                print(f"running {name}, {mode}", flush=True)
                # A stop only ends the sweep when the run has saved.
                # A training that did not reach its last step has nothing to measure yet, whatever its status.
                if interrupts.run(command, ROOT) or (mode == "train" and not is_done(task, mode, more)):
                    failed.append(run.folder.name)
                    break
                if mode != "train":
                    measured_with(task, mode).write_text(json.dumps(overrides(more) | task.settings) + "\n")
    if not arguments.dry_run and arguments.only is None:  # an array's tasks would write over each other
        paper = papers_figures(arguments.config)
        print(
            gather(runs, arguments.workdir, arguments.sort, arguments.descending, paper, more, arguments.measure),
            end="",
        )
        if arguments.plot:
            curves.plot({run.folder.name: run.folder for run in runs}, arguments.workdir, arguments.plot)
    if failed:
        print(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

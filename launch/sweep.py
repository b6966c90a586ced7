"""Many runs that differ in a few settings, one after another or as a SLURM array; their last metrics in one table.

    python launch/sweep.py --config=configs/cifar10.py --workdir=runs/sweep \\
        --grid optimizer.learning_rate=1e-4,2e-4 --grid seed=0,1 [-- --config.train.num_steps=50000]

    --grid KEY=A,B     each value with each of the other grids'; commas within brackets don't split
    --list FILE        a run a line, KEY=VALUE words; with --grid: each line with each of the grid
    --sort KEY         the table's column to sort by, ascending; loss if not said. --descending turns it round
    --slurm            submit as an array, a run a task; --sbatch=--gpus=1 and the like are passed on
    --gather           only write the table; --dry-run: print what would run

A run lies in WORKDIR/NAME, its name made of its settings. One that has reached its last step is skipped, one that was
cut off goes on. The table: WORKDIR/sweep.md and sweep.json. Exit status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """One run: its overrides by key, without the leading "config."."""

    settings: dict[str, str]
    folder: pathlib.Path

    def command(self, config: str, more: list[str]) -> list[str]:
        overrides = [f"--config.{key}={value}" for key, value in self.settings.items()]
        return [
            os.environ.get("PYTHON", sys.executable), "-m", "deco_jax.main", f"--config={config}",
            f"--workdir={self.folder}", *more, *overrides,
        ]  # fmt: skip


def split_values(text: str) -> list[str]:
    """Comma-separated values; commas within brackets belong to a value."""
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


def plan(workdir: pathlib.Path, grids: list[str], lines: list[str]) -> list[Run]:
    """All runs, in order; two with the same settings are one."""
    axes = [[(key, value) for value in split_values(values)] for key, values in map(setting, grids)]
    rows = [dict(map(setting, shlex.split(line, comments=True))) for line in lines]
    rows = [row for row in rows if row] or [{}]
    runs: dict[str, Run] = {}
    for row, point in itertools.product(rows, itertools.product(*axes)):
        settings = row | dict(point)
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()) or "run"
        name = re.sub(r"[^\w=,.+-]", "_", name)
        while name in runs and runs[name].settings != settings:  # values that differ in a replaced letter only
            name += "+"
        runs.setdefault(name, Run(settings, workdir / name))
    return list(runs.values())


def last_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """The last logged line of a run, and its evaluation if it has one; {} if there is nothing yet."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a kill cut the last line short
            continue
    metrics = dict(rows[-1]) if rows else {}
    evaluation = folder / "evaluation.json"
    if evaluation.exists():
        values = json.loads(evaluation.read_text())
        metrics |= {key: value for key, value in values.items() if isinstance(value, int | float)}
    return metrics


def is_done(run: Run) -> bool:
    """Whether a run has logged and saved the last step of the config that it was started with."""
    config = run.folder / "config.json"
    if not config.exists():
        return False
    steps = json.loads(config.read_text())["train"]["num_steps"]
    return last_metrics(run.folder).get("step", 0) >= steps and (run.folder / "checkpoints" / str(steps)).is_dir()


def gather(runs: list[Run], workdir: pathlib.Path, sort: str, descending: bool) -> str:
    """Write sweep.json and sweep.md; return the latter."""
    rows = [{**run.settings, "done": is_done(run), **last_metrics(run.folder), "run": run.folder.name} for run in runs]

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        value = row.get(sort)
        if not isinstance(value, int | float):
            return True, 0.0
        return False, -value if descending else value

    rows.sort(key=rank)
    settings = list(dict.fromkeys(key for run in runs for key in run.settings))
    names = list(dict.fromkeys(key for row in rows for key in row if key not in (*settings, "run", "done")))
    columns = [*settings, "done", *([sort] if sort in names else []), *(name for name in names if name != sort)]

    def cell(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    table = "\n".join(lines) + "\n"
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n")
    (workdir / "sweep.md").write_text(table)
    return table


def array_script(count: int, options: list[str], workdir: pathlib.Path, command: list[str], more: list[str]) -> str:
    """A SLURM batch script whose task i does run i of a sweep's command."""
    after = f" -- {shlex.join(more)}" if more else ""
    lines = [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=sweep",
        f"#SBATCH --array=0-{count - 1}",
        f"#SBATCH --output={workdir.absolute()}/slurm-%A_%a.log",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(str(ROOT))}",
        f'exec {shlex.join(command)} --only="$SLURM_ARRAY_TASK_ID"{after}',
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--list", type=pathlib.Path)
    parser.add_argument("--sort", default="loss")
    parser.add_argument("--descending", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--sbatch", action="append", default=[])
    parser.add_argument("--only", type=int)
    parser.add_argument("--gather", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    at = argv.index("--") if "--" in argv else len(argv)
    arguments, more = parser.parse_args(argv[:at]), argv[at + 1 :]
    if arguments.list and not arguments.list.is_file():
        raise SystemExit(f"error: there is no list {arguments.list}")
    lines = arguments.list.read_text().splitlines() if arguments.list else []
    runs = plan(arguments.workdir, arguments.grid, lines)

    if arguments.slurm:
        again = [os.environ.get("PYTHON", sys.executable), "launch/sweep.py", f"--config={arguments.config}"]
        again += [f"--workdir={arguments.workdir.absolute()}", *(f"--grid={grid}" for grid in arguments.grid)]
        again += [f"--list={arguments.list.absolute()}"] if arguments.list else []
        script = array_script(len(runs), arguments.sbatch, arguments.workdir, again, more)
        if arguments.dry_run:
            print(script, end="")
            return 0
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        return subprocess.run(["sbatch"], input=script, text=True).returncode

    failed = []
    chosen = runs if arguments.only is None else runs[arguments.only : arguments.only + 1]
    for run in [] if arguments.gather else chosen:
        command = run.command(arguments.config, more)
        if is_done(run):
            print(f"done already: {run.folder.name}", flush=True)
        elif arguments.dry_run:
            print(shlex.join(command))
        else:
            print(f"running {run.folder.name}", flush=True)
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(run.folder.name)
    if not arguments.dry_run and arguments.only is None:  # an array's tasks would write over each other
        print(gather(runs, arguments.workdir, arguments.sort, arguments.descending), end="")
    if failed:
        print(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The SLURM batch script of a sweep (launch/sweep.py --slurm): an array with a task for each run."""

from __future__ import annotations

import pathlib
import shlex

ROOT = pathlib.Path(__file__).resolve().parent.parent


def array_script(count: int, options: list[str], workdir: pathlib.Path, command: list[str], more: list[str]) -> str:
    """Write a SLURM batch script whose task i does run i of a sweep's command."""
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

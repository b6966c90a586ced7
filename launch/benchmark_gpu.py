"""Measures a GPU machine, the most important figures first; `launch/benchmark_gpu.sh` starts it.

Each row runs `--mode=benchmark` in its own process, so running out of memory is a row and not the end. benchmark.json
is rewritten after every row; rows that are finished there aren't measured again. Rows that don't fit in the time are
named. Only this repository is read: images are enlarged digits, and weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The paper's figures (arXiv 2511.19365): a training step of L on 8 H800 at batch 256, which is 32 on each; one image
# of XL with 100 steps on an A800.
PUBLISHED = {"L, batch 32": 0.19, "XL, sampling": 1.05}


class Row(NamedTuple):
    """Something to measure."""

    name: str
    variant: str  # of configs/imagenet256.py
    parts: str  # of config.benchmark.parts
    settings: dict[str, Any]


def rows() -> list[Row]:
    """Return the rows to measure, the most valuable ones first."""

    def step(variant: str, batch: int, note: str = "", **settings: Any) -> Row:
        return Row(f"{variant}, batch {batch}{note}", variant, "train", {"data.batch_size": batch, **settings})

    teacher = {"loss.repa_weight": 0.0}
    sampling = {"sample.num_steps": 100, "sample.batch_size": 16, "benchmark.repeats": 3}
    return [
        step("L", 32),
        Row("XL, sampling", "XL", "sample", sampling),
        step("XL", 32),
        Row("Inception", "XL", "inception", {"evaluate.batch_size": 128}),
        step("XL", 32, ", xla attention", **{"model.attention": "xla"}),
        step("XL", 32, ", no teacher", **teacher),
        step("XL", 64),
        step("XL", 16),
        Row("XL, forward", "XL", "forward", {"data.batch_size": 32}),
        *(step("XL", 32, f", remat {policy}", **{"model.remat": policy}) for policy in ("full", "dots", "none")),
        step("L", 64),
        step("L", 32, ", no teacher", **teacher),
        step("L", 32, ", xla attention", **{"model.attention": "xla"}),
        step("L", 16),
        *(step("L", 32, f", remat {policy}", **{"model.remat": policy}) for policy in ("full", "dots", "none")),
    ]


def smoke_rows() -> list[Row]:
    """Return rows of the same program at a size for two CPU cores; the last one is meant to fail."""
    return [
        Row("smoke, batch 8", "smoke", "train", {"data.batch_size": 8, "benchmark.repeats": 2}),
        Row("smoke, sampling", "smoke", "sample,inception", {"sample.num_steps": 2, "benchmark.repeats": 2}),
        Row("smoke, cudnn on a CPU", "smoke", "train", {"model.attention": "cudnn", "model.dtype": "bfloat16"}),
    ]


def command(row: Row, folder: pathlib.Path) -> list[str]:
    """Return the command that measures a row."""
    settings = {
        "data.source": "digits",
        "data.path": "",
        "data.num_workers": 0,
        "model.num_classes": 10,  # the digits'; a table of 1,000 labels is a hundredth of a model's weights
        "benchmark.warmup": 2,
        "benchmark.repeats": 10,
        "benchmark.parts": row.parts,
        **row.settings,
    }
    return [
        *(sys.executable, "-m", "deco_jax.main", "--mode=benchmark", f"--workdir={folder}"),
        f"--config=configs/imagenet256.py:{row.variant}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def measure(row: Row, folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Measure a row: "status" (ok, out of memory, failed, out of time), and the figures or the last lines of output."""
    began = time.monotonic()
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"), **os.environ}
    process = subprocess.Popen(
        command(row, folder),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "out of time"
    except BaseException:  # Ctrl-C: a process that is left would keep the GPU
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    else:
        status = "ok" if process.returncode == 0 else "failed"
    if status == "failed" and any(word in output for word in ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY")):
        status = "out of memory"
    found: dict[str, Any] = {"status": status, "command": command(row, folder)[1:]}
    if status == "ok":
        found |= json.loads((folder / "benchmark.json").read_text())
    else:
        found["output"] = output.strip().splitlines()[-5:]
    return found | {"wall_seconds": round(time.monotonic() - began, 1)}


def line(name: str, found: dict[str, Any]) -> list[str]:
    """Return a row of the table, or several if several things were timed."""
    if found["status"] != "ok":
        last = found.get("output") or [""]
        return [f"{name:<32}{found['status']}" + (f": {last[-1][:80]}" if found["status"] == "failed" else "")]
    memory = found.get("peak_memory_bytes") or found.get("train_step_bytes", {}).get("peak")
    lines = []
    for part, values in found["rows"].items():
        if part in ("import", "build", "compile", "first step", "its frozen part"):
            continue
        median = values["seconds"]["median"]
        cells = [
            f"{name:<32}{part:<18}{median:>10.4g}",
            f"{values['images_per_second']:>11.4g}" if "images_per_second" in values else " " * 11,
            f"{values['share_of_peak']:>9.1%}" if "share_of_peak" in values else " " * 9,
            f"{memory / 2**30:>9.2f}" if memory else " " * 9,
            f"  {found.get('remat', '')}, {found.get('attention', '')}" if part == "train step" else "",
        ]
        published = PUBLISHED.get(name) if part in ("train step", "sample one image") else None
        lines.append(
            "".join(cells) + (f"  the paper {published} s, here {median / published:.2f} x" if published else "")
        )
    return lines


HEADER = f"{'':<32}{'':<18}{'seconds':>10}{'images/s':>11}{'of peak':>9}{'GiB':>9}"


def main(arguments: list[str], measure: Callable[..., dict[str, Any]] = measure) -> int:
    parser = argparse.ArgumentParser(prog="launch/benchmark_gpu.sh")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="time limit: no row starts later, and the last one ends"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, for a machine without a GPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "benchmark.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    wanted = smoke_rows() if options.smoke else rows()
    print(HEADER, flush=True)
    missing = []
    for row in wanted:
        before = results.get(row.name, {})
        if before.get("status") not in ("ok", "out of memory"):
            left = end - time.monotonic()
            if left <= 0:
                missing.append(row.name)
                continue
            place = options.folder / "".join(c if c.isalnum() else "_" for c in row.name)
            results[row.name] = measure(row, place, left)
            written = file.with_suffix(".tmp")
            written.write_text(json.dumps(results, indent=1) + "\n")
            written.replace(file)
        print("\n".join(line(row.name, results[row.name])), flush=True)
    table = [HEADER] + [text for row in wanted if row.name in results for text in line(row.name, results[row.name])]
    (options.folder / "benchmark.txt").write_text("\n".join(table) + "\n")
    print(f"wrote {file} and benchmark.txt")
    if missing:
        print(f"not done in {options.minutes:g} minutes: {'; '.join(missing)}; the same command continues with them")
    return 0 if any(results.get(row.name, {}).get("status") == "ok" for row in wanted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

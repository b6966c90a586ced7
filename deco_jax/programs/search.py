"""--mode=compile --search: finds the mesh, rematerialisation, unrolling and batch with the fastest training step.

It varies one setting after the other, always starting from the best so far that fits: the mesh's data × fsdp, then
remat and unroll, then the batch per device, then the remat policies again for that batch. Every row is a compilation.
It is written to WORKDIR/search.jsonl at once, and isn't compiled again when the same command is restarted.

Rows are ranked by XLA's model of the chip, which only covers TPUs; elsewhere by memory.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from deco_jax.config import flatten, to_json
from deco_jax.errors import reason
from deco_jax.models.layers import REMAT_POLICIES
from deco_jax.run import sharding, storage
from deco_jax.run.choices import AUTO, CHEAPEST_FIRST

Row = dict[str, Any]
Report = Callable[[ml_collections.ConfigDict, Mesh], dict[str, Any]]
TRIED = ("mesh.data", "mesh.fsdp", "model.remat", "model.unroll", "data.batch_size")


def search_settings(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    devices: list[jax.Device],
    topology: str,
    compile_report: Report,
) -> None:
    """Print rows as they are compiled, and at the end the table, the fastest that fits first, and its settings.

    Args:
        compile_report: (config, mesh) → the figures of a compiled program.
    """
    file = folder / "search.jsonl"
    key = fingerprint(config, topology)
    rows: dict[str, Row] = {}
    if file.exists():
        text = file.read_text()
        if not text.endswith("\n"):  # interrupted while a line was written
            text = text[: text.rfind("\n") + 1]
            file.write_text(text)
        for line in text.splitlines():
            row = json.loads(line)
            if row["key"] == key:
                rows[row["settings"]] = row
    print(HEADER, flush=True)

    shown: dict[str, Row] = {}  # the rows of this search so far, read or compiled

    def measure(candidates: Iterable[dict[str, Any]]) -> None:
        for values in candidates:
            name = json.dumps(values, sort_keys=True)
            if name in shown:
                continue
            if name not in rows:
                rows[name] = {
                    "key": key,
                    "settings": name,
                    **values,
                    **compiled(config, values, devices, compile_report),
                }
                storage.append(file, json.dumps(rows[name]) + "\n")
            shown[name] = rows[name]
            print(line_of(rows[name]), flush=True)

    settings = flatten(config.to_dict())
    first = {name: settings[name] for name in TRIED}
    inside = len(devices) // config.mesh.slices
    first |= resolved(first, inside)
    if first["model.remat"] == AUTO:
        first["model.remat"] = CHEAPEST_FIRST[-1]  # every policy has its turn
    for stage, count in ((meshes, inside), (policies, inside), (batches, len(devices)), (policies, inside)):
        start = best(shown.values()) or {"batch": first["data.batch_size"], **first}
        measure(stage({name: start[name] for name in TRIED}, count))
    ordered = sorted(shown.values(), key=rank)
    print("\nthe fastest that fits first\n" + HEADER)
    print("\n".join(map(line_of, ordered)))
    winner = best(shown.values())
    if winner is None:
        print("nothing that was tried fits; a larger slice, or a smaller batch")
        raise SystemExit(1)
    print("settings of the first: " + " ".join(f"--config.{name}={winner[name]}" for name in TRIED))
    print(f"wrote {file}", flush=True)


def resolved(values: dict[str, Any], devices: int) -> dict[str, Any]:
    """Return the settings with the mesh's −1 replaced."""
    data, fsdp = values["mesh.data"], values["mesh.fsdp"]
    data, fsdp = (devices // fsdp if data == -1 else data), (devices // data if fsdp == -1 else fsdp)
    return {"mesh.data": data, "mesh.fsdp": fsdp}


def meshes(start: dict[str, Any], devices: int) -> Iterator[dict[str, Any]]:
    """Yield the start itself, then every data × fsdp that uses all devices, the largest fsdp first."""
    yield start
    for data in range(1, devices + 1):
        if devices % data == 0:
            yield start | {"mesh.data": data, "mesh.fsdp": devices // data}


def policies(start: dict[str, Any], _: int) -> Iterator[dict[str, Any]]:
    for remat in REMAT_POLICIES:
        for unroll in (1, 2):
            yield start | {"model.remat": remat, "model.unroll": unroll}


def batches(start: dict[str, Any], devices: int) -> Iterator[dict[str, Any]]:
    """Yield half, twice and four times the batch."""
    for factor in (0.5, 2, 4):
        size = int(start["data.batch_size"] * factor) // devices * devices
        if size and size != start["data.batch_size"]:
            yield start | {"data.batch_size": size}


def with_settings(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Return a copy with some settings replaced, given by dotted keys."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(dict(values))
    return changed


def compiled(
    config: ml_collections.ConfigDict, values: dict[str, Any], devices: list[jax.Device], compile_report: Report
) -> Row:
    """Return the report's figures with some settings replaced, or "error" if the program can't be compiled."""
    tried = with_settings(config, values)
    try:
        report = compile_report(tried, sharding.make_mesh(tried.mesh.data, tried.mesh.fsdp, devices, tried.mesh.slices))
    except Exception as error:  # a combination that fails is a row, not the end of the search
        return {"error": f"{type(error).__name__}: {reason(error, 200)}", "fits": False}
    finally:
        jax.clear_caches()
    estimate = report["estimate"] or {}
    seconds = estimate.get("seconds")
    return {
        "fits": report["fits"],
        "peak": report["bytes"]["peak"],
        "seconds": seconds,
        "images_per_second_per_device": report["batch_per_device"] / seconds if seconds else None,
        "share_of_peak": estimate.get("share_of_peak"),
        "bound": estimate.get("bound"),
        "seconds_to_compile": report["seconds_to_compile"],
    }


def rank(row: Row) -> tuple[bool, float, float]:
    """Return a sort key: what fits comes first, then images per second, then memory."""
    speed, peak = row.get("images_per_second_per_device"), row.get("peak")
    return row["fits"] is False, -(speed or 0.0), float("inf") if peak is None else peak


def best(rows: Iterable[Row]) -> Row | None:
    fitting = [row for row in rows if row["fits"] is not False]
    return min(fitting, key=rank) if fitting else None


def fingerprint(config: ml_collections.ConfigDict, topology: str) -> str:
    """Return a digest of everything else that the rows depend on, including this package's code."""
    values = to_json(config)
    for name in TRIED:
        section, key = name.split(".")
        values[section].pop(key)
    parts = json.dumps([values, topology, version("jax"), version("jaxlib")], sort_keys=True).encode()
    code = b"".join(file.read_bytes() for file in sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")))
    return hashlib.sha256(parts + code).hexdigest()[:16]


HEADER = (
    f"{'data':>5}{'fsdp':>6}  {'remat':<10}{'unroll':>6}{'batch':>8}{'seconds':>10}{'images/s/chip':>15}"
    f"{'of peak':>9}{'GiB':>8}  fits"
)


def line_of(row: Row) -> str:
    """Return a row of the table."""

    def cell(name: str, width: int, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return f"{'-':>{width}}" if value is None else f"{value * scale:>{width}{form}}"

    fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
    return (
        f"{row['mesh.data']:>5}{row['mesh.fsdp']:>6}  {row['model.remat']:<10}{row['model.unroll']:>6}"
        f"{row['data.batch_size']:>8}{cell('seconds', 10, '.4g')}{cell('images_per_second_per_device', 15, '.4g')}"
        f"{cell('share_of_peak', 9, '.1%')}{cell('peak', 8, '.2f', 2**-30)}  {row.get('error') or fits}"
    )

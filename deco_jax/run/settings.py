"""Records a run's settings, and what changes when it resumes.

WORKDIR/config.json holds the settings it was last trained with, and config_history.jsonl has a line for each change:
{"step": 400, "time": "2026-11-25T10:00:00+00:00", "changed": {"optimizer.learning_rate": [0.001, 0.0001]}}.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Collection
from typing import Any

import ml_collections

from deco_jax.config import complete, flatten, saved, to_json
from deco_jax.errors import UserError
from deco_jax.run import storage
from deco_jax.run.metrics import read_rows
from deco_jax.run.writer import write_json

HISTORY = "config_history.jsonl"
# What a resumed run may not change, besides its model, because its images, captions, trained parameters or
# the optimizer's state would differ.
KEPT = (
    *("data.source", "data.split", "data.image_size", "text.encoder", "optimizer.name"),
    *("lora.rank", "lora.alpha", "lora.matrices", "lora.whole"),
)


def changes(folder: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return {dotted name: (value that the run was trained with, value now)} for all settings that differ."""
    before = _saved_values(folder / saved.NAME)
    if before is None:
        return {}
    theirs, ours = flatten(before), flatten(to_json(config))
    return {
        name: (theirs.get(name), ours.get(name)) for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)
    }


def check_kept(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raise UserError if a resumed run would see images or captions of another kind or size.

    The caller makes sure that the run has a checkpoint, which refuses another model by itself.
    """
    changed = changes(folder, config)
    refused = [f"config.{name} was {changed[name][0]} and is {changed[name][1]}" for name in KEPT if name in changed]
    if refused:
        raise UserError(
            f"{folder} was trained with other settings: {'; '.join(refused)}; leave --config out to continue with the "
            "run's own, or give another --workdir with --config.init_from to start from its weights"
        )


def said(changed: dict[str, tuple[Any, Any]]) -> str:
    """Return a line about changes; "" if there are none."""
    if not changed:
        return ""
    listed = ", ".join(f"{name} {_shown(before)} → {_shown(now)}" for name, (before, now) in sorted(changed.items()))
    return f"settings that differ from those so far: {listed}"


def record(folder: pathlib.Path, config: ml_collections.ConfigDict, step: int) -> None:
    """Write config.json before training continues from a step, and add the changes to the history."""
    path = folder / saved.NAME
    changed = changes(folder, config)
    if path.exists() and not changed and _saved_values(path) is not None:
        return
    if changed:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        storage.append(folder / HISTORY, json.dumps({"step": step, "time": now, "changed": changed}) + "\n")
    write_json(path, to_json(config))


def history(folder: pathlib.Path) -> list[tuple[int, list[str]]]:
    """Return the steps from which on settings differed, each with the dotted names of these settings."""
    rows, _ = read_rows(folder / HISTORY)
    return [(row["step"], list(row.get("changed", ()))) for row in rows]


def check_drawn(config: ml_collections.ConfigDict, given: Collection[str], workdir: str, checkpoint: str) -> None:
    """Raise UserError if images would be drawn at another size, or from other noise, only because the config says so.

    Args:
        given: dotted names of the settings given on the command line; what is given there is accepted.
        checkpoint: the one to draw from; "": the workdir's newest.
    """
    place = saved.of_workdir(checkpoint or workdir)
    values = None if place is None else _saved_values(place)
    if values is None:
        return
    for name in ("data.image_size", "path.name", "path.noise_scale"):
        section, key = name.split(".")
        theirs, ours = (_value(settings[section][key]) for settings in (values, config))
        if name not in given and theirs != ours:
            raise UserError(
                f"{checkpoint or workdir} was trained with config.{name}={theirs}, but the config says {ours}; leave "
                f"--config out to draw with the run's own settings, or set it with --config.{name}={theirs}"
            )


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _saved_values(path: pathlib.Path) -> dict[str, Any] | None:
    """Read the settings in a file, under today's names; None if there is no readable file."""
    try:
        values, _ = saved.read(path)
        return complete(values)
    except UserError:
        return None


def _shown(value: Any) -> str:
    return '""' if value == "" else str(value)

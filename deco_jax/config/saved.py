"""Reads the config.json of a run, from any version: `--config=runs/xl/config.json`.

ml_collections gets a config from get_config(VARIANT) of a Python file. This is such a file; the variant is the path.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from deco_jax.config.sections import MODEL, SECTIONS
from deco_jax.config.values import make_config, renamed, unknown
from deco_jax.errors import UserError
from deco_jax.nested import flatten, unflatten
from deco_jax.run import storage

NAME = "config.json"


def get_config(path: str) -> ml_collections.ConfigDict:
    """Return the settings of a saved config, with defaults for those that it lacks and without those no longer known.

    Raises:
        UserError: it isn't a saved config, or has settings of the model that this version doesn't know.
    """
    values, _ = read(path)
    return make_config(known(values, path))


def known(values: Mapping[str, Any], path: str | pathlib.Path) -> dict[str, Any]:
    """Return saved values, under today's names, without those that this version doesn't know.

    Raises:
        UserError: it doesn't know some of the model's.
    """
    extra = unknown(values)
    of_model = [name for name in extra if name.startswith("model.")]
    if of_model:
        raise UserError(
            f"{path} has settings of the model {values['model'].get('name')} that this version doesn't know: "
            f"{', '.join(of_model)}; use the version that wrote it"
        )
    return unflatten({key: value for key, value in flatten(values).items() if not _within(key, extra)})


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a saved config under today's names, and the names that this version doesn't know.

    Raises:
        UserError: it can't be read, or isn't a saved config.
    """
    try:
        values = json.loads(storage.path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a saved config: it isn't JSON ({error})") from error
    sections = [name for name in ("model", *SECTIONS) if isinstance(values, Mapping) and name in values]
    if not sections or not all(isinstance(values[name], Mapping) for name in sections):
        raise UserError(f"{path} is not a run's saved config; a run's workdir has one, {NAME}")
    if values.get("model", {}).get("name", "deco") not in list(MODEL):
        raise UserError(f"{path}: model.name={values['model']['name']!r} is not a model; it has {', '.join(MODEL)}")
    values, _ = renamed(values)
    return values, unknown(values)


def of_workdir(folder: str | pathlib.Path) -> pathlib.Path | None:
    """Return the saved config of a run's workdir, its checkpoints folder, or a checkpoint; None if none exists."""
    folder = storage.path(folder)
    for place in (folder / NAME, folder / "config" / "metadata", folder.parent / NAME):
        if storage.is_file(place) and (place.parent != folder.parent or folder.name == "checkpoints"):
            return place
    return None


def _within(key: str, names: list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)

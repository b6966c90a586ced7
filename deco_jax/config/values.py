"""Makes configs from the schema: with defaults, for another model, or from saved values of any version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from deco_jax.config.sections import COMPUTED, MODEL, SECTIONS, TOP
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.nested import flatten, unflatten
from deco_jax.schema import Setting


def default_config(model: str = "deco") -> ml_collections.ConfigDict:
    """Return a locked config with all defaults: DeCo-XL/16 on ImageNet 256², or another model with its own settings."""
    return make_config({"model": {"name": model}})


def make_config(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Make a locked config from nested plain values; missing ones get their default, and lists become tuples.

    Args:
        values: as `to_json` returns them, complete or not. Unknown settings stay, so that `check` can name them.

    Raises:
        UserError: model.name is not a model.
    """
    config = ml_collections.ConfigDict()
    sections = sections_of(values.get("model", {}).get("name", "deco"))
    _fill(config, TOP, {name: value for name, value in values.items() if name not in sections})
    for name, declared in sections.items():
        config[name] = ml_collections.ConfigDict()
        _fill(config[name], declared, values.get(name, {}))
    config.lock()
    return config


def sections_of(model: str) -> dict[str, dict[str, Setting]]:
    """Return the sections of a config and their settings; "model" has those of the named model."""
    if model not in MODEL:
        raise UserError(f"config.model.name={model!r} is not a model; choose one of {', '.join(MODEL)}")
    return {"model": MODEL[model], **SECTIONS}


def _fill(config: ml_collections.ConfigDict, declared: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    for name, setting in declared.items():
        value = plain(values.get(name, setting.default), setting)
        if len(setting.kinds) > 1 and float not in setting.kinds:
            # The type is object so that the command line accepts both 256 and (256, 384).
            value = ml_collections.FieldReference(value, field_type=object)
        config[name] = value
    for name, value in values.items():
        if name not in declared:
            config[name] = value


def plain(value: Any, setting: Setting) -> Any:
    """Convert a value from JSON or the command line to the type that the setting has everywhere else."""
    if isinstance(value, list):
        value = tuple(value)
    if tuple in setting.kinds and int in setting.kinds and isinstance(value, int) and not isinstance(value, bool):
        return image_sides(value)
    if float in setting.kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def set_model(config: ml_collections.ConfigDict, name: str, **settings: Any) -> None:
    """Change the config's model in place.

    Settings that both models have stay, those that only the new one has get their defaults, and `settings` are set.
    """
    shared = {key: value for key, value in config.model.items() if key in MODEL.get(name, {})}
    made = make_config({"model": {**shared, **settings, "name": name}})
    with config.unlocked():
        config.model = made.model


def settle_image_size(config: ml_collections.ConfigDict) -> None:
    """Make config.data.image_size a pair, in place."""
    config.data.image_size = plain(config.data.image_size, SECTIONS["data"]["image_size"])


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a saved config of any version means, as `to_json` would return them today.

    Missing settings get their defaults, renamed ones their new names, and image sizes become pairs. Settings that this
    version doesn't have stay; `unknown` names them.
    """
    values, _ = renamed(values)
    return to_json(make_config(values))


def renamed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return nested values with renamed settings under their new names, and a line about each of them."""
    flat, notes = flatten(values), []
    for old, (new, setting) in earlier_names().items():
        if old in flat:
            value = flat.pop(old)
            flat.setdefault(new, setting.convert(value))
            notes.append(f"config.{old} is now config.{new}")
    return unflatten(flat), notes


def earlier_names() -> dict[str, tuple[str, Setting]]:
    """Return {dotted name in an earlier version: (dotted name now, setting)}."""
    return {
        setting.was: (f"{section}.{name}" if section else name, setting)
        for section, declared in [("", TOP), *SECTIONS.items(), *(("model", keys) for keys in MODEL.values())]
        for name, setting in declared.items()
        if setting.was
    }


def unknown(values: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of the saved settings that the schema doesn't have."""
    sections = sections_of(values.get("model", {}).get("name", "deco"))
    names = [name for name in values if name not in TOP and name not in sections]
    for section, declared in sections.items():
        names += [f"{section}.{name}" for name in values.get(section, {}) if name not in declared]
    return names


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the resolved config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def model_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two model sections describe different parameters: "key: theirs there, ours here".

    A setting that one of them lacks counts as its default: an older version, which didn't have it yet, wrote it.
    """
    ours, theirs = _with_defaults(ours), _with_defaults(theirs)
    keys = [key for key in {**ours, **theirs} if key not in COMPUTED and ours.get(key) != theirs.get(key)]
    return [f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys]


def _with_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    declared = MODEL.get(str(model.get("name")), {})
    return {**{name: setting.default for name, setting in declared.items()}, **model}

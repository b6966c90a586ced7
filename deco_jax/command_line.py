"""Reads the command line: finds the config, explains what is wrong with a setting, and prints --help.

`main` defines the flags; absl and ml_collections parse them. Where they would raise a traceback, this prints one line.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from absl import flags

from deco_jax import config_files
from deco_jax.errors import UserError

# The schema imports JAX; data workers import this file and must not.
SAVED, OF_MODEL = (
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", name) for name in ("saved.py", "of_model.py")
)


class Named(NamedTuple):
    """The config of a command line."""

    name: str  # as it was given, for messages
    path: str  # as ml_collections accepts it: FILE.py, or FILE.py:VARIANT
    saved: bool  # whether it is a run's config.json


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 1."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def asks_for_help(argv: list[str]) -> bool:
    return any(argument in ("-h", "-help", "--help", "--helpfull", "--helpshort") for argument in argv[1:])


def value_of(argv: list[str], flag: str) -> str | None:
    """Return the last value of a flag, as absl reads it; None if it isn't given."""
    value = None
    for i, argument in enumerate(argv):
        if match := re.match(rf"--?{flag}(=|$)(.*)", argument, re.DOTALL):
            value = match[2] if match[1] else "".join(argv[i + 1 : i + 2])
    return value


def parse(argv: list[str]) -> list[str]:
    """Parse the flags, the config and its overrides; a mistake prints one line and exits with status 1.

    Without --config, the settings are those of the run in --checkpoint or --workdir.
    """
    config_files.make_importable()
    named = find_config(argv)
    argv = without_earlier(with_todays_names(argv))
    if named is not None:
        if model := value_of(argv, r"config\.model\.name"):
            named = named._replace(path=f"{OF_MODEL}:{model}:{named.path}")
        argv = _with_config(argv, named.path)
    sys.argv[:] = argv  # where ml_collections looks for overrides
    try:
        rest = flags.FLAGS(argv)
        if named is not None:
            _settings()  # an OSError of the config file only occurs at the first access
    except flags.IllegalFlagValueError as error:
        fail(_wrong_value(named, error))
    except flags.Error as error:
        fail(str(error))
    except Exception as error:  # an unknown key, or any error of the config file, which is a program itself
        fail(_unknown_key(argv, named) or unreadable(named, error))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
    if named is None:
        fail("--config is missing; start with --config=quickstart, or give the --workdir of a run")
    if not flags.FLAGS["workdir"].value:
        fail("--workdir is missing; give a folder, for example --workdir=runs/first")
    if named.saved:
        _name_what_is_left_out(named)
    return rest


def overridden() -> list[str]:
    """Return the dotted names of the settings given on the command line."""
    from ml_collections import config_flags

    return list(config_flags.get_override_values(flags.FLAGS["config"]))


# ---------------------------------------------------------------------------------------- which config


def find_config(argv: list[str]) -> Named | None:
    """Return the config that is given, or else that of the given run; None if there is neither."""
    name = value_of(argv, "config")
    if name is None:
        return _config_of_run(argv)
    path, colon, variant = os.path.expanduser(name).partition(":")
    whole = os.path.expanduser(name)
    known = any(os.path.isfile(place) for place in _places_of(path))
    if not known and _is_file(os.path.join(whole, "config.json")):  # a name means the config, not a folder beside us
        whole = os.path.join(whole, "config.json")
    if whole.endswith(".json"):
        if not _is_file(whole):
            fail(f"no config {name!r}: there is no such file")
        return Named(name, f"{SAVED}:{whole}", True)
    for place in (path, *_places_of(path)):
        if os.path.isfile(place):
            return Named(name, f"{place}{colon}{variant}", False)
    fail(f"no config {name!r}; {_suggest_config(path)}")


def _is_file(name: str) -> bool:
    """Return whether a file exists, also in a bucket; a bucket that doesn't answer ends the program."""
    from deco_jax.run import storage

    try:
        return storage.is_file(name)
    except UserError as error:
        fail(str(error))


def _places_of(path: str) -> list[str]:
    """Return the places where NAME and configs/NAME.py may be."""
    folder, file = os.path.split(path)
    stem = file.removesuffix(".py")
    if not stem or folder not in ("", "configs"):
        return []
    return [os.path.join("configs", f"{stem}.py"), os.path.join(config_files.folder(), f"{stem}.py")]


def _suggest_config(path: str) -> str:
    from deco_jax.config.words import nearest

    names = [name for name, _ in configs()]
    close = nearest(os.path.basename(path).removesuffix(".py"), names)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"


def _config_of_run(argv: list[str]) -> Named | None:
    checkpoint, workdir = value_of(argv, "checkpoint"), value_of(argv, "workdir")
    folders = [folder for folder in (checkpoint, workdir) if folder]
    if value_of(argv, "mode") in (None, "train"):
        folders.reverse()  # a resumed run continues with its own settings
    if not folders:
        return None
    from deco_jax.config import saved

    for folder in folders:
        try:
            place = saved.of_workdir(os.path.expanduser(folder))
        except UserError as error:
            fail(str(error))
        if place is not None:
            return Named(str(place), f"{SAVED}:{place}", True)
    return None


def _with_config(argv: list[str], path: str) -> list[str]:
    """Return the arguments with --config first, because ml_collections accepts no override before it."""
    rest, skip = [], False
    for argument in argv[1:]:
        if skip:
            skip = False
        elif re.fullmatch(r"--?config", argument):
            skip = True
        elif not re.match(r"--?config=", argument):
            rest.append(argument)
    return [argv[0], f"--config={path}", *rest]


def with_todays_names(argv: list[str]) -> list[str]:
    """Return the arguments with renamed settings under their new names; print a line for each."""
    if not any(re.match(r"--?(no)?config\.", argument) for argument in argv):
        return argv
    from deco_jax.config.values import earlier_names

    earlier, renamed = earlier_names(), list(argv)
    for i, argument in enumerate(argv):
        match = re.fullmatch(r"--?(no)?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        if not match or match[2] not in earlier:
            continue
        new, setting = earlier[match[2]]
        print(f"config.{match[2]} is now config.{new}; the old name still works", file=sys.stderr)
        if match[3] is not None:
            renamed[i] = f"--config.{new}={_converted(match[3], setting.convert)}"
        elif match[1]:
            renamed[i] = f"--config.{new}={setting.convert(False)}"
        else:
            renamed[i] = f"--config.{new}"
            if i + 1 < len(argv):
                renamed[i + 1] = _converted(argv[i + 1], setting.convert)
    return renamed


def without_earlier(argv: list[str]) -> list[str]:
    """Return the arguments without settings that are given again later, whose values ml_collections would join if they
    are tuples."""
    keys = [match[1] if (match := re.match(r"--?(config\.[\w.]+)=", argument)) else None for argument in argv]
    return [argument for i, argument in enumerate(argv) if keys[i] is None or keys[i] not in keys[i + 1 :]]


def _converted(value: str, convert: Callable[[Any], Any]) -> str:
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        read = {"true": True, "false": False}.get(value, value)
    return str(convert(read))


# ---------------------------------------------------------------------------------------- what is wrong


def _settings() -> dict[str, Any]:
    """Return the current config by dotted key."""
    from deco_jax.config import flatten

    value = flags.FLAGS["config"].value
    return flatten(value.to_dict()) if value is not None else {}


def unreadable(named: Named | None, error: Exception) -> str:
    """Return a message for an exception that a config file, or a saved config, raised."""
    if isinstance(error, UserError) or named is None:
        return str(error)
    message = f"the config {named.name} could not be read: {error}"
    from deco_jax.config.values import earlier_names

    for old, (new, _) in earlier_names().items():
        if re.search(rf'"{old.rpartition(".")[2]}"', str(error)):  # a setting that the file sets
            message += f"; config.{old} is now config.{new}"
    return message


def _wrong_value(named: Named | None, error: flags.IllegalFlagValueError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines[0].startswith("flag --config="):  # ends with the traceback's last line, "ValueError: ..."
        name = named.name if named else ""
        return f"the config {name} could not be read: {lines[-1].partition(': ')[2] or lines[-1]}"
    key = re.match(r"flag --config\.([\w.]+)=", lines[0])
    default = _settings().get(key[1]) if key else None
    return " ".join(lines) + ("" if default is None else f"; it takes a value like {default}")


def _unknown_key(argv: list[str], named: Named | None) -> str:
    """Return what is wrong with the first override of an unknown key; "" if there is none."""
    from deco_jax.config import flatten
    from deco_jax.config.words import suggestion

    try:  # without the overrides
        default: Any = flags.FLAGS["config"].parser.parse(named.path if named else "")
        known = flatten(default.to_dict())
    except Exception:  # then the overrides aren't the cause
        return ""
    for given in (match[1] for argument in argv if (match := re.match(r"--?(?:no)?config\.([\w.]+)", argument))):
        if given not in known and not any(key.startswith(f"{given}.") for key in known):
            remedy = _of_another_model(given, known) or suggestion(given, known, "--config.")
            return f"there is no setting --config.{given}; {remedy or '--help lists all settings'}"
    return ""


def _of_another_model(given: str, known: Mapping[str, Any]) -> str:
    from deco_jax.config import MODEL

    section, _, name = given.partition(".")
    having = [model for model, settings in MODEL.items() if section == "model" and name in settings]
    if not having or "model.name" not in known:
        return ""
    return f"it belongs to model.name={' or '.join(having)}, but this config's is {known['model.name']}"


def _name_what_is_left_out(named: Named) -> None:
    from deco_jax.config import saved

    _, extra = saved.read(named.path.partition(f"{SAVED}:")[2])
    if extra:
        print(f"{named.name}: left out {', '.join(extra)}, which this version has no setting for", file=sys.stderr)


# ---------------------------------------------------------------------------------------- help


def configs() -> list[tuple[str, str]]:
    """Return the names of the project's configs, and a line about each."""
    found = []
    for path in sorted(config_files.folder().glob("*.py")):
        if path.stem != "__init__":
            document = ast.get_docstring(ast.parse(path.read_text())) or ""
            found.append((path.stem, document.partition("\n")[0]))
    return found


def help_text(modes: Mapping[str, str]) -> str:
    """Return the text of --help.

    Args:
        modes: what each mode does.
    """
    from deco_jax.config import reference

    own = [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        for flag in defined
        if module.endswith(("deco_jax/main.py", "deco_jax.main")) and flag.name != "config"
    ]
    parts = [
        "DeCo, frequency-decoupled pixel diffusion, in JAX.",
        "",
        "  python -m deco_jax.main --config=CONFIG[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]",
        "",
        "CONFIG is one of the names below, a file (configs/NAME.py), or a run's config.json. Without --config, the",
        "settings are those of the run in --workdir. Settings given as --config.KEY=VALUE apply on top.",
        "",
        "Modes:",
        *_columns([(name, about) for name, about in modes.items()]),
        "",
        "Configs:",
        *_columns(configs()),
        "",
        "Flags:",
        *_columns([(f"--{flag.name}", flag.help.rpartition(">: ")[2]) for flag in own]),
        "",
        "Settings, with their defaults:",
        "",
        reference.text(),
    ]
    return "\n".join(parts)


def _columns(rows: list[tuple[str, str]], width: int = 100) -> list[str]:
    left = max(len(name) for name, _ in rows) + 4
    lines = []
    for name, about in rows:
        lines += textwrap.wrap(about, width, initial_indent=f"  {name}".ljust(left), subsequent_indent=" " * left) or [
            f"  {name}"
        ]
    return lines

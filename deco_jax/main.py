"""The command line: flags, platform, and which program a mode is. Nothing else.

python -m deco_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys

# Data workers import this file again: everything heavy is imported inside the functions.
from absl import app, flags
from ml_collections import config_flags

MODES = ("train", "sample")

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py, or configs/NAME.py:VARIANT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Checkpoint to read instead of the workdir's newest.")


def parse(argv: list[str]) -> list[str]:
    """Flags by absl and the config's overrides; a mistake is one line and exit status 1."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    except FileNotFoundError as error:
        _fail(f"no config {error.filename or _config_argument(argv)}; see the files in configs/")
    except (AttributeError, KeyError) as error:
        _fail(_unknown_key(argv, error))
    except Exception as error:  # the config file is a program of its own
        path = _config_argument(argv)
        if not os.path.exists(path.split(":")[0]):
            _fail(f"no config {path}; see the files in configs/")
        _fail(f"the config {path} could not be read: {error}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
    if _CONFIG.value is None:
        _fail("--config is missing; start with --config=configs/quickstart.py")
    if not _WORKDIR.value:
        _fail("--workdir is missing; give a folder, for example --workdir=runs/first")
    return rest


def _config_argument(argv: list[str]) -> str:
    for i, argument in enumerate(argv):
        match = re.match(r"--?config(=|$)(.*)", argument)
        if match:
            return match[2] if match[1] else " ".join(argv[i + 1 : i + 2])
    return ""


def _unknown_key(argv: list[str], error: Exception) -> str:
    name = str(error).strip("'\" ").split("'")[0]
    given = [a.split("=")[0].lstrip("-") for a in argv if re.match(r"--?(no)?config\.", a)]
    guilty = next((key for key in given if name and name in key.split(".")), given[0] if given else "")
    if not guilty:
        return f"the config {_config_argument(argv)} could not be read: {error!r}"
    known: list[str] = []
    if _CONFIG.value is not None:
        known = [f"config.{key}" for key in _flatten(_CONFIG.value.to_dict())]
    close = difflib.get_close_matches(guilty, known, n=1)
    return f"there is no setting --{guilty}" + (f"; did you mean --{close[0]}?" if close else "; see the config file")


def _flatten(values: dict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def main(_: list[str]) -> None:
    from absl import logging

    from deco_jax import config as config_lib
    from deco_jax.errors import UserError

    logging.set_verbosity(logging.WARNING)
    try:
        config_lib.check(_CONFIG.value)
        if _MODE.value == "train":
            from deco_jax.train import train

            train(_CONFIG.value, _WORKDIR.value)
        elif _MODE.value == "sample":
            from deco_jax.sample import sample

            sample(_CONFIG.value, _WORKDIR.value, _CHECKPOINT.value)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"writing to {_WORKDIR.value} failed: {error.strerror}; free space there and start again")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)

"""Finds the config files, in a checkout and in an installed package."""

from __future__ import annotations

import os
import pathlib
import sys
import types

_PACKAGE = pathlib.Path(__file__).resolve().parent


def folder() -> pathlib.Path:
    """Return the folder of the project's config files: `configs` in a checkout, inside the package when installed."""
    beside = _PACKAGE.parent / "configs"
    return beside if (beside / "imagenet256.py").is_file() else _PACKAGE / "configs"


def make_importable() -> None:
    """Make `from configs import imagenet256` work in config files, wherever the program is started.

    A folder `configs` in the current directory is searched in addition to the project's.
    """
    package = types.ModuleType("configs")
    package.__path__ = [str(folder()), os.path.abspath("configs")]
    sys.modules["configs"] = package

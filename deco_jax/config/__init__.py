"""The settings of a run: declared once, in `sections`, with default, range and a line of help.

sections ─┬─ values: ConfigDicts; older saved configs get the defaults that they lack
          ├─ check: a one-line error for what can't be done, before anything compiles or is written
          └─ reference: --help and docs/settings.md
"""

from deco_jax.config.check import BYTE_WIDTH, check, settle_paths
from deco_jax.config.sections import COMPUTED, MODEL, SECTIONS, TOP
from deco_jax.config.values import (
    complete,
    default_config,
    flatten,
    make_config,
    model_differences,
    set_model,
    settle_image_size,
    to_json,
    unknown,
)

__all__ = [
    "BYTE_WIDTH",
    "COMPUTED",
    "MODEL",
    "SECTIONS",
    "TOP",
    "check",
    "complete",
    "default_config",
    "flatten",
    "make_config",
    "model_differences",
    "set_model",
    "settle_image_size",
    "settle_paths",
    "to_json",
    "unknown",
]

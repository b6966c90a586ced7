"""Reads a config with another model in it: `--config=configs/cifar10.py --config.model.name=jit`.

ml_collections overrides only settings that the config has already, so the model must be there before its settings are
given. Like `saved.py`, this is a config file for ml_collections; the variant is MODEL:FILE[:VARIANT].
"""

from __future__ import annotations

from typing import Any

import ml_collections
from absl import flags

from deco_jax.config.sections import MODEL
from deco_jax.config.values import set_model


def get_config(given: str) -> ml_collections.ConfigDict:
    """Return the config of a file for the named model, see `set_model`; unchanged if there is no such model."""
    name, _, path = given.partition(":")
    config: Any = flags.FLAGS["config"].parser.parse(path)
    if name in MODEL and config.model.name != name:
        set_model(config, name)
    return config

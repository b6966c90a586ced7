"""Checkpoints by Orbax: written in the background, atomically; read back onto any mesh.

    workdir/checkpoints/STEP/{counters, params, ema, average_NAME for each other average, measured_NAME for each array
        that the method measured in the run, optimizer, config}

Sampling only reads one average. A checkpoint imported from the official code has no `optimizer`. Everything is stored
as plain dictionaries of arrays, readable without this package.
"""

from deco_jax.run.checkpoint.base import load_base, save_base
from deco_jax.run.checkpoint.folder import (
    AVERAGE_ITEM,
    COMMITTED,
    FOLDER,
    average_names,
    check_model,
    check_projector,
    complete_steps,
    find,
    has_projector,
    load_config,
    num_classes,
    written,
)
from deco_jax.run.checkpoint.read import (
    LostOptimizerError,
    check_measured,
    load_average,
    load_measured,
    load_optimizer,
    load_params,
    load_state,
    load_step,
)
from deco_jax.run.checkpoint.write import Checkpoints

__all__ = [
    "AVERAGE_ITEM",
    "COMMITTED",
    "FOLDER",
    "Checkpoints",
    "LostOptimizerError",
    "average_names",
    "check_measured",
    "check_model",
    "check_projector",
    "complete_steps",
    "find",
    "has_projector",
    "load_average",
    "load_base",
    "load_config",
    "load_measured",
    "load_optimizer",
    "load_params",
    "load_state",
    "load_step",
    "num_classes",
    "save_base",
    "written",
]

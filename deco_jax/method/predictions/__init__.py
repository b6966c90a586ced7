"""What a network's output means: the velocity, the clean image, or a mixture of both.

A prediction is bound to its path. To add one, write a file here with a class that has the methods of `Prediction`, and
add a line to `PREDICTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from deco_jax.errors import UserError
from deco_jax.method.paths import Path, make_path
from deco_jax.method.predictions.asymmetric import AsymmetricPrediction
from deco_jax.method.predictions.clean_image import XPrediction
from deco_jax.method.predictions.prediction import Prediction
from deco_jax.method.predictions.velocity import VPrediction

__all__ = ["PREDICTIONS", "Prediction", "VPrediction", "XPrediction", "make_prediction"]

PREDICTIONS: dict[str, Callable[[ml_collections.ConfigDict, Path], Prediction]] = {
    "v": lambda config, path: VPrediction(path),
    "x": lambda config, path: XPrediction(path),
    "asymmetric": lambda config, path: AsymmetricPrediction(
        path, config.model.asymmetric_rank, config.model.patch_size
    ),
}


def make_prediction(config: ml_collections.ConfigDict) -> Prediction:
    """Build the prediction that config.model.prediction names, on the config's path.

    Raises:
        UserError: there is no such prediction.
    """
    name = config.model.prediction
    if name not in PREDICTIONS:
        raise UserError(f"there is no prediction type {name!r}; choose one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name](config, make_path(config))

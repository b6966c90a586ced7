"""The weaker model that autoguidance leads away from (Karras et al. 2024, "Guiding a diffusion model with a bad version
of itself"): another run or checkpoint, or another average of the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import ml_collections
from jax.sharding import Mesh

from deco_jax import config as config_lib
from deco_jax.config import saved
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.models.network import Params
from deco_jax.run import checkpoint
from deco_jax.sampling.generate import Denoiser, make_denoiser
from deco_jax.sampling.guidance import Functions, Weaker
from deco_jax.sampling.settings import Sampling

Other = tuple[Denoiser, Params]  # another model than the one that is guided


class Guide:
    """The weaker model that config.sample names, if any.

    Args:
        sample: config.sample.
        denoiser: of the model that is guided, for another average of it.
        other: another model, as `load_other` returns it.
    """

    def __init__(self, sample: ml_collections.ConfigDict, denoiser: Denoiser, other: Other | None) -> None:
        self._average = sample.guidance_average or "ema"
        self._asked = bool(sample.guidance_model or sample.guidance_average)
        self._params = None if other is None else other[1]
        network = denoiser if other is None else other[0]
        self._functions = Functions(network.velocity, network.network.whole)

    def __call__(self, sampling: Sampling, own: Callable[[str], Params]) -> Sampling:
        """Return the sampling with the weaker model in its rule; as it is where none is asked for.

        Args:
            own: name → that average of the guided model's run.
        """
        if not self._asked or sampling.guidance.weaker is not None:
            return sampling
        params = own(self._average) if self._params is None else self._params
        rule = dataclasses.replace(sampling.guidance, weaker=Weaker(self._functions, params))
        return dataclasses.replace(sampling, guidance=rule)


def check_average(sample: ml_collections.ConfigDict, there: Iterable[str]) -> None:
    """Raise UserError if config.sample.guidance_average is not among the averages that a run keeps."""
    if sample.guidance_average and not sample.guidance_model and sample.guidance_average not in there:
        raise UserError(_no_average(sample.guidance_average, there))


def _no_average(name: str, there: Iterable[str]) -> str:
    return f"config.sample.guidance_average={name!r} is not an average of that model; choose from {', '.join(there)}"


def load_other(config: ml_collections.ConfigDict, mesh: Mesh) -> Other | None:
    """Load the model that config.sample.guidance_model names, computed in the types of `config`; None if it is empty.

    Raises:
        UserError: there is no such run or average, or its model takes another condition, other states or other image
            sizes.
    """
    if not config.sample.guidance_model:
        return None
    average = config.sample.guidance_average or "ema"
    where = checkpoint.find(config.sample.guidance_model)
    stored = config_lib.make_config(saved.known(checkpoint.load_config(where), where))
    alike = {
        "takes another condition": ("model.num_classes", "model.text_width", "model.text_length"),
        "has other states": ("model.class_token", "path.name", "path.noise_scale"),
    }
    for problem, names in alike.items():
        for section, name in (setting.split(".") for setting in names):
            theirs, ours = stored[section][name], config[section][name]
            if theirs != ours:
                raise UserError(
                    f"config.sample.guidance_model={config.sample.guidance_model} {problem}: {section}.{name} is "
                    f"{theirs} there and {ours} here; choose a model with the same"
                )
    patch, sides = stored.model.patch_size, image_sides(config.data.image_size)
    if any(side % patch for side in sides):
        raise UserError(
            f"config.sample.guidance_model={config.sample.guidance_model} has patches of {patch} pixels, which don't "
            f"divide {sides[0]}x{sides[1]}"
        )
    stored.model.dtype = config.model.dtype
    there = checkpoint.average_names(where)
    if average not in there:
        raise UserError(_no_average(average, there))
    denoiser = make_denoiser(stored)
    params = checkpoint.load_average(where, denoiser.network.shapes, stored, mesh, average)
    return denoiser.given(checkpoint.load_measured(where, denoiser.prediction.measured, mesh)), params

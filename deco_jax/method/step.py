"""A training step as its losses see it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from deco_jax import images
from deco_jax.method.paths import Path, Point
from deco_jax.method.predictions import Prediction
from deco_jax.models.network import FrozenNetwork, Network

Params = dict[str, Any]


class Draws(NamedTuple):
    """Everything random in a training step; a row for each example."""

    noise: Array  # [batch, height, width, 3], normal
    times: Array  # [batch] in (0, 1)
    dropped: Array  # bool [batch]: trained without its label or caption
    keys: Array | None = None  # [batch], for anything else that is random
    # Loss → how much each example counts, [batch], with mean 1 over the whole batch; losses without an entry: all
    # equal.
    counts: Mapping[str, Array] = {}
    jump: Array | None = None  # [batch, 4], of MeanFlow; see `losses.mean_flow`
    # Loss → the share of its weight at this step, [batch], all equal; losses without an entry: the full weight.
    shares: Mapping[str, Array] = {}
    token_noise: Array | None = None  # [batch, channels], standard normal, of the class token where a loss has one


class Observed(NamedTuple):
    """What is known about a batch besides its images; none of it is trained."""

    context: Array  # labels int32 [batch], or text features [batch, length, text_width]
    null: Array  # the condition that means none: int32 [], or [length, text_width]
    features: Mapping[str, Any] = {}  # frozen network → its features of the images, if a loss needs them


class Step:
    """One batch on its way through the denoiser.

    Anything costly is computed when it is first accessed, and only once. Access it outside of `lax.cond`, `lax.scan`
    and the like, because results from inside those can't be kept for later.

    Attributes:
        params: the trained networks' parameters by name.
        pixels: the clean images, uint8 [batch, height, width, 3].
        images: the same, float32 in [−1, 1].
        draws: noise and times.
        null: the condition that means none.
        context: labels or text features, already replaced by `null` where they are dropped.
        features: of the clean images, by frozen network (`Loss.features`).
    """

    def __init__(
        self,
        params: Params,
        pixels: Array,
        draws: Draws,
        observed: Observed,
        *,
        path: Path,
        prediction: Prediction,
        networks: Mapping[str, Network],
        frozen: Mapping[str, tuple[FrozenNetwork, Any]],
        layer: int | None,
        token: str | None = None,
    ) -> None:
        self.params, self.pixels, self.draws = params, pixels, draws
        self.images = images.to_float(pixels)
        dropped = draws.dropped.reshape(-1, *[1] * observed.null.ndim)
        self.context = jnp.where(dropped, observed.null, observed.context)
        self.null = observed.null
        self.features = {name: jax.lax.stop_gradient(value) for name, value in observed.features.items()}
        self._path, self._prediction, self._layer, self._token = path, prediction, layer, token
        self._networks, self._frozen = networks, frozen

    @property
    def times(self) -> Array:
        """The times, [batch] in (0, 1); 0 is noise."""
        return self.draws.times

    @functools.cached_property
    def point(self) -> Point:
        """The noised images x_t and their true velocity."""
        with jax.named_scope("path"):
            return self._path.point(self.images, self.draws.noise, self.times)

    @functools.cached_property
    def _denoised(self) -> tuple[Array, dict[str, Array]]:
        options = {} if self.draws.token_noise is None else {"class_token": self.token}
        return self.trained(
            "denoiser", self.point.state, self.times, self.context, self._layer, self.draws.keys, **options
        )

    @property
    def token(self) -> Array:
        """The noised class token of `Loss.token`, [batch, channels]."""
        assert self._token is not None
        assert self.draws.token_noise is not None
        t = self.times[:, None]
        return t * self.features[self._token].image + (1 - t) * self.draws.token_noise

    @property
    def output(self) -> Array:
        """The denoiser's output, float32 [batch, height, width, 3]."""
        return self._denoised[0]

    @property
    def hidden(self) -> dict[str, Array]:
        """The denoiser's hidden states by name: "low_frequency", and "aligned", those after `Loss.layer` blocks."""
        return self._denoised[1]

    @functools.cached_property
    def velocity(self) -> Array:
        """v̂, float32 [batch, height, width, 3]."""
        return self._prediction.velocity(self.output, self.point.state, self.times)

    @functools.cached_property
    def image(self) -> Array:
        """x̂, float32 [batch, height, width, 3] in about ±1."""
        return self._prediction.image(self.output, self.point.state, self.times)

    @functools.cached_property
    def true_image(self) -> Array:
        """The x̂ of a perfect network: the clean image, or where the true velocity leads."""
        return self._prediction.image_target(self.images, self.point, self.times)

    @functools.cached_property
    def error(self) -> Array:
        """v̂ − v, float32 [batch, height, width, 3]."""
        return self.velocity - self._prediction.target(self.images, self.point, self.times)

    @property
    def error_weight(self) -> Array | float:
        """The prediction's factor for squared errors of v̂, [batch] or one for all."""
        return self._prediction.weight(self.times)

    def trained(self, name: str, *inputs: Any, **options: Any) -> Any:
        """Apply a trained network: "denoiser", or one that a loss provides (`Loss.trained`)."""
        return self._networks[name].apply(self.params[name], *inputs, **options)

    def frozen(self, name: str, *inputs: Any) -> Any:
        """Apply a frozen network that a loss provides (`Loss.frozen`); gradients pass to the inputs."""
        network, params = self._frozen[name]
        return network.apply(params, *inputs)

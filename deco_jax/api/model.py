"""`Model`: a denoiser with its weights, ready to draw."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.api.inputs import Inputs, Settings, Snapshot
from deco_jax.conditioning.classes import Classes
from deco_jax.conditioning.condition import Condition
from deco_jax.conditioning.requests import Requests
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.images import to_float
from deco_jax.models.network import Params
from deco_jax.run import checkpoint, sharding, storage
from deco_jax.sampling import generate
from deco_jax.sampling.guidance import Guidance
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.weaker import Guide, check_average, load_other


class Model:
    """A denoiser with one set of weights; made by `load`.

    Images are uint8 [n, height, width, 3]; states are float32 of the same shape, images in ±1. Times run from 0 (noise)
    to 1 (images). Each method compiles at its first call for an image size and a number of images, and not again for
    other classes, prompts, steps, seeds or guidance scales; without guidance it is another program.

    Attributes:
        config: of the run that the weights come from; `config.sample` has the defaults of `sample`, `stream` and
            `invert`.
        params: the weights, nested dictionaries of arrays.
        name: a readable name for where they come from.
        class_names: in the order of the labels; None if they aren't known, or the model takes text.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        params: Params,
        mesh: Mesh,
        name: str,
        condition: Condition | None = None,
        class_names: Sequence[str] | None = None,
        denoiser: generate.Denoiser | None = None,
    ) -> None:
        self.config, self.params, self.mesh, self.name = config, params, mesh, name
        self.denoiser = denoiser or generate.make_denoiser(config)
        self.generator = generate.Generator(self.denoiser, mesh)
        names = condition.names if isinstance(condition, Classes) else class_names
        self.class_names = list(names) if names and len(names) == config.model.num_classes else None
        self._guides: dict[tuple[str, str], tuple[Guide, Callable[[str], Params]]] = {}
        self._inputs = Inputs(config, mesh, condition, self.class_names, self.sampling)

    def share_inputs(self, other: Model) -> None:
        """Use the condition's arrays of another model of the same kind, such as its text encoder, if they are read."""
        if "frozen" in vars(other._inputs):
            self._inputs.frozen = other._inputs.frozen

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for text to image."""
        return self.config.model.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training images, and the default size to draw."""
        height, width = image_sides(self.config.data.image_size)
        return height, width

    @property
    def num_params(self) -> int:
        """The number of parameters of the denoiser."""
        return self.denoiser.network.num_params

    def __repr__(self) -> str:
        kind = f"{self.num_classes} classes" if self.num_classes else "text to image"
        height, width = self.image_size
        return f"<deco_jax.Model {self.config.model.name}, {kind}, {height}×{width}, from {self.name}>"

    # ------------------------------------------------------------------------------------ drawing

    def sample(
        self,
        classes: int | str | Sequence[int | str] | np.ndarray | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        context: np.ndarray | None = None,
        batch_size: int | None = None,
        **settings: Unpack[Settings],
    ) -> np.ndarray:
        """Draw one image for each class or prompt.

        Image i only depends on the seed, i, and its class or prompt, not on `batch_size` or the other images.

        Args:
            classes: labels from 0 to num_classes − 1, or names; for class-to-image models.
            prompts: for text-to-image models.
            context: labels or text features instead of either, as `invert` returns them.
            batch_size: images to draw at a time; by default at most config.sample.batch_size.
            **settings: see `Settings`: guidance, num_steps, sampler, seed and others; the defaults are those of
                config.sample.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            UserError: neither or both of classes and prompts are given, a class doesn't exist, or a setting is invalid.

        Examples:
            >>> model.sample(classes=["cat", "dog"], guidance=3.2, num_steps=50, sampler="heun", seed=1).shape
            (2, 256, 256, 3)
            >>> model.sample(prompts="a red fox in the snow", negative_prompt="blurry", size=(512, 384)).shape
            (1, 512, 384, 3)
        """
        requests, sampling = self._inputs.prepare(classes, prompts, context, settings)
        size = batch_size or self.config.sample.batch_size
        if size < 1:
            raise UserError(f"batch_size={size} must be at least 1")
        return np.concatenate(list(self.images(requests, sampling, size)))

    def stream(
        self,
        classes: int | str | Sequence[int | str] | np.ndarray | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        context: np.ndarray | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Snapshot]:
        """Draw the same images as `sample`, all at once, and yield them after each step.

        Args:
            classes, prompts, context, **settings: as for `sample`.

        Yields:
            num_steps + 1 snapshots: first the noise, last the images.

        Raises:
            UserError: as for `sample`, at the first snapshot.

        Examples:
            >>> [snapshot.step for snapshot in model.stream(classes=[1], num_steps=3)]
            [0, 1, 2, 3]
        """
        requests, sampling = self._inputs.prepare(classes, prompts, context, settings)
        yield from self.snapshots(requests, sampling)

    def velocity(self, x: Any, t: Any, condition: Any) -> jax.Array:
        """Evaluate the velocity dx/dt, without guidance; jitted, and differentiable in x and t.

        Args:
            x: states [n, height, width, 3], images in ±1.
            t: [n], or one for all, from 0 (noise) to 1.
            condition: classes (by number or name) or prompts, one for each state or one for all; or labels int32 [n];
                or text features [n, length, text_width].

        Returns:
            float32 [n, height, width, 3].

        Raises:
            UserError: shapes don't fit, or a class doesn't exist.

        Examples:
            >>> energy = lambda x: jnp.sum(jnp.square(model.velocity(x, 0.5, [3])))
            >>> jax.grad(energy)(jnp.zeros((1, 16, 16, 3))).shape
            (1, 16, 16, 3)
        """
        return self._at_states(self._velocity, x, t, condition)

    def denoise(self, x: Any, t: Any, condition: Any) -> jax.Array:
        """Estimate the clean image x̂ at states, without guidance; arguments and errors as for `velocity`.

        Returns:
            float32 [n, height, width, 3] in about ±1: the mean of the images that this state may have come from, as
            the model has learnt it. A v-prediction on the energy-guided path gives that of images still blurred.

        Examples:
            >>> model.denoise(jnp.zeros((2, 16, 16, 3)), 0.5, [3, 7]).shape
            (2, 16, 16, 3)
        """
        return self._at_states(self._image, x, t, condition)

    def _at_states(self, function: Any, x: Any, t: Any, condition: Any) -> jax.Array:
        patch = self.config.model.patch_size
        shape = jnp.shape(x)
        if len(shape) != 4 or shape[3] != 3 or shape[1] % patch or shape[2] % patch:
            raise UserError(f"states have shape {shape}; give [n, height, width, 3] with sides that {patch} divides")
        if jnp.shape(t) not in ((), (shape[0],)):
            raise UserError(f"times have shape {jnp.shape(t)}; give one, or one for each of {shape[0]} states")
        if self.denoiser.token:
            raise UserError(
                "this model also takes a class token (config.model.class_token), which states of images don't have; "
                "sample and stream draw both"
            )
        context = self._inputs.context(condition, shape[0])
        times = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (shape[0],))
        return function(self.params, jnp.asarray(x, jnp.float32), times, context)

    def invert(
        self,
        images: np.ndarray | jax.Array,
        condition: Any,
        *,
        guidance: float | Guidance = 1.0,
        sampler: str = "heun",
        num_steps: int | None = None,
        shift: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follow the ODE backwards, from images to the noise from which they would be drawn.

        Args:
            images: uint8 [n, height, width, 3], or float in ±1.
            condition: as for `velocity`.
            guidance: as in `Settings`, but off by default, because inversion is unstable with guidance.
            sampler: any except the stochastic "sde".
            num_steps, shift: as in `Settings`; the defaults are those of config.sample.

        Returns:
            The noise float32 [n, height, width, 3] and the context, for `sample(context=context, noise=noise)`.

        Raises:
            UserError: a setting is invalid, or images have another shape.

        Examples:
            >>> noise, context = model.invert(images, [3, 3, 7], num_steps=100)
            >>> again = model.sample(context=context, noise=noise, guidance=1.0, sampler="heun", num_steps=100)
        """
        if np.ndim(images) != 4 or np.shape(images)[3] != 3:
            raise UserError(f"images have shape {np.shape(images)}; give [n, height, width, 3]")
        pixels = np.asarray(images)
        x = np.asarray(to_float(jnp.asarray(pixels)) if pixels.dtype == np.uint8 else pixels, np.float32)
        context = np.asarray(self._inputs.context(condition, len(x)))
        sampling = self._inputs.sampling(
            guidance=guidance, sampler=sampler, num_steps=num_steps, shift=shift, size=x.shape[1:3]
        )
        requests = dataclasses.replace(self._inputs.requests(None, None, context, None), start=x)
        *_, noise = self.states(requests, dataclasses.replace(sampling, backwards=True))
        return np.asarray(noise)[: len(x)], context

    # ------------------------------------------------------------------------------------ for programs

    @property
    def condition(self) -> Condition:
        """Classes or texts; opening the latter reads a text encoder. UserError if its files are missing."""
        return self._inputs.condition

    @property
    def frozen(self) -> Mapping[str, Any]:
        """The condition's arrays, such as a text encoder's weights, on the mesh."""
        return self._inputs.frozen

    def sampling(self, config: ml_collections.ConfigDict) -> Sampling:
        """Return the sampling that config.sample describes, with the weaker model for guidance if it names one."""
        key = (config.sample.guidance_model, config.sample.guidance_average)
        if key not in self._guides:
            average = functools.cache(lambda name: self._other_average(config, name))
            self._guides[key] = Guide(config.sample, self.denoiser, load_other(config, self.mesh)), average
        guide, own = self._guides[key]
        return guide(Sampling.of(config), own)

    def _other_average(self, config: ml_collections.ConfigDict, name: str) -> Params:
        where = storage.path(self.name)
        if not (where / "ema").is_dir():
            raise UserError(f"{self.name} has no other averages for guidance; give a run as guidance_model")
        check_average(config.sample, checkpoint.average_names(where))
        return checkpoint.load_average(where, self.denoiser.network.shapes, config, self.mesh, name)

    def images(self, requests: Requests, sampling: Sampling, batch_size: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yield images first..requests.count − 1 in batches, uint8 [at most batch_size, height, width, 3]."""
        return self.generator.images(self.params, requests, sampling, batch_size, first)

    def snapshots(self, requests: Requests, sampling: Sampling) -> Iterator[Snapshot]:
        """Draw all of `requests` at once; yield the noise, then the state after each step."""
        times = sampling.times
        for step, (time, state) in enumerate(zip(times, self.states(requests, sampling), strict=True)):
            images = self.generator.on_host(state)[: requests.count]
            yield Snapshot(step, sampling.num_steps, float(time), images)

    def states(self, requests: Requests, sampling: Sampling) -> Iterator[jax.Array]:
        """Yield the same as float32 on the devices, padded to a batch that divides evenly over them."""
        size = self.generator.filled(requests.count)
        batch = sharding.place_everywhere(self.mesh, requests.batch(0, size))
        return self.generator.states(self.params, batch, requests.null, sampling)

    # ------------------------------------------------------------------------------------ inside

    @functools.cached_property
    def _velocity(self) -> Any:
        return self._of_states(self.denoiser.velocity)

    @functools.cached_property
    def _image(self) -> Any:
        return self._of_states(self.denoiser.image)

    def _of_states(self, function: Any) -> Any:
        mesh = self.mesh

        def padded(params: Params, x: jax.Array, t: jax.Array, context: Any) -> jax.Array:
            more = -len(x) % mesh.size  # rows of padding, so that the batch divides evenly over the devices
            x, t, context = (jnp.concatenate([a, a[:1].repeat(more, 0)]) if more else a for a in (x, t, context))
            arguments = (sharding.specs(mesh, params), *[sharding.BATCH] * 3)
            found = sharding.each_device(function, mesh, arguments, sharding.BATCH)(params, x, t, context)
            return found.astype(jnp.float32)[: len(x) - more]

        return jax.jit(padded)

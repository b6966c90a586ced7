"""The Python API: a model with its weights, ready to draw. The modes that draw use the same object.

import deco_jax

model = deco_jax.load("runs/quickstart")
images = model.sample(classes=[3, 3, 7], num_steps=40, seed=0)
for snapshot in model.stream(classes=[1], num_steps=30):
    print(snapshot.step, snapshot.images.shape)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax import config as config_lib
from deco_jax.conditioning import requests as requests_lib
from deco_jax.conditioning.classes import Classes
from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import Requests
from deco_jax.conditioning.texts import Texts
from deco_jax.convert import deco, infer, torch_files
from deco_jax.data.sources import Source
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.images import to_float
from deco_jax.models.network import Params
from deco_jax.run import checkpoint, sharding, storage
from deco_jax.sampling import generate
from deco_jax.sampling.guidance import Guidance
from deco_jax.sampling.settings import Sampling

CLASSES = "classes.json"  # in a run: the names of its classes, in the order of their labels


class Settings(TypedDict, total=False):
    """How images are drawn; what is left out is as config.sample of the run says.

    negative_prompt: what guidance leads away from, text to image only.
    guidance: the scale, at least 0 (1: none), or a rule of another kind.
    guidance_interval: (low, high), times within 0..1 between which guidance acts.
    num_steps: of the sampler, at least 1.
    sampler: a name in `sampling.samplers.SAMPLERS`, such as "euler", "heun", "adams2" or "sde".
    shift: of the sampling times, above 0; more spends more steps near the noise.
    seed: of the noise, from 0.
    size: a side or (height, width) in pixels, multiples of the model's patch size.
    noise: states to start from instead of the seed's noise, float32 [n, height, width, 3].
    """

    negative_prompt: str
    guidance: float | Guidance
    guidance_interval: Sequence[float]
    num_steps: int
    sampler: str
    shift: float
    seed: int
    size: int | Sequence[int]
    noise: np.ndarray


class Snapshot(NamedTuple):
    """The images after a step of a sampler.

    step: steps done, from 0 (the noise) to `num_steps` (the images).
    time: of the state, from 0 (noise) to 1 (images).
    images: the state as uint8 [n, height, width, 3].
    """

    step: int
    num_steps: int
    time: float
    images: np.ndarray


def load(
    path: str | os.PathLike[str], *, average: str = "ema", config: ml_collections.ConfigDict | None = None
) -> Model:
    """Open a model with its weights, on all devices of this machine.

    Args:
        path: a run's workdir (its newest checkpoint), the folder of a checkpoint, the folder that --mode=export wrote,
            or an official .ckpt file.
        average: which average of the weights, by its name in config.optimizer.averages.
        config: only for a .ckpt file, which has none: the config it belongs to. By default the architecture is read
            from the tensors' shapes, the image size is 256, and everything else is at its default.

    Raises:
        UserError: there is nothing of that kind at `path`, it is damaged, or it has no such average.

    Examples:
        >>> model = deco_jax.load("runs/quickstart")
        >>> images = model.sample(classes=7, num_steps=40)
    """
    path = storage.path(os.path.expanduser(path))
    mesh = sharding.make_mesh(-1, 1)
    if path.is_file():
        return _load_official(path, average, config, mesh)
    if config is not None:
        raise UserError(f"{path} has its own config; leave out config=, which is for official .ckpt files")
    if (path / "ema.safetensors").is_file():
        return _load_exported(path, average, mesh)
    where = checkpoint.find(str(path))
    stored = config_lib.make_config(config_lib.complete(checkpoint.load_config(where)))
    return _load_checkpoint(where, stored, average, mesh)


def open_model(
    config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "", source: Source | None = None
) -> Model:
    """Open the model of a run as a config says: its mesh, its compute dtype, its settings.

    Args:
        checkpoint_path: a checkpoint, or another run's newest, instead of the workdir's newest.
        source: of the data, where its captions are to be drawn.

    Raises:
        UserError: there is no checkpoint, or it is another model's; the condition's files are missing.
    """
    where = checkpoint.find(workdir, checkpoint_path, config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    condition = open_condition(config, mesh, source, class_names(where))
    return _load_checkpoint(where, config, config.sample.average, mesh, condition)


def class_names(where: pathlib.Path) -> list[str] | None:
    """The names of the classes that a checkpoint's run, or an exported folder, noted; None if it didn't."""
    for folder in (where, where.parent.parent):
        if (folder / CLASSES).is_file():
            return json.loads((folder / CLASSES).read_text())
    return None


class Model:
    """A denoiser with one set of its weights; made by `load`.

    Images are uint8 [n, height, width, 3]; states are float32 of the same shape, images in ±1. Times run from 0 (noise)
    to 1 (images). Each method compiles at its first call for an image size and a number of images, and never again for
    other classes, prompts, guidance, steps or seeds.

    Attributes:
        config: of the run that it comes from; `config.sample` has the defaults of `sample`, `stream` and `invert`.
        params: the weights, nested dictionaries of arrays.
        name: where they come from, for people.
        class_names: in the order of the labels; None where they are not known, or the model takes text.
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
        self._given = condition
        names = condition.names if isinstance(condition, Classes) else class_names
        self.class_names = list(names) if names and len(names) == config.model.num_classes else None

    @property
    def num_classes(self) -> int:
        """Classes that it draws; 0 for text to image."""
        return self.config.model.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that it was trained at, and draws unless told."""
        height, width = image_sides(self.config.data.image_size)
        return height, width

    @property
    def num_params(self) -> int:
        """Parameters of the denoiser."""
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
        """Draw an image of each class or prompt.

        Image i depends on the seed, i, and its class or prompt alone, not on `batch_size` or on the other images.

        Args:
            classes: labels from 0 to num_classes − 1, or names; of class-to-image models.
            prompts: of text-to-image models.
            context: labels or text features instead of either, as `invert` returns them.
            batch_size: images drawn at once; config.sample.batch_size at most by default.
            **settings: negative_prompt, guidance, guidance_interval, num_steps, sampler, shift, seed, size and noise,
                as `Settings` says; by default those of config.sample.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            UserError: neither or both of classes and prompts are given, one of them isn't there, or a setting can't be.

        Examples:
            >>> model.sample(classes=["cat", "dog"], guidance=3.2, num_steps=50, sampler="heun", seed=1).shape
            (2, 256, 256, 3)
            >>> model.sample(prompts="a red fox in the snow", negative_prompt="blurry", size=(512, 384)).shape
            (1, 512, 384, 3)
        """
        requests, sampling = self._prepare(classes, prompts, context, settings)
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
        """Draw the same images as `sample`, all at once, and look at them after each step.

        Args:
            classes, prompts, context, **settings: as of `sample`.

        Yields:
            num_steps + 1 snapshots, the noise first, the images last.

        Raises:
            UserError: as `sample`, at the first snapshot.

        Examples:
            >>> [snapshot.step for snapshot in model.stream(classes=[1], num_steps=3)]
            [0, 1, 2, 3]
        """
        requests, sampling = self._prepare(classes, prompts, context, settings)
        yield from self.snapshots(requests, sampling)

    def velocity(self, x: Any, t: Any, condition: Any) -> jax.Array:
        """Evaluate the velocity dx/dt, without guidance; jitted, and differentiable in x and t.

        Args:
            x: states [n, height, width, 3], images in ±1.
            t: [n] or one for all, from 0 (noise) to 1.
            condition: classes (or prompts) by number or name, one for each state or one for all; or labels int32 [n];
                or text features [n, length, text_width].

        Returns:
            float32 [n, height, width, 3].

        Raises:
            UserError: shapes that don't fit, a class that isn't there.

        Examples:
            >>> energy = lambda x: jnp.sum(jnp.square(model.velocity(x, 0.5, [3])))
            >>> jax.grad(energy)(jnp.zeros((1, 16, 16, 3))).shape
            (1, 16, 16, 3)
        """
        patch = self.config.model.patch_size
        shape = jnp.shape(x)
        if len(shape) != 4 or shape[3] != 3 or shape[1] % patch or shape[2] % patch:
            raise UserError(f"states have shape {shape}; give [n, height, width, 3] with sides that {patch} divides")
        if jnp.shape(t) not in ((), (shape[0],)):
            raise UserError(f"times have shape {jnp.shape(t)}; give one, or one for each of {shape[0]} states")
        context = self._context(condition, shape[0])
        times = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (shape[0],))
        return self._velocity(self.params, jnp.asarray(x, jnp.float32), times, context)

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
        """Follow the ODE backwards, from images to the noise that they would be drawn from.

        Args:
            images: uint8 [n, height, width, 3], or float in ±1.
            condition: as of `velocity`.
            guidance: as of `Settings`, but none by default: with guidance the way back is unstable.
            sampler: any but the stochastic "sde".
            num_steps, shift: as of `Settings`; by default those of config.sample.

        Returns:
            The noise float32 [n, height, width, 3] and the context, for `sample(context=context, noise=noise)`.

        Raises:
            UserError: settings that can't be, images of another shape.

        Examples:
            >>> noise, context = model.invert(images, [3, 3, 7], num_steps=100)
            >>> again = model.sample(context=context, noise=noise, guidance=1.0, sampler="heun", num_steps=100)
        """
        if np.ndim(images) != 4 or np.shape(images)[3] != 3:
            raise UserError(f"images have shape {np.shape(images)}; give [n, height, width, 3]")
        pixels = np.asarray(images)
        x = np.asarray(to_float(jnp.asarray(pixels)) if pixels.dtype == np.uint8 else pixels, np.float32)
        context = np.asarray(self._context(condition, len(x)))
        sampling = self._sampling(
            guidance=guidance, sampler=sampler, num_steps=num_steps, shift=shift, size=x.shape[1:3]
        )
        requests = dataclasses.replace(self._requests(None, None, context, None), start=x)
        *_, noise = self.states(requests, dataclasses.replace(sampling, backwards=True))
        return np.asarray(noise)[: len(x)], context

    # ------------------------------------------------------------------------------------ for programs

    @functools.cached_property
    def condition(self) -> Condition:
        """Classes or texts; opening the latter reads a text encoder. UserError if its files are missing."""
        if self._given is not None:
            return self._given
        return open_condition(self.config, self.mesh, None, self.class_names)

    @functools.cached_property
    def frozen(self) -> Mapping[str, Any]:
        """The condition's arrays, such as a text encoder's weights, on the mesh."""
        return self.condition.load()

    def images(self, requests: Requests, sampling: Sampling, batch_size: int, first: int = 0) -> Iterator[np.ndarray]:
        """Images first..requests.count − 1, batch by batch, as uint8 [at most batch_size, height, width, 3]."""
        return self.generator.images(self.params, requests, sampling, batch_size, first)

    def snapshots(self, requests: Requests, sampling: Sampling) -> Iterator[Snapshot]:
        """All of `requests` at once: the noise, then the state after each step."""
        times = sampling.times
        for step, (time, state) in enumerate(zip(times, self.states(requests, sampling), strict=True)):
            images = self.generator.on_host(state)[: requests.count]
            yield Snapshot(step, sampling.num_steps, float(time), images)

    def states(self, requests: Requests, sampling: Sampling) -> Iterator[jax.Array]:
        """The same as float32 on the devices, filled up to a batch that they divide."""
        size = self.generator.filled(requests.count)
        batch = sharding.place_everywhere(self.mesh, requests.batch(0, size))
        return self.generator.states(self.params, batch, requests.null, sampling)

    # ------------------------------------------------------------------------------------ inside

    def _prepare(self, classes: Any, prompts: Any, context: Any, settings: Settings) -> tuple[Requests, Sampling]:
        """What to draw and how. UserError, before anything compiles, for what can't be."""
        rest: dict[str, Any] = {**settings}
        noise, negative = rest.pop("noise", None), rest.pop("negative_prompt", None)
        if unknown := rest.keys() - Settings.__annotations__.keys():
            raise UserError(f"there is no setting {min(unknown)!r}; choose from {', '.join(Settings.__annotations__)}")
        sampling = self._sampling(**rest)
        requests = self._requests(classes, prompts, context, negative)
        if noise is not None:
            noise = np.asarray(noise, np.float32)
            if noise.shape != (requests.count, *sampling.size, 3):
                raise UserError(
                    f"the noise has shape {noise.shape}; {requests.count} images of {sampling.size[0]}×"
                    f"{sampling.size[1]} need {(requests.count, *sampling.size, 3)}"
                )
            requests = dataclasses.replace(requests, start=noise)
        return requests, sampling

    def _sampling(
        self,
        guidance: float | Guidance | None = None,
        guidance_interval: Sequence[float] | None = None,
        num_steps: int | None = None,
        sampler: str | None = None,
        shift: float | None = None,
        seed: int | None = None,
        size: int | Sequence[int] | None = None,
    ) -> Sampling:
        """config.sample with what is given in its place, checked as a config is."""
        values = self.config.to_dict()
        rule = guidance if isinstance(guidance, Guidance) else None
        given = {
            "guidance": None if rule else guidance,
            "guidance_interval": None if guidance_interval is None else tuple(guidance_interval),
            "num_steps": num_steps,
            "sampler": sampler,
            "shift": shift,
            "seed": seed,
        }
        values["sample"] |= {name: _plain(value) for name, value in given.items() if value is not None}
        if size is not None:
            values["data"]["image_size"] = image_sides(_plain(size))
        config = config_lib.make_config(values)
        config_lib.check(config)
        sampling = Sampling.of(config)
        if rule is None:
            return sampling
        if guidance_interval is not None:
            rule = dataclasses.replace(rule, interval=sampling.guidance.interval)
        return dataclasses.replace(sampling, guidance=rule)

    def _requests(self, classes: Any, prompts: Any, context: Any, negative_prompt: str | None) -> Requests:
        ways = {"classes": classes, "prompts": prompts, "context": context}
        given = [name for name, value in ways.items() if value is not None]
        wanted = "prompts" if self.config.model.text_width else "classes"
        if len(given) != 1 or given[0] not in (wanted, "context"):
            raise UserError(
                f"this model draws {wanted}; give {wanted}=..." + (f", not {' and '.join(given)}" if given else "")
            )
        if negative_prompt and wanted == "classes":
            raise UserError("a negative prompt is for text-to-image models; this one draws classes")
        if context is not None:
            return Requests(len(context), np.asarray(context).__getitem__, self._null(negative_prompt))
        if wanted == "prompts":
            texts = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
            if not texts or not all(text.strip() for text in texts):
                raise UserError("a prompt is empty; write what the image should show")
            assert isinstance(self.condition, Texts)
            negative = self.config.sample.negative_prompt if negative_prompt is None else negative_prompt
            return requests_lib.prompt_requests(self.condition, [text.strip() for text in texts], negative, self.frozen)
        labels = requests_lib.find_classes(classes, self.num_classes, self.class_names)
        if not labels:
            raise UserError("no classes are given; classes=[0] draws one image of the first")
        return requests_lib.class_requests(labels, self.num_classes)

    def _null(self, negative_prompt: str | None) -> np.ndarray:
        if not self.config.model.text_width:
            return np.asarray(self.num_classes, np.int32)
        assert isinstance(self.condition, Texts)
        negative = self.config.sample.negative_prompt if negative_prompt is None else negative_prompt
        return requests_lib.prompt_requests(self.condition, [""], negative, self.frozen).null

    def _context(self, condition: Any, count: int) -> Any:
        """Labels int32 [count], or text features [count, length, text_width]."""
        text = bool(self.config.model.text_width)
        if isinstance(condition, (jax.Array, np.ndarray)) and (condition.ndim == 3 if text else condition.ndim == 1):
            context: Any = condition
            if not text and not isinstance(condition, jax.core.Tracer):
                context = np.asarray(requests_lib.find_classes(np.asarray(condition).tolist(), self.num_classes))
        elif text:
            prompts = [condition] if isinstance(condition, str) else list(condition)
            context = self._requests(None, prompts, None, None).context(np.arange(len(prompts)))
        else:
            context = np.asarray(requests_lib.find_classes(condition, self.num_classes, self.class_names))
        if len(context) == 1 and count > 1:
            context = np.broadcast_to(context, (count, *context.shape[1:]))
        if len(context) != count:
            raise UserError(f"{len(context)} conditions for {count} states; give one, or one for each")
        return context if text else context.astype(np.int32)

    @functools.cached_property
    def _velocity(self) -> Any:
        denoiser, mesh = self.denoiser, self.mesh

        def velocity(params: Params, x: jax.Array, t: jax.Array, context: Any) -> jax.Array:
            more = -len(x) % mesh.size  # rows that fill a batch up to what the devices divide
            x, t, context = (jnp.concatenate([a, a[:1].repeat(more, 0)]) if more else a for a in (x, t, context))
            arguments = (sharding.specs(mesh, params), *[sharding.BATCH] * 3)
            v = sharding.each_device(denoiser.velocity, mesh, arguments, sharding.BATCH)(params, x, t, context)
            return v.astype(jnp.float32)[: len(x) - more]

        return jax.jit(velocity)


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, which the config's checks know."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


# ---------------------------------------------------------------------------------------- files


def _load_checkpoint(
    where: pathlib.Path, config: ml_collections.ConfigDict, average: str, mesh: Mesh, condition: Condition | None = None
) -> Model:
    denoiser = generate.make_denoiser(config)
    params = checkpoint.load_average(where, denoiser.network.shapes, config, mesh, average)
    return Model(config, params, mesh, str(where), condition, class_names(where), denoiser)


def _load_exported(folder: pathlib.Path, average: str, mesh: Mesh) -> Model:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json beside its ema.safetensors; export it again")
    if average != "ema":
        raise UserError(f"{folder} has no average {average!r}; an exported folder has ema")
    try:
        values = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} can't be read ({error}); export it again") from error
    config = config_lib.make_config(config_lib.complete(values))
    tensors = torch_files.read_safetensors(folder / "ema.safetensors")
    return _of_tensors(folder / "ema.safetensors", tensors, config, mesh, class_names(folder))


def _load_official(path: pathlib.Path, average: str, config: ml_collections.ConfigDict | None, mesh: Mesh) -> Model:
    file = torch_files.read_lightning(path)
    found = {"ema": file.ema, "raw": file.denoiser}
    if not found.get(average):
        raise UserError(
            f"{path} has no average {average!r}; it has {', '.join(name for name, a in found.items() if a)}"
        )
    if config is None:
        config = config_lib.make_config({"model": infer.model_of(found[average], str(path))})
    return _of_tensors(path, found[average], config, mesh)


def _of_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    names: Sequence[str] | None = None,
) -> Model:
    """A model of tensors under their official names."""
    denoiser = generate.make_denoiser(config)
    shapes = sharding.placed_shapes(mesh, {"params": denoiser.network.shapes})["params"]
    arrays = deco.from_torch(config.model, tensors, like=denoiser.network.shapes, what=str(path))
    params = jax.tree.map(lambda a, leaf: jax.device_put(np.asarray(a, leaf.dtype), leaf.sharding), arrays, shapes)
    return Model(config, params, mesh, str(path), class_names=names, denoiser=denoiser)

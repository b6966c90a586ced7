"""What to draw: images of classes, of prompts, or of the data's captions, each identified by its index."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import ml_dtypes
import numpy as np

from deco_jax.conditioning import encoders
from deco_jax.conditioning.classes import Classes
from deco_jax.conditioning.condition import Condition
from deco_jax.conditioning.texts import Texts
from deco_jax.data import prompts as prompts_lib
from deco_jax.data.features import Features, number_of_caption, read_caption
from deco_jax.data.source import Source
from deco_jax.errors import UserError
from deco_jax.run import distributed


@dataclasses.dataclass(frozen=True)
class Requests:
    """Images to draw, by index.

    context: indices [n] → labels int32 [n], or features bfloat16 [n, length, text_width].
    null: the null condition: int32 [], or [length, text_width].
    names: the caption of each image; None for classes, which are drawn in order.
    labels: the class of each image, int32 [count]; None for texts.
    same_noise: start the k-th image of every label from the same noise, instead of each image from its own.
    start: states to start from instead of noise, float32 [count, height, width, 3].
    """

    count: int
    context: Callable[[np.ndarray], np.ndarray]
    null: np.ndarray
    names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    same_noise: bool = False
    start: np.ndarray | None = None

    def batch(self, first: int, size: int) -> dict[str, np.ndarray]:
        """Return images first..first + size − 1 as arrays; beyond `count`, the last one is repeated to fill the batch.

        Returns:
            "context"; "index" int32 [size], which decides the noise; and "start" if it is given.
        """
        index = np.minimum(np.arange(first, first + size), self.count - 1)
        noise = self._places[index] if self.same_noise else index
        batch = {"index": np.asarray(noise, np.int32), "context": self.context(index)}
        return batch if self.start is None else batch | {"start": self.start[index]}

    def spread(self, most: int) -> Requests:
        """Return at most `most` of the requests, evenly spaced; their noise depends on their new indices."""
        if self.count <= most:
            return self
        chosen, context = np.arange(most, dtype=np.int64) * self.count // most, self.context
        names = None if self.names is None else [self.names[i] for i in chosen.tolist()]
        labels = None if self.labels is None else self.labels[chosen]
        start = None if self.start is None else self.start[chosen]
        return Requests(most, lambda index: context(chosen[index]), self.null, names, labels, self.same_noise, start)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        assert self.labels is not None
        return _places(self.labels)

    def kept(self, batch_size: int) -> Requests:
        """Return the same with all contexts computed now, `batch_size` at a time; no encoder is needed later."""
        index = [np.arange(first, first + batch_size) for first in range(0, self.count, batch_size)]
        contexts = np.concatenate([self.context(np.minimum(i, self.count - 1)) for i in index])
        return dataclasses.replace(self, context=contexts.__getitem__)


# ---------------------------------------------------------------------------------------- classes


def class_requests(labels: Sequence[int] | np.ndarray, num_classes: int, same_noise: bool = False) -> Requests:
    """Request an image of each label, in order.

    Args:
        same_noise: start the k-th image of every class from the same noise, so that classes can be compared.
    """
    labels = np.asarray(labels, np.int32)
    null = np.asarray(num_classes, np.int32)
    return Requests(len(labels), labels.__getitem__, null, labels=labels, same_noise=same_noise)


def _places(labels: np.ndarray) -> np.ndarray:
    """Return for each label how often it occurred before, int32 [count]."""
    seen: dict[int, int] = {}
    places = np.empty(len(labels), np.int32)
    for i, label in enumerate(labels.tolist()):
        places[i] = seen[label] = seen.get(label, -1) + 1
    return places


def images_per_class(labels: np.ndarray) -> int | None:
    """Return the number of consecutive images per class; None if it differs between classes."""
    places = _places(labels)
    each = int(places.max(initial=0)) + 1
    whole = len(labels) and len(labels) % each == 0
    return each if whole and np.array_equal(places, np.arange(len(labels)) % each) else None


def grid_columns(settings: ml_collections.ConfigDict, labels: np.ndarray | None) -> int | None:
    """Return a grid's columns: settings.grid_columns, else one row per class if that works out evenly, else None."""
    each = images_per_class(labels) if labels is not None else None
    return settings.grid_columns or (each if each and each > 1 else None)


def even_labels(count: int, classes: Sequence[int]) -> np.ndarray:
    """Return `count` labels in the order of `classes`, equally many of each to within one: int32 [count]."""
    places = np.arange(count, dtype=np.int64) * len(classes) // count
    return np.asarray(classes, np.int32)[places] if len(classes) else np.zeros(count, np.int32)


def find_classes(
    chosen: Sequence[int | str] | int | str, num_classes: int, names: Sequence[str] | None = None
) -> list[int]:
    """Find the labels of classes given by number or by name.

    Args:
        chosen: one class or several. A text is a name if a class has that name, or else a number, and may hold several,
            separated by commas.
        names: of the classes in the order of their labels, as in a run's classes.json; None if they aren't known.

    Raises:
        UserError: there is no such class.
    """
    if isinstance(chosen, (jax.Array, np.ndarray)):
        chosen = np.asarray(chosen).ravel().tolist()
    if isinstance(chosen, (str, int, np.integer)):
        chosen = [chosen]
    by_name = {name: label for label, name in enumerate(names or ())}
    by_name = {name.lower(): label for name, label in by_name.items()} | by_name
    labels: list[int] = []
    for one in chosen:
        if isinstance(one, str) and not _is_class(one, by_name) and "," in one:
            labels += find_classes([part for part in one.split(",") if part.strip()], num_classes, names)
            continue
        labels.append(_find_class(one, num_classes, by_name))
    return labels


def _is_class(text: str, by_name: Mapping[str, int]) -> bool:
    return text.strip() in by_name or text.strip().lower() in by_name


def _find_class(one: int | str, num_classes: int, by_name: Mapping[str, int]) -> int:
    if isinstance(one, str):
        text = one.strip()
        if _is_class(text, by_name):
            return by_name.get(text, by_name.get(text.lower(), 0))
        if not re.fullmatch("-?[0-9]+", text):
            close = difflib.get_close_matches(text, list(by_name), n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose one from 0 to {num_classes - 1}"
            known = "" if by_name else " (this run's class names are not known)"
            raise UserError(f"there is no class {text!r}{known}; {remedy}")
        one = int(text)
    number = isinstance(one, (int, float, np.integer, np.floating)) and not isinstance(one, bool)
    if not number or int(one) != one or not 0 <= one < num_classes:
        raise UserError(f"there is no class {one}; choose one from 0 to {num_classes - 1}")
    return int(one)


# ---------------------------------------------------------------------------------------- texts


def prompt_requests(
    texts: Texts, prompts: Sequence[str], negative_prompt: str = "", frozen: Mapping[str, Any] | None = None
) -> Requests:
    """Request an image of each prompt.

    Args:
        negative_prompt: what guidance leads away from; "": the empty prompt.
        frozen: the result of `texts.load`, if already loaded.
    """
    weights = frozen["encoder"] if frozen and "encoder" in frozen else texts.load_encoder()

    def context(index: np.ndarray) -> np.ndarray:
        return texts.encode(weights, [prompts[int(i)] for i in index])

    return Requests(len(prompts), context, _null(texts, negative_prompt, weights, frozen), prompts)


def caption_requests(
    texts: Texts, count: int, negative_prompt: str = "", frozen: Mapping[str, Any] | None = None
) -> Requests:
    """Request `count` images of captions spread evenly over the data; arguments are as for `prompt_requests`."""
    names, features = captions(texts, count), texts.features
    if not isinstance(features, Features):
        # As in training, and as in stored features.
        prefixed = CaptionsOf(names.source, names.indices, texts.prefix)
        return dataclasses.replace(prompt_requests(texts, prefixed, negative_prompt, frozen), names=names)

    def context(index: np.ndarray) -> np.ndarray:
        numbers = [number_of_caption(names.source, int(i)) for i in names.indices[index]]
        return np.stack([features[number] for number in numbers]).view(ml_dtypes.bfloat16)

    if negative_prompt.strip():
        null = _null(texts, negative_prompt, None, frozen)
    else:
        null = features.null.view(ml_dtypes.bfloat16)
    return Requests(count, context, null, names)


def _null(texts: Texts, negative_prompt: str, weights: Any, frozen: Mapping[str, Any] | None) -> np.ndarray:
    """Compute the features of the negative prompt, bfloat16 [length, text_width]."""
    if frozen and not negative_prompt.strip():
        return np.asarray(frozen["null"])
    return texts.encode(texts.load_encoder() if weights is None else weights, [negative_prompt.strip()])[0]


def captions(texts: Texts, count: int) -> CaptionsOf:
    """Return the captions of `caption_requests(texts, count)`."""
    assert texts.source is not None
    return CaptionsOf(texts.source, np.arange(count, dtype=np.int64) * len(texts.source) // count)


class CaptionsOf(Sequence[str]):
    """The captions of some of a source's samples, read when they are needed.

    Args:
        prefix: for captions that are trained with it, as `encoders.prefixed` decides.
    """

    def __init__(self, source: Source, indices: np.ndarray, prefix: str = "") -> None:
        self.source, self.indices, self._prefix = source, indices, prefix

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return encoders.prefixed(read_caption(self.source, int(self.indices[i])), self._prefix)


# ---------------------------------------------------------------------------------------- by config.sample


class Prompts(NamedTuple):
    """The prompts of config.sample.prompts; image j of prompt i has the index i · images_each + j."""

    set: prompts_lib.PromptSet
    images_each: int


def open_prompts(config: ml_collections.ConfigDict) -> Prompts | None:
    """Read the prompts of config.sample; None if there are none.

    Raises:
        UserError: they can't be read, or their benchmark's layout has no place for them.
    """
    if not config.sample.prompts:
        return None
    found = prompts_lib.read_prompts(config.sample.prompts)
    if not distributed.same_on_all_hosts("\n".join([found.kind, *found.names, *found.prompts])):
        raise UserError(
            f"the hosts read different prompts from {config.sample.prompts}; use a file that all of them share"
        )
    count = config.sample.images_per_prompt or prompts_lib.images_a_prompt(found)
    prompts_lib.check_count(found, count)
    return Prompts(found, count)


def sampling_requests(
    settings: ml_collections.ConfigDict,
    condition: Condition,
    prompts: Prompts | None,
    frozen: Mapping[str, Any] | None = None,
) -> Requests:
    """Request the images of prompts, or without prompts settings.num_images images of classes or the data's captions.

    Args:
        settings: like config.sample.
        frozen: the result of `condition.load`, if already loaded.
    """
    if prompts is None:
        return data_requests(settings, condition, settings.num_images, frozen)
    assert isinstance(condition, Texts)
    each = [text for text in prompts.set.prompts for _ in range(prompts.images_each)]
    return prompt_requests(condition, each, settings.negative_prompt, frozen)


def data_requests(
    settings: ml_collections.ConfigDict, condition: Condition, count: int, frozen: Mapping[str, Any] | None = None
) -> Requests:
    """Request `count` images, spread evenly over settings.classes (by default all), or over the captions.

    Arguments are as for `sampling_requests`.
    """
    if isinstance(condition, Texts):
        return caption_requests(condition, count, settings.negative_prompt, frozen)
    assert isinstance(condition, Classes)
    classes: Sequence[int] = range(condition.num_classes)
    if settings.classes:
        classes = find_classes(settings.classes, condition.num_classes, condition.names)
        if not classes:
            raise UserError(f"config.sample.classes={settings.classes!r} names no class; leave it out to draw all")
    return class_requests(even_labels(count, classes), condition.num_classes, settings.same_noise)

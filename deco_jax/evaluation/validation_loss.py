"""The training objective on held-out images, always at the same noise and times.

Training measures it every config.train.validate_every steps, --mode=evaluate with
config.evaluate.metrics=validation_loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.texts import open_features
from deco_jax.data import imagenet, pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.method.objective import Method, make_method
from deco_jax.method.step import Draws
from deco_jax.method.training import TRAINING, Batch, load_frozen, make_observer
from deco_jax.models.network import Params, build
from deco_jax.run import checkpoint, preemption, sharding, storage

# Keeps its noise separate from that of training and samples.
VALIDATION = TRAINING + 1

# Sources that read everything below config.data.path.
WHOLE_TREES = ("captioned_folder", "webdataset", "parquet")


class ValidationLoss:
    """Scores weights by the objective's terms on config.data.validation_images images of config.data.validation_split.

    Terms that need other trained networks than the denoiser, such as REPA with its projector, are left out, because an
    average of the weights doesn't include them. Every measurement has the same images, noise, times and dropped
    conditions.

    Args:
        condition: the one of training, or of the held-out data.
        class_names: the classes of training; None if they aren't known.
        frozen: weights of the losses' frozen networks that subjects don't provide.

    Raises:
        UserError: there is no such split, it has other classes or captions without features, or too few images for a
            batch.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        condition: Condition,
        class_names: Sequence[str] | None,
        frozen: Mapping[str, Params] | None = None,
    ) -> None:
        self._config, self._mesh, self._condition = config, mesh, condition
        self._frozen = dict(frozen or {})
        held_out = held_out_config(config)
        self._source = sources.open_source(held_out.data)
        self._encode_caption = condition.encode_caption
        if held_out.text.features:
            features = open_features(held_out, self._source)
            features.check(self._source)
            self._encode_caption = features
        # A run's classes.json has ImageNet's words, its folders the WordNet numbers.
        if class_names is not None and imagenet.readable(self._source.class_names) != imagenet.readable(class_names):
            raise UserError(
                f"the classes in config.data.validation_split={config.data.validation_split} differ from those of the "
                "training images; give it a folder with the same classes"
            )
        size = config.data.batch_size
        count = min(config.data.validation_images, len(self._source)) // size * size
        if not count:
            raise UserError(
                f"the validation loss is measured on whole batches of {size} images; config.data.validation_images="
                f"{config.data.validation_images} of {len(self._source):,} images don't fill one"
            )
        self._indices = np.arange(count, dtype=np.int64) * len(self._source) // count
        method, denoiser = method_to_compare(config), build(config.model.to_dict())
        observe, self._measured = make_observer(method, condition), method.measured
        # Training has them until their loss ends; without them, the program is the same before and after.
        self._unused = make_method(config).frozen.keys() - method.frozen.keys()
        names = ["validation_loss", *(f"validation_{loss.name}" for loss in method.losses)]
        self.titles = {name: name.replace("_", " ") for name in names}

        def of_rows(params: Any, batch: Batch, draws: Draws, frozen: dict[str, Any]) -> dict[str, jax.Array]:
            loss, terms = method.objective(
                {"denoiser": params},
                batch["image"],
                draws,
                observe(frozen, batch),
                frozen,
                frozen.get("measured"),
                networks={"denoiser": denoiser},
            )
            values = {"validation_loss": loss, **{f"validation_{name}": value for name, value in terms.items()}}
            return sharding.mean_over_devices(values, mesh)

        def measure(params: Any, batch: Batch, number: jax.Array, frozen: dict[str, Any]) -> dict[str, jax.Array]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), VALIDATION), number)
            draws = method.draw(key, batch["image"].shape)._replace(keys=None)  # no dropout
            # An average has the same layout as the denoiser's parameters.
            arguments = (sharding.specs(mesh, params), sharding.BATCH, sharding.BATCH, sharding.specs(mesh, frozen))
            return sharding.each_device(of_rows, mesh, arguments, sharding.WHOLE)(params, batch, draws, frozen)

        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

    def readers(self, samples: ImageSet) -> tuple[()]:
        return ()

    def __call__(self, subject: Subject) -> Scores:
        """Return the means of the objective and its terms over the held-out images."""
        if subject.params is None:
            raise UserError(
                "the validation loss needs weights, and config.evaluate.samples has none; leave it empty, or remove "
                "validation_loss from config.evaluate.metrics"
            )
        data = self._config.data
        frozen = {**subject.frozen, **(subject.model.frozen if subject.model else {}), **self._frozen}
        frozen = {name: value for name, value in frozen.items() if name not in self._unused}
        if self._measured and "measured" not in frozen:
            assert subject.model is not None
            where = storage.path(subject.model.name)
            frozen["measured"] = checkpoint.load_measured(where, self._measured, self._mesh)
        batches = pipeline.epoch(
            self._source,
            image_sides(data.image_size),
            batch_size=data.batch_size,
            host_index=sharding.host_rank(self._mesh),
            host_count=jax.process_count(),
            num_workers=data.num_workers,
            max_unreadable=data.max_unreadable,
            indices=self._indices,
            encode_caption=self._encode_caption,
        )
        totals = dict.fromkeys(self.titles, 0.0)
        try:
            for number, batch in enumerate(batches):
                preemption.check()
                rows = {name: batch[name] for name in ("image", *self._condition.inputs)}
                placed = sharding.place_batch(self._mesh, rows)
                found = self._measure(subject.params, placed, np.int32(number), frozen)
                for name, value in jax.device_get(found).items():
                    totals[name] += float(value)
        finally:
            batches.close()
        return Scores({name: total * data.batch_size / len(self._indices) for name, total in totals.items()})


def method_to_compare(config: ml_collections.ConfigDict) -> Method:
    """Make the config's method so that its values at different steps can be compared.

    It lacks the losses that train a network of their own, which no average has, and the factor of
    config.loss.balance_start, which changes.
    """
    method = make_method(config)
    losses = tuple(loss.comparable() for loss in method.losses if not loss.trained)
    return dataclasses.replace(method, losses=losses, balance=None)


def validation_of_training(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition, source: sources.Source
) -> ValidationLoss:
    """Make the evaluator of a training.

    Args:
        condition, source: those of training.

    Raises:
        UserError: the training images include those of config.data.validation_split, or as `ValidationLoss`.
    """
    held_out_config(config)
    data = config.data
    trained = data.split or ("train" if data.source == "tfds" else "")
    if data.validation_split == trained or data.validation_split.startswith(f"{trained}/"):
        raise UserError(
            f"config.data.validation_split={data.validation_split} is part of config.data.split={data.split}; choose "
            "images that aren't trained on"
        )
    if not trained and data.source in WHOLE_TREES:
        raise UserError(
            f"config.data.split is empty, so training reads all of config.data.path, with "
            f"config.data.validation_split={data.validation_split}; set it to the subfolder of the other images"
        )
    return ValidationLoss(config, mesh, condition, source.class_names)


def held_out_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config with config.data.validation_split for its data, and that split's features.

    Raises:
        UserError: there is no such split, or its captions have no features.
    """
    if not config.data.validation_split or config.data.source in ("digits", "captioned_digits"):
        raise UserError(
            "the validation loss is measured on held-out images; give them as "
            "config.data.validation_split, a subfolder of config.data.path or a split of tfds"
        )
    if config.data.prior_path:
        raise UserError("the validation loss doesn't support config.data.prior_path; leave one of them out")
    if config.text.features and not config.text.validation_features:
        raise UserError(
            "config.text.features has the captions of training, not those of config.data.validation_split; "
            f"run --mode=encode with --config.data.split={config.data.validation_split} and another "
            "--config.text.features, and give that folder as config.text.validation_features"
        )
    if config.train.validate_every % config.train.log_every:
        raise UserError(
            f"config.train.validate_every={config.train.validate_every} must be a multiple of "
            f"config.train.log_every={config.train.log_every}: the loss goes into the same line of metrics.jsonl"
        )
    held_out = config.copy_and_resolve_references()
    held_out.data.split = config.data.validation_split
    held_out.text.features = config.text.features and config.text.validation_features
    return held_out


# ---------------------------------------------------------------------------------------- in --mode=evaluate


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError if config.data names no held-out images."""
    held_out_config(config)


def make(setup: Setup) -> ValidationLoss:
    """Make the evaluator with the losses' frozen networks; those of the condition come with the subject."""
    config, mesh = setup.config, setup.mesh
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size")
    held_out = held_out_config(config)
    condition = open_condition(held_out, mesh, sources.open_source(held_out.data))
    names = setup.folder / "classes.json"
    return ValidationLoss(
        config,
        mesh,
        condition,
        json.loads(names.read_text()) if names.is_file() else None,
        load_frozen(method_to_compare(config), mesh),
    )

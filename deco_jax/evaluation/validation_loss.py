"""The training objective on held-out images, at the same noise and times whenever it is measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from deco_jax.conditioning.condition import Condition
from deco_jax.data import pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Scores, Subject
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.method.objective import make_method
from deco_jax.method.step import Draws
from deco_jax.method.training import TRAINING, Batch, Observer
from deco_jax.models.network import Network
from deco_jax.run import sharding

# Keeps its noise apart from that of training and of samples.
VALIDATION = TRAINING + 1


class ValidationLoss:
    """Scores weights by the objective's terms on config.data.validation_images images of config.data.validation_split.

    Terms that need more trained networks than the denoiser, such as REPA with its projector, are left out: an average
    of the weights has none. Its images, noise, times and dropped conditions are those of every other measurement.

    Args:
        condition: the training's.
        observe: the training step's.

    Raises:
        UserError: there is no such split, it has other classes, or too few images for a batch.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
        condition: Condition,
        observe: Observer,
        denoiser: Network,
        class_names: list[str],
    ) -> None:
        self._config, self._mesh, self._condition = config, mesh, condition
        self._source = open_held_out(config)
        if list(self._source.class_names) != list(class_names):
            raise UserError(
                f"the classes in config.data.validation_split={config.data.validation_split} are not those that are "
                "trained on; give it a folder of the same classes"
            )
        size = config.data.batch_size
        count = min(config.data.validation_images, len(self._source)) // size * size
        if not count:
            raise UserError(
                f"the validation loss is measured on whole batches of {size} images; config.data.validation_images="
                f"{config.data.validation_images} of {len(self._source):,} make none"
            )
        self._indices = np.arange(count, dtype=np.int64) * len(self._source) // count
        method = make_method(config)
        method = dataclasses.replace(method, losses=tuple(loss for loss in method.losses if not loss.trained))
        names = ["validation_loss", *(f"validation_{loss.name}" for loss in method.losses)]
        self.titles = {name: name.replace("_", " ") for name in names}

        def of_rows(params: Any, batch: Batch, draws: Draws, frozen: dict[str, Any]) -> dict[str, jax.Array]:
            loss, terms = method.objective(
                {"denoiser": params},
                batch["image"],
                draws,
                observe(frozen, batch),
                frozen,
                networks={"denoiser": denoiser},
            )
            values = {"validation_loss": loss, **{f"validation_{name}": value for name, value in terms.items()}}
            return sharding.mean_over_devices(values, mesh)

        def measure(params: Any, batch: Batch, number: jax.Array, frozen: dict[str, Any]) -> dict[str, jax.Array]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), VALIDATION), number)
            draws = method.draw(key, batch["image"].shape)
            # The layout of an average is that of the denoiser's parameters.
            arguments = (sharding.specs(mesh, params), sharding.BATCH, sharding.BATCH, sharding.specs(mesh, frozen))
            return sharding.each_device(of_rows, mesh, arguments, sharding.WHOLE)(params, batch, draws, frozen)

        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

    def readers(self, samples: ImageSet) -> tuple[()]:
        return ()

    def __call__(self, subject: Subject) -> Scores:
        """Return the means of the objective and of its terms over the held-out images."""
        data = self._config.data
        batches = pipeline.epoch(
            self._source,
            image_sides(data.image_size),
            batch_size=data.batch_size,
            host_index=sharding.host_rank(self._mesh),
            host_count=jax.process_count(),
            num_workers=data.num_workers,
            max_unreadable=data.max_unreadable,
            indices=self._indices,
            encode_caption=self._condition.encode_caption,
        )
        totals = dict.fromkeys(self.titles, 0.0)
        try:
            for number, batch in enumerate(batches):
                rows = {name: batch[name] for name in ("image", *self._condition.inputs)}
                placed = sharding.place_batch(self._mesh, rows)
                found = self._measure(subject.params, placed, np.int32(number), dict(subject.frozen))
                for name, value in jax.device_get(found).items():
                    totals[name] += float(value)
        finally:
            batches.close()
        return Scores({name: total * data.batch_size / len(self._indices) for name, total in totals.items()})


def open_held_out(config: ml_collections.ConfigDict) -> sources.Source:
    """Open config.data.validation_split. UserError if there is none, or its captions have no features."""
    if not config.data.validation_split or config.data.source in ("digits", "captioned_digits"):
        raise UserError(
            "config.train.validate_every measures the loss on images that are not trained on; name them by "
            "config.data.validation_split, a subfolder of config.data.path or a split of tfds"
        )
    if config.data.prior_path:
        raise UserError("the held-out images have no prior; leave config.data.prior_path or train.validate_every out")
    if config.text.features:
        raise UserError(
            "config.text.features has the captions that are trained on, not those of config.data.validation_split; "
            "leave one of them empty"
        )
    if config.train.validate_every % config.train.log_every:
        raise UserError(
            f"config.train.validate_every={config.train.validate_every} must be a multiple of "
            f"config.train.log_every={config.train.log_every}: the loss goes into the same line of metrics.jsonl"
        )
    data = config.data.copy_and_resolve_references()
    data.split = config.data.validation_split
    return sources.open_source(data)

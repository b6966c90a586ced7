"""--mode=evaluate: scores a checkpoint's samples, or given images, into WORKDIR/evaluation.json."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from deco_jax import api, interrupts
from deco_jax.conditioning.requests import captions, data_requests
from deco_jax.conditioning.texts import Texts
from deco_jax.config import to_json
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.evaluation.adm import warnings_about
from deco_jax.evaluation.evaluator import (
    Evaluator,
    Scores,
    Setup,
    Subject,
    check_evaluators,
    make_evaluators,
    metric_names,
)
from deco_jax.evaluation.image_sets import ImageSet, drawn_images, folder_images, npz_images, source_images
from deco_jax.evaluation.inception_features import inception_path, open_reference
from deco_jax.evaluation.measuring import FOLDER, file_identity, read
from deco_jax.evaluation.statistics import NpzImages
from deco_jax.programs import best_of
from deco_jax.run import checkpoint, distributed, fetch, sharding, storage, tracking
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json
from deco_jax.sampling import generate


def evaluate(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write WORKDIR/evaluation.json and print it as a table; if asked to, first find the best way to draw."""
    folder, began = storage.path(workdir), time.monotonic()
    if config.train.wandb:
        distributed.on_main_host(lambda: tracking.check(config.train.wandb))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    check_evaluators(config)
    searching = best_of.wanted(config)
    model = None if config.evaluate.samples else open_model(config, workdir, checkpoint_path)
    samples = drawn_samples(config, model) if model else open_samples(config, checkpoint_path)
    reads_inception = {"adm", "kid"} & set(metric_names(config))
    warnings = warnings_about(samples, open_reference(config)) if reads_inception else []
    setup = Setup(config, folder, mesh, max(samples.total, config.evaluate.search_images if searching else 0))
    evaluators = make_evaluators(setup)
    if searching:
        best_of.check(config, model, evaluators)
    # The shared folder first: if it is refused, none has been created in the workdir yet.
    for written in (storage.path(config.evaluate.cache or folder / FOLDER), folder / FOLDER):
        make_workdir(written)
    if jax.process_index() == 0:
        for line in warnings:
            print(f"warning: {line}", flush=True)

    if searching:
        assert model is not None

        def scores_of(model: api.Model, candidate: ml_collections.ConfigDict) -> Scores:
            return score(evaluators, subject_of(drawn_samples(candidate, model), model), setup)

        config, model = best_of.search(config, model, folder, scores_of, measured_with(config))
        samples = drawn_samples(config, model)
    with interrupts.waits_for("the batch that is measured"):
        scores = score(evaluators, subject_of(samples, model), setup)
    draws = any(evaluator.readers(samples) for evaluator in evaluators)
    titles = {name: title for evaluator in evaluators for name, title in evaluator.titles.items()}
    result: dict[str, Any] = {
        **{name: scores.values.get(name) for name in titles},
        "missing": scores.missing,
        "warnings": warnings,
        **({"samples": {"from": samples.name, "images": samples.total}} if draws else {}),
        **({"weights": {"from": model.name, "average": config.sample.average}} if model else {}),
        **scores.notes,
        "config": {name: to_json(config)[name] for name in ("evaluate", "sample")},
        "seconds": round(time.monotonic() - began, 1),
    }
    if jax.process_index() == 0:
        path = folder / "evaluation.json"
        write_json(path, result)
        if searching:
            best_of.finish(folder, result)
        print(table(result, titles))
        print(f"wrote {path}")
        if config.train.wandb:
            _track(config, folder, workdir, checkpoint_path, scores.values)


def _track(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    workdir: str,
    checkpoint_path: str,
    values: Mapping[str, float],
) -> None:
    """Add the scores to the Weights & Biases run, and to the checkpoint's step if they belong to a checkpoint."""
    scores = {f"evaluation/{name}": float(value) for name, value in values.items()}
    with tracking.Tracker(config.train.wandb, folder, {}) as tracker:
        step = "" if config.evaluate.samples else checkpoint.find(workdir, checkpoint_path).name
        if step.isdigit():
            tracker.log(int(step), scores)
        tracker.summary(scores)


def measured_with(config: ml_collections.ConfigDict) -> str:
    """Return a text that changes with the reference and the Inception weights, also where their paths stay."""
    metrics = set(metric_names(config))
    found = [file_identity(inception_path(config))] if metrics & {"adm", "kid"} else []
    if config.evaluate.reference:
        found.append(file_identity(fetch.local(config.evaluate.reference)))
    elif metrics - {"clip_score"}:
        found.append(source_images(config).identity)
    return ", ".join(found)


def score(evaluators: Sequence[Evaluator], subject: Subject, setup: Setup) -> Scores:
    """Score a subject with all evaluators, reading its samples once for all of them."""
    assert subject.samples is not None
    readers = [reader for evaluator in evaluators for reader in evaluator.readers(subject.samples)]
    if len(evaluators) > 1:
        read(subject.samples, readers, setup.batch_size)
    found = [evaluator(subject) for evaluator in evaluators]
    merged = Scores({})
    for scores in found:
        merged.values.update(scores.values)
        merged.missing.update(scores.missing)
        merged.notes.update(scores.notes)
    return merged


def open_model(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str) -> api.Model:
    """Open the model whose samples are measured."""
    source = sources.open_source(config.data) if config.model.text_width else None
    return api.open_model(config, workdir, checkpoint_path, source)


def open_samples(config: ml_collections.ConfigDict, checkpoint_path: str) -> ImageSet:
    """Open the samples in config.evaluate.samples; raise UserError for anything that can't be measured."""
    path = config.evaluate.samples
    if checkpoint_path:
        raise UserError("--checkpoint draws samples, but config.evaluate.samples names existing ones; give only one")
    path = os.fspath(fetch.local(path))
    if os.path.isdir(path):
        return folder_images(pathlib.Path(path))
    if not os.path.isfile(path):
        raise UserError(f"no samples at {path} (config.evaluate.samples); give an .npz or a folder of images")
    return npz_images(NpzImages(path))


def drawn_samples(config: ml_collections.ConfigDict, model: api.Model) -> ImageSet:
    """Return the images to measure, which a model draws as config.sample says, for classes or the data's captions.

    config.sample.prompts aren't used, because they needn't show what the reference shows.
    """
    sampling, count = model.sampling(config), config.sample.num_images

    def draw(first: int) -> Iterator[np.ndarray]:
        # Done here so that a text encoder is only read if there are still images to draw.
        requests = data_requests(config.sample, model.condition, count, model.frozen)
        return model.images(requests, sampling, config.sample.batch_size, first)

    images = drawn_images(draw, count, sampling.size, f"drawn from {model.name}")
    images = images._replace(parameters=model.num_params)
    if isinstance(model.condition, Texts):
        names = captions(model.condition, count)
        return images._replace(identity=generate.fingerprint(config, model.name, names), captions=names)
    labels = data_requests(config.sample, model.condition, count).labels
    shown = None
    if model.class_names and labels is not None:
        shown = [f"a photo of a {model.class_names[label]}" for label in labels.tolist()]
    return images._replace(identity=generate.fingerprint(config, model.name), labels=labels, captions=shown)


def subject_of(samples: ImageSet, model: api.Model | None) -> Subject:
    """Return what evaluators get: samples, and the weights that drew them."""
    return Subject(samples) if model is None else Subject(samples, model.params, model=model)


def table(result: dict[str, Any], titles: Mapping[str, str]) -> str:
    """Return the scores as readable lines."""
    if "samples" in result:
        lines = [f"{result['samples']['images']:,} samples ({result['samples']['from']})"]
    else:
        lines = [f"{result['weights']['average']} of {result['weights']['from']}"]
    if "reference" in result:
        reference = result["reference"]
        lines[0] += f" against {reference['images'] or '?'} images ({reference['from']})"
    for name, title in titles.items():
        value = result[name]
        lines.append(
            f"  {title:16} {value:10.4f}" if value is not None else f"  {title:16} missing: " + result["missing"][name]
        )
    return "\n".join([*lines, *(f"  warning: {line}" for line in result["warnings"])])

"""--mode=evaluate: scores of a checkpoint's samples, or of given images, in WORKDIR/evaluation.json."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from deco_jax import api
from deco_jax.conditioning.requests import captions, data_requests
from deco_jax.conditioning.texts import Texts
from deco_jax.config import to_json
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.adm import ADM, FOLDER, inception_path, open_reference, warnings_about
from deco_jax.evaluation.evaluator import Subject
from deco_jax.evaluation.image_sets import ImageSet, drawn_images, folder_images, npz_images
from deco_jax.evaluation.statistics import NpzImages
from deco_jax.run import sharding, storage
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling


def evaluate(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write WORKDIR/evaluation.json and print it as a table."""
    folder, began = storage.path(workdir), time.monotonic()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    inception_path(config)
    samples = open_samples(config, workdir, checkpoint_path)
    warnings = warnings_about(samples, open_reference(config))
    adm = ADM(config, folder, mesh, samples.total)
    for written in (folder / FOLDER, storage.path(config.evaluate.cache or folder / FOLDER)):
        make_workdir(written)
    if jax.process_index() == 0:
        for line in warnings:
            print(f"warning: {line}", flush=True)

    scores = adm(Subject(samples))
    result = {
        **{name: scores.values.get(name) for name in TITLES},
        "missing": scores.missing,
        "warnings": warnings,
        **scores.notes,
        "config": {name: to_json(config)[name] for name in ("evaluate", "sample")},
        "seconds": round(time.monotonic() - began, 1),
    }
    if jax.process_index() == 0:
        path = folder / "evaluation.json"
        write_json(path, result)
        print(table(result))
        print(f"wrote {path}")


def open_samples(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str) -> ImageSet:
    """The samples that config.evaluate.samples says. UserError for anything that can't be measured."""
    path = config.evaluate.samples
    if not path:
        return drawn_samples(config, workdir, checkpoint_path)
    if checkpoint_path:
        raise UserError("--checkpoint draws samples and config.evaluate.samples names others; give one of them")
    path = os.fspath(storage.local(path))
    if os.path.isdir(path):
        return folder_images(pathlib.Path(path))
    if not os.path.isfile(path):
        raise UserError(f"no samples at {path} (config.evaluate.samples); give an .npz or a folder of images")
    return npz_images(NpzImages(path))


def drawn_samples(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str) -> ImageSet:
    """Images of classes or of the data's captions from a checkpoint's EMA, drawn as config.sample says and measured.

    Not of config.sample.prompts: what they show needn't be what the reference shows.
    """
    source = sources.open_source(config.data) if config.model.text_width else None
    model = api.open_model(config, workdir, checkpoint_path, source)
    sampling, count = Sampling.of(config), config.sample.num_images

    def draw(first: int) -> Iterator[np.ndarray]:
        # Here, so that a text encoder is read only where images are still to be drawn.
        requests = data_requests(config.sample, model.condition, count)
        return model.images(requests, sampling, config.sample.batch_size, first)

    names = captions(model.condition, count) if isinstance(model.condition, Texts) else None
    images = drawn_images(draw, count, sampling.size, f"drawn from {model.name}")
    return images._replace(identity=generate.fingerprint(config, model.name, names), parameters=model.num_params)


def table(result: dict[str, Any]) -> str:
    """The scores as lines for people."""
    lines = [
        f"{result['samples']['images']:,} samples ({result['samples']['from']}) against "
        f"{result['reference']['images'] or '?'} images ({result['reference']['from']})"
    ]
    for name, title in TITLES.items():
        value = result[name]
        lines.append(
            f"  {title:16} {value:10.4f}" if value is not None else f"  {title:16} missing: " + result["missing"][name]
        )
    return "\n".join([*lines, *(f"  warning: {line}" for line in result["warnings"])])

"""--mode=evaluate: FID, sFID, Inception Score, precision and recall by the ADM suite's definitions.

    samples   (drawn on the way, an .npz, a folder) ─┐
                                                     ├─ Inception ─ Accumulator ─ scores ─ WORKDIR/evaluation.json
    reference (an ADM .npz, the config's data)      ─┘

Images are read in batches and only their statistics are kept, in WORKDIR/evaluation, from where a run that was cut off
goes on. Runs that share config.evaluate.cache, a folder, use the reference that the first of them to end measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from deco_jax.conditioning.condition import Condition, open_condition
from deco_jax.conditioning.requests import Requests, captions, data_requests
from deco_jax.conditioning.texts import Texts
from deco_jax.config import to_json
from deco_jax.convert.inception import WHERE, load_inception
from deco_jax.data import pipeline, sources, transforms
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.evaluation.precision_recall import precision_recall
from deco_jax.evaluation.statistics import Accumulator, NpzImages, Statistics, read_reference, small_sample_warning
from deco_jax.models import network as network_lib
from deco_jax.models.inception import FeatureExtractor
from deco_jax.run import checkpoint, distributed, sharding, storage
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_json
from deco_jax.sampling import generate

FOLDER = "evaluation"
NEIGHBOURS = 3
SECONDS_BETWEEN_LINES = 10.0


def evaluate(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write WORKDIR/evaluation.json and print it as a table."""
    settings, began = config.evaluate, time.monotonic()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    inception = inception_path(config)
    samples = open_samples(config, workdir, checkpoint_path, mesh)
    reference = open_reference(config)
    warnings = warnings_about(samples, reference)
    extractor = FeatureExtractor(load_inception(inception), min(settings.batch_size, samples.total), mesh)
    weights = _digest(inception.read_bytes())
    folder = storage.path(workdir) / FOLDER
    for written in (folder, storage.path(settings.cache or folder)):
        make_workdir(written)
    if jax.process_index() == 0:
        for line in warnings:
            print(f"warning: {line}", flush=True)

    ours = measure(
        samples, extractor, folder / "samples.npz", weights, settings.precision_recall_samples, settings.save_every
    )
    theirs, features = reference.measure(extractor, folder, weights, config)
    scores, missing = score(ours, theirs, features, settings, mesh)
    if not extractor.has_classifier:
        missing["inception_score"] = f"{inception} has no classifier; pt_inception-2015-12-05-6726825d.pth has one"
    if theirs.mu_s is None:
        missing["sfid"] = f"{reference.name} has no 'mu_s' and 'sigma_s'"
    result = {
        **{name: scores.get(name) for name in TITLES},
        "missing": missing,
        "warnings": warnings,
        "samples": {"from": samples.name, "images": samples.total, "kept": _length(ours.pool3())},
        "reference": {"from": reference.name, "images": theirs.num_images, "kept": _length(features)},
        "neighbours": NEIGHBOURS,
        "parameters": samples.parameters,
        "inception": {"path": str(inception), "sha256": weights},
        "config": {name: to_json(config)[name] for name in ("evaluate", "sample")},
        "seconds": round(time.monotonic() - began, 1),
    }
    if jax.process_index() == 0:
        path = storage.path(workdir) / "evaluation.json"
        write_json(path, result)
        print(table(result))
        print(f"wrote {path}")


def warnings_about(samples: ImageSet, reference: ReferenceSet) -> list[str]:
    """What makes the scores less than comparable. UserError for sets too small to have any."""
    lines = []
    for count, what in ((samples.total, "samples"), (reference.num_images, "reference images")):
        if count is not None and count < 2:
            raise UserError(f"{what}: {count}; a FID needs at least 2 (50,000 is usual)")
        if count is not None:
            lines.append(small_sample_warning(count, what))
    if reference.size and reference.size != samples.size:
        lines.append(
            f"samples of {_sides(samples.size)} against reference images of {_sides(reference.size)}: "
            "a FID across sizes also counts what resizing does"
        )
    return [line for line in lines if line] + reference.notes


def score(
    samples: Accumulator, reference: Statistics, features: np.ndarray | None, settings: Any, mesh: Mesh
) -> tuple[dict[str, float], dict[str, str]]:
    """The scores that can be had, and why the others can't.

    Args:
        features: the reference's pool3 [n, 2048] for precision and recall, if there are any.
    """
    stats = samples.statistics()
    scores = {"fid": frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)}
    missing: dict[str, str] = {}
    if reference.mu_s is not None and reference.sigma_s is not None and stats.mu_s is not None:
        scores["sfid"] = frechet_distance(stats.mu_s, stats.sigma_s, reference.mu_s, reference.sigma_s)  # type: ignore[arg-type]
    inception_score = samples.inception_score()
    if inception_score is not None:
        scores["inception_score"] = inception_score
    ours = samples.pool3()
    if not settings.precision_recall_samples or not settings.precision_recall_reference:
        reason = "turned off: config.evaluate.precision_recall_samples or precision_recall_reference is 0"
    elif features is None:
        reason = "the reference has no images ('arr_0')"
    elif min(_length(ours), _length(features)) <= NEIGHBOURS:
        reason = f"needs more than {NEIGHBOURS} images on both sides"
    else:
        assert ours is not None
        scores["precision"], scores["recall"] = precision_recall(features, ours, NEIGHBOURS, mesh=mesh)
        return scores, missing
    return scores, {"precision": reason, "recall": reason}


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


# ---------------------------------------------------------------------------------------- measuring


def inception_path(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where the weights are. UserError, with where to get them, if they aren't."""
    path = config.evaluate.inception
    if not path:
        raise UserError(f"config.evaluate.inception is empty; give the path of the Inception weights: {WHERE}")
    path = os.fspath(storage.local(path))
    if not os.path.isfile(path):
        raise UserError(f"no Inception weights at {path} (config.evaluate.inception); {WHERE}")
    return pathlib.Path(path)


def measure(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: pathlib.Path | None,
    weights: str,
    num_kept: int,
    save_every: int,
    say: Callable[[str], None] | None = None,
) -> Accumulator:
    """All statistics of a set, saved to `path` every `save_every` images and gone on with from there.

    Args:
        weights: digest of the Inception weights.
        num_kept: how many images' pool3 to keep, evenly spread over the set; 0: none.
    """
    num_kept = min(num_kept, images.total)
    fingerprint = measured_from(images, weights, num_kept)
    state = _load(path, fingerprint) or Accumulator(bool(num_kept), fingerprint=fingerprint)
    say = say or (lambda text: print(text, flush=True) if jax.process_index() == 0 else None)
    if state.count:
        say(f"{images.name}: {state.count:,} of {images.total:,} images are measured already")
    saved, spoke, began, first = state.count, time.monotonic(), time.monotonic(), state.count
    batches = images.batches(extractor.batch_size, state.count) if state.count < images.total else iter(())
    for batch in rebatched(batches, extractor.batch_size):
        index = np.arange(state.count, state.count + len(batch))
        state.add(extractor(batch), (index + 1) * num_kept // images.total > index * num_kept // images.total)
        done = state.count == images.total
        if path is not None and (done or state.count - saved >= save_every):
            if jax.process_index() == 0:
                state.save(path)
            saved = state.count
        if done or time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            speed = (state.count - first) / (spoke - began)
            say(f"{images.name}: {state.count:,} of {images.total:,} images measured, {speed:.3g} a second")
    return state


def rebatched(batches: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, however many each of `batches` brings; the last may be smaller."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= size:
            whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            yield whole[:size]
            waiting = [whole[size:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def measured_from(images: ImageSet, weights: str, num_kept: int) -> str:
    """Names everything that the statistics of a set depend on, as `measure` takes it."""
    return f"{images.identity} x {images.total}, weights {weights}, {min(num_kept, images.total)} kept"


def _load(path: pathlib.Path | None, fingerprint: str) -> Accumulator | None:
    """What was measured before, if it is of the same; on several hosts, if all of them can read it."""
    state = Accumulator.load(path) if path is not None and path.exists() else None
    if state is not None and state.fingerprint != fingerprint:
        state = None
    count = 0 if state is None else state.count
    return state if distributed.all_hosts(distributed.from_main_host(count) == count) else None


# ---------------------------------------------------------------------------------------- samples


def open_samples(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str, mesh: Mesh) -> ImageSet:
    """The samples that config.evaluate.samples says. UserError for anything that can't be measured."""
    path = config.evaluate.samples
    if not path:
        return drawn_samples(config, workdir, checkpoint_path, mesh)
    if checkpoint_path:
        raise UserError("--checkpoint draws samples and config.evaluate.samples names others; give one of them")
    path = os.fspath(storage.local(path))
    if os.path.isdir(path):
        return folder_images(pathlib.Path(path))
    if not os.path.isfile(path):
        raise UserError(f"no samples at {path} (config.evaluate.samples); give an .npz or a folder of images")
    return npz_images(NpzImages(path))


def npz_images(images: NpzImages) -> ImageSet:
    """The images of an .npz."""
    status = images.path.stat()
    identity = f"{images.path.absolute()} {images.key} {status.st_size} {status.st_mtime_ns}"
    _, height, width, _ = images.shape
    return ImageSet(str(images.path), identity, len(images), (height, width), images.batches)


def folder_images(folder: pathlib.Path) -> ImageSet:
    """All images under a folder, by path. UserError if there are none, or they are not of one size."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in sources.IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(sources.IMAGE_SUFFIXES)}); check the path")
    listing = "".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    size = _header(files[0])
    for path in files:
        if _header(path) != size:
            raise UserError(
                f"{path} is {_sides(_header(path))} pixels and {files[0].name} {_sides(size)}; "
                "samples must be of one size"
            )

    def batches(batch_size: int, start: int) -> Iterator[np.ndarray]:
        for first in range(start, len(files), batch_size):
            yield np.stack([_pixels(path) for path in files[first : first + batch_size]])

    return ImageSet(str(folder), f"{folder.absolute()} {_digest(listing.encode())}", len(files), size, batches)


def _header(path: pathlib.Path) -> tuple[int, int]:
    """(height, width) as the file's beginning says."""
    with _readable(path), Image.open(path) as picture:
        return picture.height, picture.width


def _pixels(path: pathlib.Path) -> np.ndarray:
    with _readable(path):
        return np.asarray(transforms.decode(str(path)))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on a damaged file PIL raises nearly anything
        raise UserError(f"the image {path} can't be read ({error}); remove or replace it") from error


def drawn_samples(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str, mesh: Mesh) -> ImageSet:
    """Images of classes or of the data's captions from a checkpoint's EMA, drawn as config.sample says and measured.

    Not of config.sample.prompts: what they show needn't be what the reference shows.
    """
    where = checkpoint.find(workdir, checkpoint_path, config)
    network = network_lib.build(config.model.to_dict())
    source = sources.open_source(config.data) if config.model.text_width else None
    condition = open_condition(config, mesh, source)
    generator = generate.make_generator(network, config, mesh)

    def batches(_: int, start: int) -> Iterator[np.ndarray]:
        params = checkpoint.load_average(where, network.shapes, config, mesh)
        requests = data_requests(config.sample, condition, config.sample.num_images)
        return generate.generate_images(generator, params, requests, config.sample.batch_size, mesh, start)

    size = image_sides(config.data.image_size)
    name, count = f"drawn from {where}", config.sample.num_images
    names = captions(condition, count) if isinstance(condition, Texts) else None
    identity = generate.fingerprint(config, where, names)
    return ImageSet(name, identity, count, size, batches, network.num_params)


# ---------------------------------------------------------------------------------------- reference


class ReferenceSet(NamedTuple):
    """What samples are compared with: statistics that are known, images, or both."""

    name: str
    statistics: Statistics | None
    images: ImageSet | None
    notes: list[str]

    @property
    def num_images(self) -> int | None:
        """Images behind its statistics; None where a file doesn't say."""
        if self.statistics is not None:
            return self.statistics.num_images
        return self.images.total if self.images else None

    @property
    def size(self) -> tuple[int, int] | None:
        return self.images.size if self.images else None

    def measure(
        self, extractor: FeatureExtractor, folder: pathlib.Path, weights: str, config: ml_collections.ConfigDict
    ) -> tuple[Statistics, np.ndarray | None]:
        """Its statistics, and the pool3 features for precision and recall (None without images).

        Args:
            folder: where what is measured is kept, unless config.evaluate.cache names another.
        """
        settings, measured = config.evaluate, None
        num_kept = settings.precision_recall_reference if settings.precision_recall_samples else 0
        if self.images is not None and (self.statistics is None or num_kept):
            path = folder / "reference.npz"
            if settings.cache:  # where several may lie
                named = _digest(measured_from(self.images, weights, num_kept).encode())
                path = storage.path(settings.cache) / f"reference_{named[:16]}.npz"
            measured = measure(self.images, extractor, path, weights, num_kept, settings.save_every)
        statistics = self.statistics
        if statistics is None:
            assert measured is not None
            statistics = measured.statistics()
        return statistics, measured.pool3() if measured else None


def open_reference(config: ml_collections.ConfigDict) -> ReferenceSet:
    """The ADM .npz of config.evaluate.reference, else the images of config.data."""
    path = config.evaluate.reference
    if not path:
        images = source_images(config)
        return ReferenceSet(images.name, None, images, [])
    file = read_reference(path)
    return ReferenceSet(
        str(path), file.statistics, npz_images(file.images) if file.images else None, list(file.warnings)
    )


def source_images(config: ml_collections.ConfigDict) -> ImageSet:
    """config.evaluate.num_reference images of config.data, evenly spread, prepared as for training but not mirrored."""
    data, wanted = config.data, config.evaluate.num_reference
    source = sources.open_source(data)
    count = min(wanted, len(source)) if wanted else len(source)
    indices = np.arange(count, dtype=np.int64) * len(source) // count
    size = image_sides(data.image_size)

    def batches(batch_size: int, start: int) -> Iterator[np.ndarray]:
        read = pipeline.epoch(
            source,
            size,
            batch_size=batch_size,
            num_workers=data.num_workers,
            max_unreadable=data.max_unreadable,
            indices=indices[start:],
        )
        try:
            for batch in read:
                yield batch["image"]
        finally:
            read.close()

    identity = json.dumps(
        [
            data.source,
            os.path.abspath(data.path) if os.path.exists(data.path) else data.path,
            data.split,
            size,
            len(source),
            source.class_names,
            _contents(source, indices),
        ]
    )
    where = " ".join(part for part in (data.source, data.path, data.split) if part)
    return ImageSet(f"data {where}", _digest(identity.encode()), count, size, batches)


def _contents(source: sources.Source, indices: np.ndarray) -> str:
    """Digest of the names and bytes of up to 200 of the images, evenly spread: all would take as long as measuring."""
    digest = hashlib.sha256()
    for i in indices[np.linspace(0, len(indices) - 1, min(len(indices), 200)).astype(int)]:
        digest.update(source.name(int(i)).encode())
        with contextlib.suppress(Exception):  # unreadable images are counted where they are measured
            image = source[int(i)]["image"]
            digest.update(pathlib.Path(image).read_bytes() if isinstance(image, str) else bytes(image))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- during training


class QuickFID:
    """FID of a few samples every config.evaluate.every steps, on the way of a training.

    Its number is comparable along a run only: few samples give a higher FID than the usual 50,000. The reference's
    statistics are taken at the first call and kept in WORKDIR/evaluation, or in config.evaluate.cache.

    Raises:
        UserError: no weights, no reference.
    """

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh) -> None:
        inception = inception_path(config)
        self._config, self._mesh = config, mesh
        self._folder = folder / FOLDER
        self._reference = open_reference(config)
        self._weights = _digest(inception.read_bytes())
        count = config.evaluate.during_training_images
        self._extractor = FeatureExtractor(load_inception(inception), min(config.evaluate.batch_size, count), mesh)
        self._count = count
        self._requests: Requests | None = None
        self._statistics = self._reference.statistics

    def due(self, step: int) -> bool:
        return step % self._config.evaluate.every == 0

    def __call__(
        self, generator: generate.Generator, params: Any, condition: Condition, frozen: dict[str, Any]
    ) -> float:
        """FID of the samples of a generator's weights, of all classes or of the data's captions."""
        if self._statistics is None:
            self._statistics, _ = self._reference.measure(self._extractor, self._folder, self._weights, self._config)
        size = image_sides(self._config.data.image_size)
        requests = self._requests = self._requests or data_requests(self._config.sample, condition, self._count, frozen)

        def batches(_: int, start: int) -> Iterator[np.ndarray]:
            return generate.generate_images(
                generator, params, requests, self._config.sample.batch_size, self._mesh, start
            )

        images = ImageSet("samples", "", self._count, size, batches)
        measured = measure(images, self._extractor, None, self._weights, 0, 1, say=lambda text: None).statistics()
        return frechet_distance(measured.mu, measured.sigma, self._statistics.mu, self._statistics.sigma)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def _length(array: np.ndarray | None) -> int:
    return 0 if array is None else len(array)

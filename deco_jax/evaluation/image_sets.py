"""Sets of images to measure, in a fixed order and read in batches: from an .npz, a folder, the data, or a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from PIL import Image

from deco_jax.data import pipeline, sources, transforms
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation.statistics import NpzImages


class ImageSet(NamedTuple):
    """`total` images to measure, in a fixed order."""

    name: str  # for people
    identity: str  # equal for equal images
    total: int
    size: tuple[int, int]  # (height, width)
    batches: Callable[[int, int], Iterator[np.ndarray]]  # (batch size, first) → uint8 [n, height, width, 3]
    parameters: int | None = None  # number of parameters of the model that draws them
    labels: np.ndarray | None = None  # class labels, int [total]
    captions: Sequence[str] | None = None  # what the images should show


def drawn_images(
    draw: Callable[..., Iterator[np.ndarray]], count: int, size: tuple[int, int], name: str = "samples"
) -> ImageSet:
    """Return a set of images that are drawn when they are measured, and not kept.

    Args:
        draw: (first=) → images first..count − 1, batch by batch.
    """
    return ImageSet(name, "", count, size, lambda _, first: draw(first=first))


def npz_images(images: NpzImages) -> ImageSet:
    """Return the images of an .npz as a set."""
    status = images.path.stat()
    identity = f"{images.path.absolute()} {images.key} {status.st_size} {status.st_mtime_ns}"
    _, height, width, _ = images.shape
    return ImageSet(str(images.path), identity, len(images), (height, width), images.batches)


def folder_images(folder: pathlib.Path) -> ImageSet:
    """Return all images under a folder, sorted by path, with classes if the names have them as --mode=sample's do.

    Raises:
        UserError: there are none, or they differ in size.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in sources.IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(sources.IMAGE_SUFFIXES)}); check the path")
    listing = "".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    size = _header(files[0])
    for path in files:
        if _header(path) != size:
            raise UserError(
                f"{path} has {sides(_header(path))} pixels and {files[0].name} has {sides(size)}; "
                "all samples must have the same size"
            )

    def batches(batch_size: int, start: int) -> Iterator[np.ndarray]:
        for first in range(start, len(files), batch_size):
            yield np.stack([_pixels(path) for path in files[first : first + batch_size]])

    named = [re.search(r"_class_(\d+)$", path.stem) for path in files]
    labels = np.array([int(match[1]) for match in named if match])
    identity = f"{folder.absolute()} {digest(listing.encode())}"
    return ImageSet(
        str(folder), identity, len(files), size, batches, labels=labels if len(labels) == len(files) else None
    )


def _header(path: pathlib.Path) -> tuple[int, int]:
    """Return (height, width) from the file's header."""
    with _readable(path), Image.open(path) as picture:
        return picture.height, picture.width


def _pixels(path: pathlib.Path) -> np.ndarray:
    with _readable(path):
        return np.asarray(transforms.decode(str(path)))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL may raise nearly anything on a damaged file
        raise UserError(f"the image {path} can't be read ({error}); remove or replace it") from error


def source_images(config: ml_collections.ConfigDict) -> ImageSet:
    """Return config.evaluate.num_reference evenly spaced images of config.data, as in training but not mirrored."""
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
    return ImageSet(f"data {where}", digest(identity.encode()), count, size, batches)


def _contents(source: sources.Source, indices: np.ndarray) -> str:
    """Digest the names and bytes of up to 200 evenly spaced images; all of them would take as long as measuring."""
    digest = hashlib.sha256()
    for i in indices[np.linspace(0, len(indices) - 1, min(len(indices), 200)).astype(int)]:
        digest.update(source.name(int(i)).encode())
        with contextlib.suppress(Exception):  # measuring counts unreadable images
            image = source[int(i)]["image"]
            digest.update(pathlib.Path(image).read_bytes() if isinstance(image, str) else bytes(image))
    return digest.hexdigest()


def rebatched(batches: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the same images in batches of `size`, whatever the sizes of `batches`; the last one may be smaller."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= size:
            whole = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            yield whole[:size]
            waiting = [whole[size:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def digest(data: bytes) -> str:
    """Return the SHA-256 of the data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sides(size: tuple[int, ...]) -> str:
    """Return (height, width) as text."""
    return f"{size[0]}x{size[1]}"

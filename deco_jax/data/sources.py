"""Where images come from: embedded digits, class folders, TensorFlow Datasets, and images with captions.

A source knows how many samples there are and hands out one by index, still encoded; it decodes nothing. Sources are
pickled to worker processes, so they stay small and import neither JAX nor TFDS until they need it.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_collections
import numpy as np

from deco_jax.data import prepared
from deco_jax.data.captioned_folder import CaptionedFolder
from deco_jax.data.mixture import Mixture
from deco_jax.data.parquet import Parquet
from deco_jax.data.prepared import Prepared
from deco_jax.data.prior import WithPrior
from deco_jax.data.source import IMAGE_SUFFIXES, Source, parse_weights, printable
from deco_jax.data.transforms import image_sides
from deco_jax.data.webdataset import WebDataset
from deco_jax.errors import UserError
from deco_jax.run import storage

# The last three have captions instead of classes; parquet and prepared have either.
SOURCES = (
    "digits",
    "image_folder",
    "tfds",
    "parquet",
    "prepared",
    "captioned_digits",
    "captioned_folder",
    "webdataset",
)

SEVERAL_CAPTIONS = ("captioned_folder", "webdataset", "parquet", "prepared")


class Digits(Source):
    """1,797 handwritten digits, 8×8 gray, in ten classes; nothing to download.

    The test set of E. Alpaydin and C. Kaynak's "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository (doi.org/10.24432/C50P49), CC BY 4.0, as scikit-learn distributes it; levels 0..16 scaled to 0..255.
    """

    def __init__(self) -> None:
        with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
            self._images = np.round(file["images"] * (255 / 16)).astype(np.uint8)
            self._labels = file["labels"]
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        return f"digit {index}"

    def next_of_class(self, index: int) -> int:
        return _next_equal(lambda i: self._labels[i], index, len(self))


class CaptionedDigits(Digits):
    """The digits with captions instead of classes, "a handwritten seven": text-to-image with nothing to download."""

    NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self) -> None:
        super().__init__()
        self.class_names = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "label": 0, "caption": f"a handwritten {self.NAMES[sample['label']]}"}

    def next_of_class(self, index: int) -> int:
        return (index + 1) % len(self)


class ImageFolder(Source):
    """`root/<class>/.../*.jpg|jpeg|png|webp`, at any depth: ImageNet's layout.

    The classes are the first-level folders in sorted order, as in torchvision. Hidden files and folders are passed
    over, a class without images is an error. Images are ordered by class, then by path.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        try:
            if storage.is_remote(root):
                self.class_names, listings = _list_remote(root)
                return self._arrange(listings)
            with os.scandir(root) as entries:
                self.class_names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            folders = [os.path.join(root, name) for name in self.class_names]
            # On network disks listing is waiting, which threads share.
            with ThreadPoolExecutor(16) as pool:
                listings = list(pool.map(_list_images, folders))
        except OSError as error:
            raise UserError(f"cannot list the images in {root}: {error}; check path and permissions") from error
        self._arrange(listings)

    def _arrange(self, listings: list[tuple[bytes, np.ndarray]]) -> None:
        root = self._root
        if not listings:
            raise UserError(f"{root} has no class folders; put the images into {os.path.join(root, '<class>')}/")
        if not any(counts := [len(ends) for _, ends in listings]):
            raise UserError(f"{root} has class folders without images ({', '.join(IMAGE_SUFFIXES)}); check the path")
        if 0 in counts:
            empty = os.path.join(root, self.class_names[counts.index(0)])
            raise UserError(f"the class folder {empty} holds no images; fill it, or remove it if it is not a class")
        # One buffer of names instead of a million strings: workers get a copy of it.
        self._names = b"".join(names for names, _ in listings)
        lengths = np.concatenate([np.diff(ends, prepend=0) for _, ends in listings])
        self._ends = np.cumsum(lengths)  # where each name ends in the buffer
        self._class_ends = np.cumsum(counts)  # where each class ends among the samples

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        return {"image": storage.read(path) if storage.is_remote(path) else path, "label": self._label(index)}

    def _label(self, index: int) -> int:
        return int(np.searchsorted(self._class_ends, index, side="right"))

    def _path(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[start : self._ends[index]])
        return os.path.join(self._root, self.class_names[self._label(index)], name)

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def next_of_class(self, index: int) -> int:
        label = self._label(index)
        if index + 1 < self._class_ends[label]:
            return index + 1
        return int(self._class_ends[label - 1]) if label else 0


def _list_images(folder: str) -> tuple[bytes, np.ndarray]:
    """List the paths of all images under a folder, sorted and relative to it, as one buffer and their ends in it."""

    def walk(path: str, prefix: str) -> Iterator[bytes]:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield os.fsencode(prefix + entry.name)
                elif entry.is_dir():
                    yield from walk(entry.path, f"{prefix}{entry.name}/")

    names = sorted(walk(folder, ""))
    return b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64)


def _list_remote(root: str) -> tuple[list[str], list[tuple[bytes, np.ndarray]]]:
    """List the classes under a folder of a bucket, each with what `_list_images` returns."""
    classes: dict[str, list[bytes]] = {}
    with storage.answering(root):
        names = list(storage.tree(root))
    for name in names:
        first, _, rest = name.partition("/")
        if rest and not any(part.startswith(".") for part in name.split("/")):
            found = classes.setdefault(first, [])
            if rest.lower().endswith(IMAGE_SUFFIXES):
                found.append(os.fsencode(rest))
    listings = [sorted(classes[name]) for name in sorted(classes)]
    return sorted(classes), [(b"".join(n), np.cumsum([len(name) for name in n], dtype=np.int64)) for n in listings]


class Tfds(Source):
    """A dataset that TensorFlow Datasets prepared as ArrayRecords, with features `image` and `label`.

    `path` is the folder that holds its `dataset_info.json`, or a TFDS name such as `cifar10`, which is downloaded
    and prepared first (into $TFDS_DATA_DIR or ~/tensorflow_datasets). Reading never needs TensorFlow; TFDS itself
    needs it to prepare datasets whose images it has to encode (CIFAR-10) or decode, and then says so.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        self._split = split
        self._folder = path if storage.path(path).is_dir() else _prepare(path)
        try:
            features = self._builder.info.features
            self.class_names = list(features["label"].names)
            if "image" not in features:
                raise KeyError("image")
            self._length = len(self._records)
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} needs the features 'image' and 'label' (class labels): {error}") from error
        except Exception as error:  # TFDS has its own error types for each of these
            message = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot read the split '{split}' of {path} as ArrayRecords: {message}; "
                "path is the folder that holds dataset_info.json, prepared with file_format='array_record'"
            ) from error

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._folder)

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        return self._builder.as_data_source(split=self._split, decoders={"image": tfds.decode.SkipDecoding()})

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {key: value for key, value in self.__dict__.items() if key not in ("_builder", "_records")}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[index]
        except Exception as error:
            raise UserError(f"{self.name(index)} is damaged ({error}); prepare the dataset again") from error
        return {"image": record["image"], "label": int(record["label"])}

    def name(self, index: int) -> str:
        return f"{self._folder} {self._split} record {index}"

    def next_of_class(self, index: int) -> int:
        return _next_equal(lambda i: self[i]["label"], index, len(self))


def _prepare(name: str) -> str:
    """Return the folder of a TFDS dataset; download and prepare it where it isn't there yet."""
    import tensorflow_datasets as tfds

    if os.sep in name:
        raise UserError(f"no such folder: {name}; data.path is a prepared TFDS folder, or the name of a TFDS dataset")
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
    except ImportError as error:
        message = str(error).strip().split("\n")[-1]
        raise UserError(
            f"TFDS itself needs another package to prepare '{name}': {message}; install it for this one time, or "
            "prepare the dataset elsewhere with file_format='array_record' and give its folder as data.path"
        ) from error
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        raise UserError(f"TFDS cannot prepare '{name}': {message}; give a TFDS name or a prepared folder") from error
    return str(builder.data_dir)


def _next_equal(label: Any, index: int, length: int) -> int:
    wanted = label(index)
    return next((i % length for i in range(index + 1, index + length) if label(i % length) == wanted), index)


def open_source(data: Any) -> Source:
    """Open the source that the `data` section of a config names: `source`, `path`, `split`.

    `split` of a folder is a subfolder (`train`; empty for none), of a TFDS dataset a TFDS split (empty for `train`), of
    Parquet files a subfolder or how their names begin.
    Of the sources with captions only images of at least `image_size` are taken; they read many headers in
    `num_workers` processes. Raises UserError for an unknown source, a missing folder, a folder without images.
    """
    if data.get("prior_path"):
        return _open_with_prior(data)
    if data.get("weights"):
        return _open_mixture(data)
    path, split = os.path.expanduser(data.get("path") or ""), data.get("split") or ""
    if data.source not in SOURCES:
        raise UserError(f"unknown data.source '{data.source}'; choose one of {', '.join(SOURCES)}")
    captions = parse_weights(data.get("captions") or "")
    if captions and data.source not in SEVERAL_CAPTIONS:
        raise UserError(
            f"config.data.captions={data.captions} draws among several captions, but the source {data.source} has "
            f"none; choose one of {', '.join(SEVERAL_CAPTIONS)}, or leave it empty"
        )
    if data.source == "digits":
        return Digits()
    if data.source == "captioned_digits":
        return CaptionedDigits()
    if not path:
        raise UserError(f"data.path is empty; set --config.data.path=FOLDER for the source {data.source}")
    if data.source in ("tfds", "prepared") and path.startswith("s3://"):
        raise UserError(
            f"{path} can't be read: ArrayRecord's reader opens disks and gs:// only; mount the bucket, copy the folder "
            "to a disk, or keep tars (webdataset) or Parquet files there"
        )
    if data.source == "tfds":
        return Tfds(path, split or "train")
    if data.source == "parquet":
        return Parquet(path, split, (data.image_column, data.label_column, data.caption_column), captions)
    if data.source == "prepared":
        root = os.path.join(path, split) if split else path
        if split and prepared.is_complete(path) and not prepared.is_complete(root):
            raise UserError(
                f"config.data.split={split}: prepared data of a split are in a subfolder of that name, which {path} "
                f"lacks; run --mode=prepare with --workdir={root}, or leave the split empty"
            )
        stored = Prepared(root, captions, image_sides(data.image_size))
        if stored.cropped and data.get("random_crop"):
            raise UserError(
                f"config.data.random_crop needs whole images, but {root} has cropped ones; set it to False, or prepare "
                "the data again with --config.data.prepared_images=files"
            )
        return stored
    root = os.path.join(path, split) if split else path
    with storage.answering(root):
        where = storage.path(root)
        there = where.is_dir() or (data.source == "webdataset" and where.is_file())
    if not there:
        raise UserError(f"no such folder: {root}; set --config.data.path (and --config.data.split, its subfolder)")
    if data.source == "image_folder":
        return ImageFolder(root)
    captioned = CaptionedFolder if data.source == "captioned_folder" else WebDataset
    return captioned(root, image_sides(data.image_size), data.get("num_workers") or 0, captions)


def _open_mixture(data: Any) -> Mixture:
    """Open the datasets whose comma-separated paths are in data.path, with the shares of data.weights."""
    try:
        weights = [float(weight) for weight in data.weights.split(",")]
    except ValueError as error:
        raise UserError(f"config.data.weights={data.weights} must be comma-separated numbers, such as 3,1") from error
    paths = [path.strip() for path in data.path.split(",")]
    settings = {name: data[name] for name in data}
    parts = [open_source(ml_collections.ConfigDict({**settings, "path": path, "weights": ""})) for path in paths]
    return Mixture(parts, weights)


def _open_with_prior(data: Any) -> WithPrior:
    """Open the dataset of data.path together with the one of data.prior_path."""
    if data.get("weights"):
        raise UserError("config.data.prior_path only works with one dataset; leave config.data.weights empty")
    settings = {name: data[name] for name in data} | {"prior_path": ""}
    mine, prior = (ml_collections.ConfigDict({**settings, "path": path}) for path in (data.path, data.prior_path))
    return WithPrior(open_source(mine), open_source(prior))


def check_classes(source: Source, num_classes: int) -> None:
    """Raise UserError unless the source has as many classes as the model (none on both sides: captions)."""
    if source.num_classes and not num_classes:
        raise UserError(
            f"the data has {source.num_classes} classes, but the model takes captions; set --config.data.source to "
            "captioned_folder, webdataset or captioned_digits"
        )
    if num_classes and not source.num_classes:
        raise UserError(
            f"the data has captions, but the model has {num_classes} classes; choose a text-to-image config, or set "
            "--config.data.source to image_folder or tfds"
        )
    if source.num_classes != num_classes:
        raise UserError(
            f"the data has {source.num_classes} classes, but the model has {num_classes}; "
            f"set --config.model.num_classes={source.num_classes} or check data.path"
        )

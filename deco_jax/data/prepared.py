"""A dataset prepared once by --mode=prepare, so that training only reads: ArrayRecord shards on a disk or in gs://.

    FOLDER/prepared.json             what it was made from, the classes, and the samples of each shard; written last
    FOLDER/00000.array_record, ...   a record per sample: lengths, header, caption, image
    FOLDER/00000.json, ...           a shard's labels, and the images left out; written after the shard

Samples keep their order. Images are cropped as in training, so training on them equals training on the source, to the
bit; `files` stores the unchanged files.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from deco_jax.data import transforms
from deco_jax.data.source import Source, printable
from deco_jax.errors import UserError
from deco_jax.run import files, storage

INDEX = "prepared.json"
KINDS = ("pixels", "png", "files")
LENGTHS = struct.Struct("<III")  # of the header, the caption, the image
VERSION = 1


def encode(sample: dict[str, Any], kind: str, size: tuple[int, int]) -> bytes:
    """A sample of a source as a record. Raises what PIL raises for an image that can't be read."""
    image, shape = sample["image"], None
    if kind == "files" and not isinstance(image, np.ndarray):
        data = image if isinstance(image, bytes) else _read(image)
        with Image.open(io.BytesIO(data)) as picture:  # what is no image is found now
            picture.load()
    else:
        pixels = np.asarray(transforms.decode(image))
        if kind != "files":
            pixels = transforms.center_crop(Image.fromarray(pixels), size)
        if kind == "pixels":
            data, shape = pixels.tobytes(), pixels.shape
        else:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            data = buffer.getvalue()
    values = {"label": int(sample["label"]), "shape": shape, "captioned": "caption" in sample}
    if "captions" in sample:
        values["captions"] = sample["captions"]
    header = json.dumps(values).encode()
    caption = sample.get("caption", "").encode()
    return LENGTHS.pack(len(header), len(caption), len(data)) + header + caption + data


def decode(record: bytes) -> dict[str, Any]:
    """The sample of a record, as a source gives it."""
    lengths = LENGTHS.unpack_from(record)
    if LENGTHS.size + sum(lengths) != len(record):
        raise ValueError("a record of another length than it says")
    ends = np.cumsum([LENGTHS.size, *lengths])
    header, caption, data = (record[a:b] for a, b in itertools.pairwise(ends))
    values = json.loads(header)
    image = data if values["shape"] is None else np.frombuffer(data, np.uint8).reshape(values["shape"])
    sample = {"image": image, "label": values["label"]}
    if "captions" in values:
        return {**sample, "captions": values["captions"]}
    return {**sample, "caption": caption.decode()} if values["captioned"] else sample


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def write_shard(source: Source, indices: range, folder: str, number: int, kind: str, size: tuple[int, int]) -> None:
    """Write a shard and then its note, each as a whole. Images that can't be read are left out and noted by name."""
    from array_record.python.array_record_module import ArrayRecordWriter

    labels, left_out = [], []
    with files.whole(os.path.join(folder, f"{number:05d}.array_record")) as part:
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        try:
            for index in indices:
                try:
                    sample = source[index]
                    record = encode(sample, kind, size)
                except UserError:
                    raise
                except Exception as error:  # on a damaged file PIL raises nearly anything
                    left_out.append(f"{source.name(index)}: {str(error)[:200]}")
                    continue
                writer.write(record)
                labels.append(int(sample["label"]))
        finally:
            writer.close()
    with files.whole(os.path.join(folder, f"{number:05d}.json")) as part:
        part.write_text(json.dumps({"labels": labels, "left_out": left_out}))


def is_complete(root: str) -> bool:
    """Return whether a folder holds what --mode=prepare has finished."""
    return (storage.path(root) / INDEX).exists()


class Prepared(Source):
    """What --mode=prepare has written into a folder.

    Args:
        captions: weights of several captions of an image; they may be others than the data was prepared with, of the
            same names in the same order.
        image_size: (height, width) to which the images will be cropped, if it is known.

    Attributes:
        cropped: (height, width) to which the images were cropped when they were stored; None for whole images.

    Raises:
        UserError: the folder is not complete, or not such a folder, or has smaller images.
    """

    def __init__(
        self, root: str, captions: Mapping[str, float] | None = None, image_size: tuple[int, int] | None = None
    ) -> None:
        self._root = root
        self.caption_weights = tuple((captions or {}).values())
        try:
            index = json.loads((storage.path(root) / INDEX).read_text())
            self.class_names = [str(name) for name in index["class_names"]]
            self._counts = [int(count) for count in index["counts"]]
            with (storage.path(root) / "labels.npy").open("rb") as file:
                self._labels = np.load(io.BytesIO(file.read()))
            names = index.get("captions", [])
            self.cropped = tuple(index["image_size"]) if index.get("images", "files") != "files" else None
        except FileNotFoundError:
            raise UserError(
                f"{root} has no complete {INDEX}; run --mode=prepare with --workdir={root}, which continues where it "
                "stopped"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root}/{INDEX} can't be read ({error}); prepare the data again") from error
        if image_size and self.cropped and (image_size[0] > self.cropped[0] or image_size[1] > self.cropped[1]):
            raise UserError(
                f"{root} was prepared with config.data.image_size={self.cropped}, which is smaller than {image_size}; "
                "prepare the data again at that size"
            )
        if names != list(captions or {}):
            like = ",".join(f"{name}=1" for name in names)
            raise UserError(
                f"{root} was prepared with config.data.captions={like or 'empty'}, in number and order of the names; "
                "give these with weights of your choice"
            )

    @functools.cached_property
    def _records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = (os.path.join(self._root, f"{number:05d}.array_record") for number in range(len(self._counts)))
        return ArrayRecordDataSource([f"{path}[0:{n}]" for path, n in zip(shards, self._counts, strict=True) if n])

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return decode(self._records[index])
        except Exception as error:
            raise UserError(f"{self.name(index)} can't be read ({error}); prepare the data again") from error

    def captions(self, index: int) -> list[str]:
        sample = self[index]
        return sample["captions"] if self.caption_weights else [sample["caption"]]

    def name(self, index: int) -> str:
        return printable(f"{self._root} record {index}")

    def next_of_class(self, index: int) -> int:
        if not self.class_names:
            return (index + 1) % len(self)
        same = np.flatnonzero(self._labels == self._labels[index])
        return int(same[(np.searchsorted(same, index) + 1) % len(same)])

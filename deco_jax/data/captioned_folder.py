"""Captioned images in folders: `NAME.jpg` with `NAME.txt` beside it."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from deco_jax.data.captioned_pairs import (
    BAD_CAPTION,
    BROKEN,
    MAX_CAPTION_BYTES,
    NO_CAPTION,
    NO_IMAGE,
    OTHER,
    EmptyCaptionError,
    PairIndex,
    Shard,
    header_size,
    map_in_chunks,
    parse_caption,
    select_large,
    walk,
)
from deco_jax.data.source import IMAGE_SUFFIXES, Source, printable
from deco_jax.errors import UserError
from deco_jax.run import storage

# From this many headers on, starting processes to read them pays off, because their own work then takes the time.
MANY_PAIRS_OF_FILES = 20_000

FOLDER_PAIR = np.dtype([("width", "<u4"), ("height", "<u4"), ("name_size", "<u2")])


class CaptionedFolder(Source):
    """`root/.../NAME.jpg|jpeg|png|webp`, each with a caption `NAME.txt` (UTF-8) beside it, at any depth.

    Hidden files and folders are ignored. Samples are ordered by folder, then by name. Images with a side below that of
    `image_size`, (height, width), are left out, and so are those whose header or caption can't be read.

    Many headers are read in `num_workers` processes.

    Args:
        captions: weights of several captions of an image, by name: "txt" is NAME.txt, which always exists, and any
            other X is NAME.X.txt, which may be missing; empty: only NAME.txt.

    Raises:
        UserError: the folder can't be listed, or no pair can be used.
    """

    def __init__(
        self, root: str, image_size: tuple[int, int], num_workers: int = 0, captions: Mapping[str, float] | None = None
    ) -> None:
        self._root = root
        self.class_names = []
        self._suffixes = ["" if name == "txt" else f".{name}" for name in captions or {"txt": 1.0}]
        self.caption_weights = tuple((captions or {}).values())
        shards = _index_folders(root, num_workers)
        keeps, self._notes = select_large(root, shards, image_size, "folder")
        self._folders = list(shards)
        self._folder_ends = np.cumsum([int(keep.sum()) for keep in keeps])
        # One buffer of names instead of a million strings: workers get a copy of it.
        names, lengths = [], []
        for shard, keep in zip(shards.values(), keeps, strict=True):
            sizes = shard.pairs["name_size"].astype(np.int64)
            letters = np.frombuffer(shard.names, np.uint8)
            names.append(letters[np.repeat(keep, sizes)].tobytes())
            lengths.append(sizes[keep])
        self._names = b"".join(names)
        self._ends = np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self._ends)

    def _path(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        folder = self._folders[int(np.searchsorted(self._folder_ends, index, side="right"))]
        return os.path.join(self._root, folder, os.fsdecode(self._names[start : self._ends[index]]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        image = storage.read(path) if storage.is_remote(path) else path
        if self.caption_weights:
            return {"image": image, "label": 0, "captions": self.captions(index)}
        return {"image": image, "label": 0, "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        return super().caption(index) if self.caption_weights else _read_caption(self._path(index))

    def captions(self, index: int) -> list[str]:
        found = []
        for suffix in self._suffixes:
            try:
                found.append(_read_caption(self._path(index), suffix))
            except (FileNotFoundError, EmptyCaptionError):
                found.append("")
        return found

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def next_of_class(self, index: int) -> int:
        return (index + 1) % len(self)

    def notes(self) -> str:
        return self._notes


def _read_caption(image_path: str, suffix: str = "") -> str:
    path = os.path.splitext(image_path)[0] + suffix + ".txt"
    if storage.is_remote(path):
        return parse_caption(storage.read(path)[: MAX_CAPTION_BYTES + 1], is_json=False)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{path} is not a file of at most {MAX_CAPTION_BYTES} bytes")
    with open(path, "rb") as file:
        return parse_caption(file.read(), is_json=False)


def _index_folders(root: str, num_workers: int) -> dict[str, Shard]:
    """Index all folders under root that hold anything: {relative path: what is in it}."""
    index = PairIndex(root, "captioned_folder", FOLDER_PAIR)
    try:
        folders = {folder: names for folder, names in walk(root) if names}
    except OSError as error:
        raise UserError(f"cannot list the images in {root}: {error}; check path and permissions") from error
    files = [os.path.join(root, folder, name) for folder, names in folders.items() for name in names]
    stamps: Iterator[bytes]
    if storage.is_remote(root):
        stamp_of = storage.tree(root)
        names_below = [os.path.join(folder, name) for folder, names in folders.items() for name in names]
        stamps = (f"{stamp_of.get(name, 'gone')}\n".encode() for name in names_below)
    else:
        stamps = iter(map_in_chunks(_stamp, files, 0))
    keys, stale = {}, []
    for folder, names in folders.items():
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(os.fsencode(name) + b"\0" + next(stamps))
        keys[folder] = digest.hexdigest()
        if not index.knows(folder, keys[folder]):
            stale.append(folder)

    pairs, skips = {}, {}
    for folder in stale:
        split = [os.path.splitext(name) for name in folders[folder]]
        images = [(stem, end) for stem, end in split if end.lower() in IMAGE_SUFFIXES]
        captions, stems = {stem for stem, end in split if end == ".txt"}, {stem for stem, _ in images}
        pairs[folder] = [stem + end for stem, end in images if stem in captions]
        skips[folder] = collections.Counter(
            {
                NO_CAPTION: len(images) - len(pairs[folder]),
                # NAME.X.txt is another caption of NAME.jpg.
                NO_IMAGE: sum(not {stem, os.path.splitext(stem)[0]} & stems for stem in captions),
                OTHER: len(split) - len(images) - len(captions),
            }
        )
    images_of_pairs = [os.path.join(root, folder, name) for folder in stale for name in pairs[folder]]
    found = iter(
        map_in_chunks(_look_at_pair, images_of_pairs, num_workers if len(images_of_pairs) > MANY_PAIRS_OF_FILES else 0)
    )
    for folder in stale:
        rows: list[tuple[int, int, int]] = []
        kept: list[bytes] = []
        for name in pairs[folder]:
            size = next(found)
            if isinstance(size, str):
                skips[folder][size] += 1
            else:
                kept.append(os.fsencode(name))
                rows.append((*size, len(kept[-1])))
        index.add(folder, Shard(keys[folder], np.array(rows, FOLDER_PAIR), b"".join(kept), dict(skips[folder])))
    return index.finish(folders)


def _stamp(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:
        return b"gone\n"
    return f"{status.st_size} {status.st_mtime_ns}\n".encode()


def _look_at_pair(path: str) -> tuple[int, int] | str:
    """Return (width, height) of an image with a usable caption, or the reason why it can't be used."""
    try:
        if storage.is_remote(path):
            data = storage.read(path)
            size = header_size(io.BytesIO(data), len(data))
            return size if isinstance(size, str) else _with_caption(path, size)
        if not os.path.isfile(path):  # opening a pipe would wait forever
            return BROKEN
        with open(path, "rb") as file:
            size = header_size(file, os.fstat(file.fileno()).st_size)
    except OSError:
        return BROKEN
    return size if isinstance(size, str) else _with_caption(path, size)


def _with_caption(path: str, size: tuple[int, int]) -> tuple[int, int] | str:
    try:
        _read_caption(path)
    except (OSError, ValueError):
        return BAD_CAPTION
    return size

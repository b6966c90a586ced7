"""Finds pairs of an image and a caption, with the size of each image, and keeps them in an index.

Only headers are read: no pixel is decoded and no archive is unpacked. Unusable pairs are counted by reason. The index
stores the sizes of all images, so it works for every target size. The two layouts are in `captioned_folder.py` and
`webdataset.py`.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from absl import logging
from PIL import Image

from deco_jax.data.workers import follow_main
from deco_jax.errors import UserError
from deco_jax.run import files, storage

MAX_PIXELS = 89_478_485  # where PIL begins to suspect a decompression bomb
MAX_IMAGE_BYTES = 2**30
MAX_CAPTION_BYTES = 2**20
CAPTION_FIELDS = ("caption", "text", "prompt")  # of a JSON object, the first that is a text
FORMATS = ("JPEG", "PNG", "WEBP")
SECONDS_BETWEEN_SAVES = 60.0
VERSION = 1

# The reasons for leaving something out, as printed.
NO_CAPTION = "images without a caption"
NO_IMAGE = "captions without an image"
BAD_CAPTION = "captions that are empty or can't be read"
BROKEN = "broken images"
OVERSIZED = f"images above {MAX_PIXELS / 1e6:.0f} megapixels"
UNSAFE = "members named outside their archive"
SPECIAL = "links and special members"
OTHER = "other files"
DAMAGED = "damaged archives"


class Shard(NamedTuple):
    """What the headers of one folder or tar say."""

    key: str  # changes when the files do
    pairs: np.ndarray  # FOLDER_PAIR or TAR_PAIR [pairs], in the order of the samples
    names: bytes  # of a folder: the pairs' image names, one after the other
    skipped: dict[str, int]  # reason → count, whatever the target size


def parse_captions(data: bytes, is_json: bool, fields: Sequence[str]) -> list[str]:
    """Return the captions in the fields of a .json, "" for what isn't there; of a .txt its text as the first.

    Raises:
        ValueError: none is there, or as `parse_caption`.
    """
    if not is_json:
        return [parse_caption(data, False), *[""] * (len(fields) - 1)]
    found = []
    for field in fields:
        try:
            found.append(parse_caption(data, True, (field,)))
        except EmptyCaptionError:
            found.append("")
    if not any(found):
        raise EmptyCaptionError("an empty caption")
    return found


class EmptyCaptionError(ValueError):
    """There is no caption where one was looked for."""


def parse_caption(data: bytes, is_json: bool, fields: Sequence[str] = CAPTION_FIELDS) -> str:
    """Return the caption in a .txt, or in the first of the fields of a .json that has one, without white space around.

    Raises:
        ValueError: it is empty, not UTF-8, not JSON, or has no such field.
    """
    text = data.decode("utf-8-sig")
    if is_json:
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        texts = [values.get(field) for field in fields]
        text = next((value for value in texts if isinstance(value, str) and value.strip()), "")
    text = text.strip()
    text.encode()  # JSON can spell half of a surrogate pair, which is no text
    if not text:
        raise EmptyCaptionError("an empty caption")
    return text


def select_large(
    root: str, shards: dict[str, Shard], image_size: tuple[int, int], what: str
) -> tuple[list[np.ndarray], str]:
    """Select the pairs that are large enough, bool [pairs] per shard; also return a line on what was left out."""
    height, width = image_size
    keeps = [(shard.pairs["height"] >= height) & (shard.pairs["width"] >= width) for shard in shards.values()]
    used, found = sum(int(keep.sum()) for keep in keeps), sum(len(keep) for keep in keeps)
    skipped = collections.Counter({f"images smaller than {height}x{width}": found - used})
    for shard in shards.values():
        skipped.update(shard.skipped)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count)
    if not used:
        raise UserError(
            f"no pair of an image and a caption in {root} can be used (skipped: {reasons or 'nothing, it is empty'}); "
            f"check data.path and data.image_size"
        )
    holding = sum(bool(len(keep)) for keep in keeps)
    notes = f"{used:,} images with captions in {holding:,} {what}{'' if holding == 1 else 's'}"
    return keeps, f"{notes}; skipped: {reasons or 'nothing'}"


def walk(root: str, folder: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with its sorted files, hidden ones left out."""
    if storage.is_remote(root):
        yield from storage.walk(root)
        return
    names: list[str] = []
    folders: list[str] = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else names).append(entry.name)
    yield folder, sorted(names)
    for name in sorted(folders):
        yield from walk(root, os.path.join(folder, name))


def header_size(file: BinaryIO, num_bytes: int) -> tuple[int, int] | str:
    """Return (width, height) from an image's header, or the reason why it can't be used."""
    if num_bytes > MAX_IMAGE_BYTES:
        return OVERSIZED
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return OVERSIZED
    except Exception:  # PIL may raise nearly anything on a damaged file
        return BROKEN
    return OVERSIZED if width * height > MAX_PIXELS else (width, height)


class PairIndex:
    """Shards by relative path, stored in a file beside the data, or in a cache folder if that isn't writable.

    Any number of processes may read and write it at once: the file is only replaced as a whole, by a correct one.
    """

    def __init__(self, root: str, kind: str, pair: np.dtype) -> None:
        self._kind, self._pair = kind, pair
        folder, name = (root, "") if storage.path(root).is_dir() else os.path.split(root)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        where = root if storage.is_remote(root) else os.path.realpath(root)
        place = hashlib.sha256(os.fsencode(f"{kind} {where}")).hexdigest()[:32]
        self._paths = [
            os.path.join(folder, f".{name}{'.' if name else ''}{kind}.index.npz"),
            os.path.join(cache, "deco_jax", f"{place}.index.npz"),
        ]
        self._shards: dict[str, list[Shard]] = {}
        for path in self._paths:
            for name, shard in self._load(path).items():
                self._shards.setdefault(name, []).append(shard)
        self._known: dict[str, Shard] = {}
        self._changed, self._saved_at = False, time.monotonic()

    def knows(self, name: str, key: str) -> bool:
        shard = next((shard for shard in self._shards.get(name, []) if shard.key == key), None)
        if shard is not None:
            self._known[name] = shard
        return shard is not None

    def add(self, name: str, shard: Shard) -> None:
        self._known[name] = shard
        self._changed = True

    def finish(self, names: Iterable[str]) -> dict[str, Shard]:
        """Return all shards in the order of their names; save them if there is anything new."""
        if self._changed:
            self._save()
        return {name: self._known[name] for name in names}

    def save_sometimes(self) -> bool:
        """Save what is known so far if that was long ago."""
        if time.monotonic() - self._saved_at < SECONDS_BETWEEN_SAVES:
            return False
        self._save()
        return True

    def _rules(self) -> list[Any]:
        return [VERSION, self._kind, MAX_PIXELS, MAX_IMAGE_BYTES, MAX_CAPTION_BYTES]

    def _load(self, path: str) -> dict[str, Shard]:
        try:
            # np.load would leave a file open that is not what it seems.
            with storage.path(path).open("rb") as opened, np.load(opened) as file:
                table, pairs, names = json.loads(file["table"].tobytes()), file["pairs"], file["names"].tobytes()
            counts, sizes = [row[2] for row in table["shards"]], [row[3] for row in table["shards"]]
            if table["rules"] != self._rules() or pairs.dtype != self._pair:
                return {}
            if sum(counts) != len(pairs) or sum(sizes) != len(names):
                raise ValueError("cut short")
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever is wrong with it, it can be rebuilt
            logging.warning("the index %s can't be read (%s) and is rebuilt", path, error)
            return {}
        shards, pair_at, name_at = {}, 0, 0
        for name, key, count, size, skipped in table["shards"]:
            shards[name] = Shard(key, pairs[pair_at : pair_at + count], names[name_at : name_at + size], skipped)
            pair_at, name_at = pair_at + count, name_at + size
        return shards

    def _save(self) -> None:
        self._changed, self._saved_at = False, time.monotonic()
        known = self._known
        if not any(len(shard.pairs) for shard in known.values()):
            return  # nothing worth a file in a folder that may be the wrong one
        rows = [[name, s.key, len(s.pairs), len(s.names), s.skipped] for name, s in known.items()]
        arrays = {
            "table": np.frombuffer(json.dumps({"rules": self._rules(), "shards": rows}).encode(), np.uint8),
            "pairs": np.concatenate([shard.pairs for shard in known.values()]),
            "names": np.frombuffer(b"".join(shard.names for shard in known.values()), np.uint8),
        }
        for path in self._paths:
            try:
                with files.whole(path, shared=True) as part, part.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # of the names that arrays may not have
                return
            except OSError as error:
                problem = error
        logging.warning("the index can't be stored and will be rebuilt each time: %s", problem)


Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_pool(num_workers: int) -> Executor:
    """Make a pool of processes, or of threads where the work isn't enough for two: reading is mostly waiting."""
    if num_workers < 2:
        return ThreadPoolExecutor(16)
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), follow_main)


def map_in_chunks(function: Callable[[Item], Result], items: list[Item], num_workers: int) -> list[Result]:
    """Yield the function's value for each item, in order."""
    chunks = [items[i : i + 64] for i in range(0, len(items), 64)]
    with worker_pool(num_workers) as pool:
        return [result for part in pool.map(functools.partial(_apply, function), chunks) for result in part]


def _apply(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]

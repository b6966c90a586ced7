"""Images with captions: pairs of files in folders, or pairs of members in tar archives.

    folders or tars ─ unchanged ones: from the index file · others: headers read, index written ─ pairs large enough

The headers say which pairs there are and how large their images are; what can't be used is counted by reason. No
pixel is decoded and no archive unpacked. The index keeps the sizes of all images, so it serves every target size.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from absl import logging
from numpy.lib import recfunctions
from PIL import Image

from deco_jax.data.source import IMAGE_SUFFIXES, Source, printable
from deco_jax.data.workers import follow_main
from deco_jax.errors import UserError
from deco_jax.run import files

MAX_PIXELS = 89_478_485  # where PIL begins to suspect a decompression bomb
MAX_IMAGE_BYTES = 2**30
MAX_CAPTION_BYTES = 2**20
CAPTION_FIELDS = ("caption", "text", "prompt")  # of a JSON object, the first that is a text
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_OPEN_TARS = 64  # a process
SECONDS_BETWEEN_SAVES = 60.0
# From where on it pays to start processes for reading headers, as their own work is what takes the time.
MANY_BYTES_OF_TARS = 2**30
MANY_PAIRS_OF_FILES = 20_000
VERSION = 1

# Why something is left out, as it is said.
NO_CAPTION = "images without a caption"
NO_IMAGE = "captions without an image"
BAD_CAPTION = "captions that are empty or can't be read"
BROKEN = "broken images"
OVERSIZED = f"images above {MAX_PIXELS / 1e6:.0f} megapixels"
UNSAFE = "members named outside their archive"
SPECIAL = "links and special members"
OTHER = "other files"
DAMAGED = "damaged archives"

FOLDER_PAIR = np.dtype([("width", "<u4"), ("height", "<u4"), ("name_size", "<u2")])
TAR_PAIR = np.dtype(
    [
        ("width", "<u4"),
        ("height", "<u4"),
        ("image_at", "<i8"),
        ("image_size", "<u4"),
        ("caption_at", "<i8"),
        ("caption_size", "<u4"),
        ("json", "?"),
    ]
)


class Shard(NamedTuple):
    """What the headers of one folder or tar say."""

    key: str  # changes when the files do
    pairs: np.ndarray  # FOLDER_PAIR or TAR_PAIR [pairs], in the order of the samples
    names: bytes  # of a folder: the pairs' image names, one after the other
    skipped: dict[str, int]  # reason → count, whatever the target size


class CaptionedFolder(Source):
    """`root/.../NAME.jpg|jpeg|png|webp`, each with a caption `NAME.txt` (UTF-8) beside it, at any depth.

    Hidden files and folders are passed over. Samples are ordered by folder, then by name. Images with a side below
    that of `image_size`, (height, width), are left out, and so are those whose header or caption can't be read.

    Many headers are read in `num_workers` processes.

    Raises:
        UserError: the folder can't be listed, or no pair can be used.
    """

    def __init__(self, root: str, image_size: tuple[int, int], num_workers: int = 0) -> None:
        self._root = root
        self.class_names = []
        shards = _index_folders(root, num_workers)
        keeps, self._notes = _select(root, shards, image_size, "folder")
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
        return {"image": self._path(index), "label": 0, "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        return _read_caption(self._path(index))

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def next_of_class(self, index: int) -> int:
        return (index + 1) % len(self)

    def notes(self) -> str:
        return self._notes


class WebDataset(Source):
    """Tar archives with members `KEY.jpg|jpeg|png|webp` and `KEY.txt` or `KEY.json`, as WebDataset lays them out.

    `root` is a folder with .tar files at any depth, or one of them. A JSON caption is an object with the field
    caption, text or prompt; `KEY.txt` goes before it. Samples are ordered by archive, then by position, and read by
    seeking: nothing is unpacked. Left out is the same as in CaptionedFolder, and members whose name leaves the
    archive (absolute, or with ..), links, and what lies behind the first damage in an archive.

    Many headers are read in `num_workers` processes.

    Raises:
        UserError: the archives can't be listed or opened, or no pair can be used.
    """

    def __init__(self, root: str, image_size: tuple[int, int], num_workers: int = 0) -> None:
        self._root = root
        self.class_names = []
        shards = _index_tars(root, num_workers)
        keeps, self._notes = _select(root, shards, image_size, "archive")
        self._tars = [os.path.join(root, name) if name else root for name in shards]
        self._tar_ends = np.cumsum([int(keep.sum()) for keep in keeps])
        fields = ["image_at", "image_size", "caption_at", "caption_size", "json"]
        kept = [shard.pairs[fields][keep] for shard, keep in zip(shards.values(), keeps, strict=True)]
        self._pairs = recfunctions.repack_fields(np.concatenate(kept))

    @functools.cached_property
    def _files(self) -> _OpenFiles:
        return _OpenFiles()

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {key: value for key, value in self.__dict__.items() if key != "_files"}

    def __len__(self) -> int:
        return len(self._pairs)

    def _tar(self, index: int) -> str:
        return self._tars[int(np.searchsorted(self._tar_ends, index, side="right"))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        tar, pair = self._tar(index), self._pairs[index]
        image = self._files.read(tar, int(pair["image_at"]), int(pair["image_size"]))
        return {"image": image, "label": 0, "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        pair = self._pairs[index]
        data = self._files.read(self._tar(index), int(pair["caption_at"]), int(pair["caption_size"]))
        return parse_caption(data, bool(pair["json"]))

    def name(self, index: int) -> str:
        tar, at = self._tar(index), int(self._pairs[index]["image_at"])
        place = f"at byte {at}"
        try:  # The member's header comes just before it; of a long or foreign name it has only a part, or "?".
            member = tarfile.TarInfo.frombuf(self._files.read(tar, at - 512, 512), "utf-8", "surrogateescape").name
            place = f"{member} ({place})"
        except (OSError, tarfile.TarError):
            pass
        return printable(f"{tar}: {place}")

    def next_of_class(self, index: int) -> int:
        return (index + 1) % len(self)

    def notes(self) -> str:
        return self._notes


def parse_caption(data: bytes, is_json: bool) -> str:
    """The caption in a .txt, or in a .json with one of CAPTION_FIELDS, without white space around it.

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
        texts = [values.get(field) for field in CAPTION_FIELDS]
        text = next((value for value in texts if isinstance(value, str) and value.strip()), "")
    text = text.strip()
    text.encode()  # JSON can spell half of a surrogate pair, which is no text
    if not text:
        raise ValueError("an empty caption")
    return text


def _read_caption(image_path: str) -> str:
    path = os.path.splitext(image_path)[0] + ".txt"
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{path} is no file of at most {MAX_CAPTION_BYTES} bytes")
    with open(path, "rb") as file:
        return parse_caption(file.read(), is_json=False)


def _select(
    root: str, shards: dict[str, Shard], image_size: tuple[int, int], what: str
) -> tuple[list[np.ndarray], str]:
    """Of each shard which pairs are large enough, bool [pairs], and the line that says what was left out."""
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


# ---------------------------------------------------------------------------------------- folders


def _index_folders(root: str, num_workers: int) -> dict[str, Shard]:
    """Relative path → what is in the folder, for all folders under root with anything in them."""
    index = _Index(root, "captioned_folder", FOLDER_PAIR)
    try:
        folders = {folder: names for folder, names in _walk(root) if names}
    except OSError as error:
        raise UserError(f"cannot list the images in {root}: {error}; check path and permissions") from error
    files = [os.path.join(root, folder, name) for folder, names in folders.items() for name in names]
    stamps = iter(_map(_stamp, files, 0))
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
                NO_IMAGE: len(captions - stems),
                OTHER: len(split) - len(images) - len(captions),
            }
        )
    images_of_pairs = [os.path.join(root, folder, name) for folder in stale for name in pairs[folder]]
    found = iter(_map(_look_at_pair, images_of_pairs, num_workers if len(images_of_pairs) > MANY_PAIRS_OF_FILES else 0))
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


def _walk(root: str, folder: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each folder with its sorted files, the hidden ones left out."""
    names: list[str] = []
    folders: list[str] = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else names).append(entry.name)
    yield folder, sorted(names)
    for name in sorted(folders):
        yield from _walk(root, os.path.join(folder, name))


def _stamp(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:
        return b"gone\n"
    return f"{status.st_size} {status.st_mtime_ns}\n".encode()


def _look_at_pair(path: str) -> tuple[int, int] | str:
    """(width, height) of an image with a good caption, or why it can't be used."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait forever
            return BROKEN
        with open(path, "rb") as file:
            size = _image_size(file, os.fstat(file.fileno()).st_size)
    except OSError:
        return BROKEN
    if isinstance(size, tuple):
        try:
            _read_caption(path)
        except (OSError, ValueError):
            return BAD_CAPTION
    return size


def _image_size(file: BinaryIO, num_bytes: int) -> tuple[int, int] | str:
    """(width, height) from an image's header, or why it can't be used."""
    if num_bytes > MAX_IMAGE_BYTES:
        return OVERSIZED
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return OVERSIZED
    except Exception:  # on a damaged file PIL raises nearly anything
        return BROKEN
    return OVERSIZED if width * height > MAX_PIXELS else (width, height)


# ---------------------------------------------------------------------------------------- archives


def _index_tars(root: str, num_workers: int) -> dict[str, Shard]:
    """Relative path → what is in the archive, for all archives under root; "" for root itself."""
    index = _Index(root, "webdataset", TAR_PAIR)
    try:
        if os.path.isdir(root):
            files = [os.path.join(folder, name) for folder, names in _walk(root) for name in names]
            names = sorted(name for name in files if name.lower().endswith(".tar"))
        else:
            names = [""]
        paths = {name: os.path.join(root, name) if name else root for name in names}
        status = {name: os.stat(path) for name, path in paths.items()}
        if not names:
            raise UserError(f"{root} holds no .tar archive; check data.path")
        keys = {name: f"{s.st_size} {s.st_mtime_ns}" for name, s in status.items()}
        stale = [name for name in names if not index.knows(name, keys[name])]
        many = sum(status[name].st_size for name in stale) > MANY_BYTES_OF_TARS
        with _pool(min(num_workers, len(stale)) if many else 0) as pool:
            looked_at = pool.map(look_into_tar, [paths[name] for name in stale])
            for done, (name, (pairs, skipped)) in enumerate(zip(stale, looked_at, strict=True), 1):
                index.add(name, Shard(keys[name], pairs, b"", skipped))
                if index.save_sometimes():
                    logging.info("indexed %d of %d archives in %s", done, len(stale), root)
    except OSError as error:
        raise UserError(f"cannot read the archives in {root}: {error}; check path and permissions") from error
    return index.finish(names)


class _Group:
    """The members of one key."""

    def __init__(self) -> None:
        self.images: list[tuple[int, int, int, int]] = []  # width, height, position, bytes
        self.has_image = False  # usable or not
        self.captions: dict[str, tuple[int, int]] = {}  # suffix → position, bytes


def look_into_tar(path: str) -> tuple[np.ndarray, dict[str, int]]:
    """The usable pairs of an archive, TAR_PAIR [pairs] by position, and what was left out, by reason.

    Raises:
        OSError: the file can't be opened.
    """
    rows: list[tuple[Any, ...]] = []
    skipped: collections.Counter[str] = collections.Counter()
    groups: dict[str, _Group] = {}

    with open(path, "rb") as file:
        descriptor = file.fileno()

        def finish(group: _Group) -> None:
            if not group.has_image:
                skipped[NO_IMAGE] += 1
                return
            for suffix in (".txt", ".json"):
                at, size = group.captions.get(suffix, (0, 0))
                try:
                    parse_caption(os.pread(descriptor, size, at), suffix == ".json")
                except (OSError, ValueError):
                    continue
                rows.extend((*image, at, size, suffix == ".json") for image in group.images)
                return
            skipped[BAD_CAPTION if group.captions else NO_CAPTION] += len(group.images)

        last = ""
        for key, suffix, at, size in _members(file, skipped):
            # What belongs together usually lies together: then only one group is held at a time.
            if key != last and last in groups and groups[last].has_image and groups[last].captions:
                finish(groups.pop(last))
            group, last = groups.setdefault(key, _Group()), key
            if suffix in IMAGE_SUFFIXES:
                group.has_image = True
                found = _image_size(io.BufferedReader(_Part(descriptor, at, size)), size)
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    group.images.append((*found, at, size))
            else:
                # One that is too long is kept as an empty one, which is no caption.
                group.captions[suffix] = (at, size if size <= MAX_CAPTION_BYTES else 0)
        for group in groups.values():
            finish(group)
    rows.sort(key=lambda row: row[2])
    return np.array(rows, TAR_PAIR), {reason: count for reason, count in skipped.items() if count}


def _members(file: BinaryIO, skipped: collections.Counter[str]) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, position, bytes) of the images and captions in a tar, as far as it is whole."""
    end = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closed below; the file is the caller's
    except Exception:  # on damaged headers tarfile raises nearly anything
        skipped[DAMAGED] += 1
        return
    with archive:
        while True:
            try:
                member = archive.next()
            except Exception:
                skipped[DAMAGED] += 1
                return
            if member is None:
                break
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            name = member.name.replace("\\", "/")
            key, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if member.isdir():
                continue
            if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
                skipped[UNSAFE] += 1
            elif not member.isreg() or member.issparse():
                skipped[SPECIAL] += 1
            elif suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
                skipped[OTHER] += 1
            else:
                # What the end of the file cuts off has nothing in it.
                yield key, suffix, member.offset_data, member.size if member.offset_data + member.size <= end else 0
        # A header that makes no sense ends tarfile's reading in silence; the proper end is empty.
        if any(os.pread(file.fileno(), 512, archive.offset)):
            skipped[DAMAGED] += 1


class _Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._descriptor, count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _OpenFiles:
    """Parts of files by path; the files used last stay open. Several threads may read."""

    def __init__(self) -> None:
        self._files: collections.OrderedDict[str, _File] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_TARS:
                self._files.popitem(last=False)
        data = os.pread(file.descriptor, size, start)
        if len(data) != size:
            raise OSError(f"{path} has become shorter")
        return data


class _File:
    """Open as long as anyone holds it, so that no thread closes what another reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


# ---------------------------------------------------------------------------------------- the index file


class _Index:
    """Shards by relative path, kept in a file beside the data or, where that can't be written, in a cache folder.

    Any number of processes may read and write it at once: a file is replaced as a whole, by a true one.
    """

    def __init__(self, root: str, kind: str, pair: np.dtype) -> None:
        self._kind, self._pair = kind, pair
        folder, name = (root, "") if os.path.isdir(root) else os.path.split(root)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        place = hashlib.sha256(os.fsencode(f"{kind} {os.path.realpath(root)}")).hexdigest()[:32]
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
        """All shards in the order of their names; saved if there is anything new."""
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
            with open(path, "rb") as opened, np.load(opened) as file:
                table, pairs, names = json.loads(file["table"].tobytes()), file["pairs"], file["names"].tobytes()
            counts, sizes = [row[2] for row in table["shards"]], [row[3] for row in table["shards"]]
            if table["rules"] != self._rules() or pairs.dtype != self._pair:
                return {}
            if sum(counts) != len(pairs) or sum(sizes) != len(names):
                raise ValueError("cut short")
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever is wrong with it, it can be made again
            logging.warning("the index %s can't be read (%s) and is made again", path, error)
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
        logging.warning("the index can't be kept and will be made again each time: %s", problem)


Item = TypeVar("Item")
Result = TypeVar("Result")


def _pool(num_workers: int) -> Executor:
    """Of processes, or of threads where there is not enough for two: on network disks reading is mostly waiting."""
    if num_workers < 2:
        return ThreadPoolExecutor(16)
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), follow_main)


def _map(function: Callable[[Item], Result], items: list[Item], num_workers: int) -> list[Result]:
    """function of each item, in order."""
    chunks = [items[i : i + 64] for i in range(0, len(items), 64)]
    with _pool(num_workers) as pool:
        return [result for part in pool.map(functools.partial(_apply, function), chunks) for result in part]


def _apply(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]

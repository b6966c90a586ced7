"""Captioned images in WebDataset's tar archives, read by seeking."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from numpy.lib import recfunctions

from deco_jax.data.captioned_pairs import (
    BAD_CAPTION,
    DAMAGED,
    MAX_CAPTION_BYTES,
    NO_CAPTION,
    NO_IMAGE,
    OTHER,
    SPECIAL,
    UNSAFE,
    PairIndex,
    Shard,
    header_size,
    parse_caption,
    parse_captions,
    select_large,
    walk,
    worker_pool,
)
from deco_jax.data.source import IMAGE_SUFFIXES, Source, printable
from deco_jax.errors import UserError
from deco_jax.run import storage

MAX_OPEN_TARS = 64  # per process
MAX_BETWEEN = 2**16  # bytes of a bucket's tar that are read for nothing, to save a request
# From here on it pays to start processes for reading headers: their own work is then what takes the time.
MANY_BYTES_OF_TARS = 2**30

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


class WebDataset(Source):
    """Tar archives with members `KEY.jpg|jpeg|png|webp` and `KEY.txt` or `KEY.json`, as WebDataset lays them out.

    `root` is a folder with .tar files at any depth, or one of them. A JSON caption is an object with the field
    caption, text or prompt; `KEY.txt` goes before it. Samples are ordered by archive, then by position, and read by
    seeking: nothing is unpacked. Left out is the same as in CaptionedFolder, and members whose name leaves the
    archive (absolute, or with ..), links, and what lies behind the first damage in an archive.

    Many headers are read in `num_workers` processes.

    Args:
        captions: weights of several captions of an image, by the fields of its JSON, which then goes before `KEY.txt`;
            an image without JSON has its text alone.

    Raises:
        UserError: the archives can't be listed or opened, or no pair can be used.
    """

    def __init__(
        self, root: str, image_size: tuple[int, int], num_workers: int = 0, captions: Mapping[str, float] | None = None
    ) -> None:
        self._root = root
        self.class_names = []
        self._fields = tuple(captions or ())
        self.caption_weights = tuple((captions or {}).values())
        shards = _index_tars(root, num_workers, self._fields)
        keeps, self._notes = select_large(root, shards, image_size, "archive")
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
        if storage.is_remote(tar) and (sample := self._read_together(tar, pair)):
            return sample
        image = self._files.read(tar, int(pair["image_at"]), int(pair["image_size"]))
        return {"image": image, "label": 0, **self._parsed(self._caption_bytes(index), pair)}

    def _read_together(self, tar: str, pair: np.void) -> dict[str, Any] | None:
        """Read a sample in one request, where little lies between its image and its caption."""
        spans = [(int(pair[f"{part}_at"]), int(pair[f"{part}_size"])) for part in ("image", "caption")]
        start, end = min(at for at, _ in spans), max(at + size for at, size in spans)
        if end - start > sum(size for _, size in spans) + MAX_BETWEEN:
            return None
        data = self._files.read(tar, start, end - start)
        image, caption = (data[at - start : at - start + size] for at, size in spans)
        return {"image": image, "label": 0, **self._parsed(caption, pair)}

    def _parsed(self, data: bytes, pair: np.void) -> dict[str, Any]:
        if self._fields:
            return {"captions": parse_captions(data, bool(pair["json"]), self._fields)}
        return {"caption": parse_caption(data, bool(pair["json"]))}

    def _caption_bytes(self, index: int) -> bytes:
        pair = self._pairs[index]
        return self._files.read(self._tar(index), int(pair["caption_at"]), int(pair["caption_size"]))

    def caption(self, index: int) -> str:
        if self._fields:
            return super().caption(index)
        return self._parsed(self._caption_bytes(index), self._pairs[index])["caption"]

    def captions(self, index: int) -> list[str]:
        parsed = self._parsed(self._caption_bytes(index), self._pairs[index])
        return parsed["captions"] if self._fields else [parsed["caption"]]

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


def _index_tars(root: str, num_workers: int, fields: tuple[str, ...]) -> dict[str, Shard]:
    """Index all archives under root: {relative path: what is in it}; "" for root itself."""
    # Which captions can be used depends on the fields that are looked at.
    kind = "webdataset" + ("-" + hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8] if fields else "")
    index = PairIndex(root, kind, TAR_PAIR)
    try:
        if storage.path(root).is_dir():
            files = [os.path.join(folder, name) for folder, names in walk(root) for name in names]
            names = sorted(name for name in files if name.lower().endswith(".tar"))
        else:
            names = [""]
        paths = {name: os.path.join(root, name) if name else root for name in names}
        stamps = {name: stamp_of(path) for name, path in paths.items()}
        if not names:
            raise UserError(f"{root} holds no .tar archive; check data.path")
        keys = {name: key for name, (_, key) in stamps.items()}
        stale = [name for name in names if not index.knows(name, keys[name])]
        many = sum(stamps[name][0] for name in stale) > MANY_BYTES_OF_TARS
        with worker_pool(min(num_workers, len(stale)) if many else 0) as pool:
            looked_at = pool.map(functools.partial(look_into_tar, fields=fields), [paths[name] for name in stale])
            for done, (name, (pairs, skipped)) in enumerate(zip(stale, looked_at, strict=True), 1):
                index.add(name, Shard(keys[name], pairs, b"", skipped))
                if index.save_sometimes():
                    logging.info("indexed %d of %d archives in %s", done, len(stale), root)
    except OSError as error:
        raise UserError(f"cannot read the archives in {root}: {error}; check path and permissions") from error
    return index.finish(names)


def stamp_of(path: str) -> tuple[int, str]:
    """Return a file's size in bytes, and a value that changes when the file does."""
    if storage.is_remote(path):
        stamp = storage.stamp(path)
        return int(stamp.partition(" ")[0]), stamp
    status = os.stat(path)
    return status.st_size, f"{status.st_size} {status.st_mtime_ns}"


class _Group:
    """The members of one key."""

    def __init__(self) -> None:
        self.images: list[tuple[int, int, int, int]] = []  # width, height, position, bytes
        self.has_image = False  # usable or not
        self.captions: dict[str, tuple[int, int]] = {}  # suffix → position, bytes


def look_into_tar(path: str, fields: tuple[str, ...] = ()) -> tuple[np.ndarray, dict[str, int]]:
    """Find the usable pairs of an archive, TAR_PAIR [pairs] by position; count what was left out, by reason.

    Args:
        fields: of the JSON whose captions are drawn among; then a JSON goes before a text.

    Raises:
        OSError: the file can't be opened.
    """
    rows: list[tuple[Any, ...]] = []
    skipped: collections.Counter[str] = collections.Counter()
    groups: dict[str, _Group] = {}

    with open_tar(path) as file:
        read = file.read_at

        def finish(group: _Group) -> None:
            if not group.has_image:
                skipped[NO_IMAGE] += 1
                return
            for suffix in (".json", ".txt") if fields else (".txt", ".json"):
                at, size = group.captions.get(suffix, (0, 0))
                try:
                    if fields:
                        parse_captions(read(size, at), suffix == ".json", fields)
                    else:
                        parse_caption(read(size, at), suffix == ".json")
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
                found = header_size(io.BufferedReader(_Part(read, at, size)), size)
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


def _members(file: Any, skipped: collections.Counter[str]) -> Iterator[tuple[str, str, int, int]]:
    """Yield (key, suffix, position, bytes) of the images and captions in a tar, as far as it is intact."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
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
        if any(file.read_at(512, archive.offset)):
            skipped[DAMAGED] += 1


class _Tar(io.FileIO):
    """A tar on this machine; `read_at` leaves the position alone."""

    def read_at(self, size: int, start: int) -> bytes:
        return os.pread(self.fileno(), size, start)


class _RemoteTar:
    """A tar in a bucket, read in blocks by one thread; as a file it is what tarfile needs."""

    def __init__(self, path: str) -> None:
        self._file = storage.open_blocks(path)
        self.read, self.seek, self.tell = self._file.read, self._file.seek, self._file.tell

    def read_at(self, size: int, start: int) -> bytes:
        at = self.tell()
        try:
            self.seek(start)
            return self.read(size)
        finally:
            self.seek(at)

    def __enter__(self) -> _RemoteTar:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_tar(path: str) -> _Tar | _RemoteTar:
    return _RemoteTar(path) if storage.is_remote(path) else _Tar(path)


class _Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, read: Callable[[int, int], bytes], start: int, size: int) -> None:
        self._read_at, self._start, self._size, self._at = read, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._read_at(count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _OpenFiles:
    """Parts of files by path; the files used last stay open. Several threads may read."""

    def __init__(self) -> None:
        self._files: collections.OrderedDict[str, _File] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, size: int) -> bytes:
        if storage.is_remote(path):
            return storage.read_range(path, start, size)
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

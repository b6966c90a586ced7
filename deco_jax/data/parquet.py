"""Hugging Face datasets: Parquet files on a disk or in a bucket, with columns for images and labels or captions."""

from __future__ import annotations

import collections
import functools
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deco_jax.data.source import Source, printable
from deco_jax.errors import UserError, reason
from deco_jax.run import storage

# Row groups that a process keeps: so many may lie side by side in the shuffled order (`source.shuffled_blocks`).
KEPT_GROUPS = 8


class Parquet(Source):
    """`root/**/*.parquet`, or one such file, in the order of the names; the rows of each in their order.

    Images are encoded files, as Hugging Face stores them: a struct with `bytes`, or bytes alone. Labels are integers
    from 0; their names are taken from the file's `huggingface` metadata, else they are the numbers. A row group is
    read as a whole, by range from a bucket, and the last few stay in memory: training goes through the row groups in
    an order that visits near rows near in time. Small row groups (100 rows, as `datasets` writes images) read best.

    Args:
        columns: of the image, the label and the caption; with a caption's the label's is not read.
        captions: weights of several columns of captions, instead of that one; a row may lack some of them.

    Raises:
        UserError: no files, a missing column, no rows, or pyarrow is not installed.
    """

    def __init__(
        self, root: str, split: str, columns: tuple[str, str, str], captions: Mapping[str, float] | None = None
    ) -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise UserError('reading Parquet files needs pyarrow: pip install "deco_jax[parquet]"') from error

        self._image, label, caption = columns
        self._captions = list(captions) if captions else [caption] if caption else []
        self.caption_weights = tuple((captions or {}).values())
        self._label = "" if self._captions else label
        self._files = _files(root, split)
        opened = {}
        try:
            # On network disks opening is waiting, which threads share.
            with ThreadPoolExecutor(16) as pool:
                opened = dict(zip(self._files, pool.map(_open, self._files), strict=True))
            groups = [
                (number, group, file.metadata.row_group(group).num_rows)
                for number, file in enumerate(opened.values())
                for group in range(file.metadata.num_row_groups)
            ]
            for name, file in opened.items():
                missing = {self._image, *(self._captions or [self._label])} - set(file.schema_arrow.names)
                if missing:
                    raise UserError(
                        f"{name} has no column {', '.join(sorted(missing))}, only "
                        f"{', '.join(file.schema_arrow.names)}; set --config.data.image_column, label_column or "
                        "caption_column (or captions)"
                    )
                kind = file.schema_arrow.field(self._image).type
                if not _holds_bytes(kind):
                    raise UserError(
                        f"the column {self._image} of {name} holds {kind}, not images' bytes; set "
                        "--config.data.image_column"
                    )
            self._groups = np.asarray([group for group in groups if group[2]], np.int64).reshape(-1, 3)
            self._ends = np.cumsum(self._groups[:, 2])
            if not len(self._ends):
                raise UserError(f"{root} has Parquet files without rows; check the path")
            self.class_names: list[str] = []
            if self._label:
                with ThreadPoolExecutor(16) as pool:
                    parts = list(pool.map(self._read_labels, opened.values()))
                self._labels = np.concatenate(parts)
                self.class_names = _class_names(next(iter(opened.values())), self._label, self._labels)
        except (OSError, pyarrow.ArrowException) as error:
            line = storage.refusal(error) or reason(error, 200)
            raise UserError(f"the Parquet files in {root} can't be read: {line}; check them") from error
        finally:
            for file in opened.values():
                file.close()

    def _read_labels(self, file: Any) -> np.ndarray:
        from pyarrow import types

        column = file.read([self._label]).column(0)
        if column.null_count or not types.is_integer(column.type):
            raise UserError(
                f"the column {self._label} holds {column.type} and {column.null_count} empty values; labels are "
                "integers: set --config.data.label_column, or caption_column for texts"
            )
        return column.to_numpy().astype(np.int32)

    @functools.cached_property
    def _kept(self) -> _RowGroups:
        return _RowGroups(self._files, [self._image, *self._captions])

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the files itself.
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    @property
    def blocks(self) -> np.ndarray:
        """Where each row group ends among the samples."""
        return self._ends

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _row(self, index: int) -> dict[str, Any]:
        block = int(np.searchsorted(self._ends, index, side="right"))
        file, group, rows = (int(value) for value in self._groups[block])
        table = self._kept.read(file, group)
        row = index - (int(self._ends[block]) - rows)
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        image = row[self._image]
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise ValueError(f"{self.name(index)} has no bytes in the column {self._image}")
        sample = {"image": image, "label": int(self._labels[index]) if self._label else 0}
        if self.caption_weights:
            return {**sample, "captions": self._texts(row)}
        return {**sample, "caption": _text(row[self._captions[0]], self.name(index))} if self._captions else sample

    def caption(self, index: int) -> str:
        if self.caption_weights:
            return super().caption(index)
        return _text(self._row(index)[self._captions[0]], self.name(index))

    def captions(self, index: int) -> list[str]:
        return self._texts(self._row(index)) if self.caption_weights else [self.caption(index)]

    def _texts(self, row: dict[str, Any]) -> list[str]:
        values = [row[name] for name in self._captions]
        return [value.strip() if isinstance(value, str) else "" for value in values]

    def name(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        file, group, rows = (int(value) for value in self._groups[block])
        row = index - (int(self._ends[block]) - rows)
        return printable(f"{self._files[file]} row group {group} row {row}")

    def next_of_class(self, index: int) -> int:
        if not self._label:
            return (index + 1) % len(self)
        same = np.flatnonzero(self._labels == self._labels[index])
        return int(same[(np.searchsorted(same, index) + 1) % len(same)])

    def notes(self) -> str:
        return f"{len(self):,} rows in {len(self._ends):,} row groups of {len(self._files):,} Parquet files"


class _RowGroups:
    """The row groups read last, of one process. Several threads may read."""

    def __init__(self, files: list[str], columns: list[str]) -> None:
        self._names, self._columns = files, columns
        self._lock = threading.Lock()
        self._tables: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()

    def read(self, file: int, group: int) -> Any:
        with self._lock:
            table = self._tables.pop((file, group), None)
            if table is None:
                with storage.answering(self._names[file]), _open(self._names[file]) as opened:
                    table = opened.read_row_group(group, self._columns)
            self._tables[file, group] = table
            if len(self._tables) > KEPT_GROUPS:
                self._tables.popitem(last=False)
            return table


def _open(name: str) -> Any:
    import pyarrow.parquet as pq

    if storage.is_remote(name):
        # Only the footer and the columns' chunks are asked for, each in one request.
        return pq.ParquetFile(storage.system(name).open(name, "rb", cache_type="none"), pre_buffer=True)
    return pq.ParquetFile(name, memory_map=True)


def _holds_bytes(kind: Any) -> bool:
    """Return whether a column of this type can hold encoded images: bytes, or a struct of them as `datasets` writes."""
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _files(root: str, split: str) -> list[str]:
    """The Parquet files under `root`; of `datasets`' layout those of a split: split/… or …/split-*.parquet."""
    if root.endswith(".parquet"):
        return [root]
    with storage.answering(root):
        if storage.is_remote(root):
            names = list(storage.tree(root))
        else:
            names = [os.path.relpath(os.path.join(at, n), root) for at, _, found in os.walk(root) for n in found]
    names = sorted(name for name in names if name.endswith(".parquet"))
    if split:
        names = [
            name
            for name in names
            if name.startswith(f"{split}/") or f"/{name}".rpartition("/")[2].startswith(f"{split}-")
        ]
    if not names:
        what = f"of the split {split} " if split else ""
        raise UserError(f"{root} has no .parquet file {what}; check --config.data.path and --config.data.split")
    return [os.path.join(root, name) for name in names]


def _class_names(file: Any, label: str, labels: np.ndarray) -> list[str]:
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError):
        names = [str(i) for i in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"the column {label} has labels from {labels.min()} to {labels.max()} for {len(names)} classes")
    return names


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} has no caption")
    return value.strip()

"""Converts weights between PyTorch's names and layouts and ours, with one table per model, strict in both directions.

A table is a list of rows; a row links PyTorch tensors to our parameters and says how the layout changes:

    Row("blocks.{i}.attn.qkv.weight", "blocks.attention.qkv.kernel", TRANSPOSE, count=depth)

`{i}` is the block's number: our blocks are one array with a leading depth axis. Transforms only move numbers, so a
round trip is exact to the bit. Tensors or parameters without a row are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deco_jax.errors import UserError
from deco_jax.nested import flatten, unflatten

Arrays = Sequence[np.ndarray]
SHOWN = 4  # names that an error lists before it only counts the rest


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, each from a list of arrays to a list of arrays.

    Attributes:
        ndims: the dimensions of each PyTorch tensor; others are refused.
    """

    name: str
    ndims: tuple[int, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_torch: Callable[[Arrays], Arrays]


def one_to_one(
    name: str, ndim: int, to_ours: Callable[[np.ndarray], np.ndarray], to_torch: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    """Make a transform of one tensor into one parameter."""
    return Transform(name, (ndim,), lambda arrays: [to_ours(arrays[0])], lambda arrays: [to_torch(arrays[0])])


VECTOR = one_to_one("vector", 1, lambda a: a, lambda a: a)
MATRIX = one_to_one("unchanged matrix", 2, lambda a: a, lambda a: a)
TRANSPOSE = one_to_one("[out, in] to [in, out]", 2, lambda a: a.T, lambda a: a.T)
DROP_FIRST = one_to_one("[1, length, width] to [length, width]", 3, lambda a: a.squeeze(0), lambda a: a[None])


def halves(name: str = "two halves of the rows, each transposed") -> Transform:
    """Make a transform of one [2·out, in] matrix into two [in, out] kernels."""
    return Transform(
        name,
        (2,),
        lambda arrays: [half.T for half in np.split(arrays[0], 2)],
        lambda arrays: [np.concatenate([a.T for a in arrays])],
    )


def fused(count: int, *, bias: bool = False) -> Transform:
    """Make a transform of `count` [out, in] matrices (or [out] vectors) into one [in, count·out] kernel (or vector)."""
    if bias:
        return Transform(
            f"{count} vectors joined",
            (1,) * count,
            lambda arrays: [_join(arrays)],
            lambda arrays: np.split(arrays[0], count),
        )
    return Transform(
        f"{count} matrices joined",
        (2,) * count,
        lambda arrays: [_join(arrays).T],
        lambda arrays: np.split(arrays[0].T, count),
    )


def _join(arrays: Arrays) -> np.ndarray:
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"shapes differ: {', '.join(str(list(a.shape)) for a in arrays)}")
    return np.concatenate(arrays)


@dataclass(frozen=True)
class Row:
    """PyTorch tensors ↔ our parameters.

    Attributes:
        torch: a name, or several if the transform joins tensors; `{i}` is the block's number.
        ours: a dotted path in our nested dictionary, or several if the transform splits a tensor.
        transform: how PyTorch tensors become our parameters.
        count: the number of blocks, stacked along our first axis; None for a single parameter.
        first: the number of the first block.
    """

    torch: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform
    count: int | None = None
    first: int = 0

    def torch_names(self) -> Iterator[list[str]]:
        """Yield the PyTorch names, a list for each block."""
        patterns = (self.torch,) if isinstance(self.torch, str) else self.torch
        if self.count is None:
            yield list(patterns)
        else:
            for i in range(self.first, self.first + self.count):
                yield [pattern.replace("{i}", str(i)) for pattern in patterns]

    def our_paths(self) -> list[str]:
        return [self.ours] if isinstance(self.ours, str) else list(self.ours)


Table = Sequence[Row]


class Unread(np.ndarray):
    """The shape and type of an array that isn't read yet. It takes no memory, and `read` returns the real array.

    Its own values are meaningless.
    """

    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, shape: Sequence[int], dtype: Any, read: Callable[[], np.ndarray]) -> Unread:
        unread = np.broadcast_to(np.zeros((), dtype), tuple(shape)).view(cls)
        unread.read = read
        return unread


def to_ours(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any] | None = None,
    dtype: Callable[[str], Any] | None = None,
    ignore: Iterable[str] = (),
    what: str = "the file",
) -> dict[str, Any]:
    """Convert PyTorch tensors to our nested dictionary.

    Tensors are read one at a time, so a memory-mapped or lazily read file takes the memory of the result and one
    tensor.

    Args:
        table: the model's rows.
        tensors: by PyTorch name; the names must be exactly those of the table.
        like: our parameters' shapes (any leaves with `.shape`), checked name by name. The tensors of one row
            must agree even without it.
        dtype: from our path to the parameter's dtype; None keeps the file's.
        ignore: PyTorch names that may exist and aren't needed.
        what: the name of the source in errors.

    Raises:
        UserError: tensors are missing, left over, or of the wrong shape.
    """
    expected = _checked_shapes(table, tensors, like, ignore, what)
    ours: dict[str, np.ndarray] = {}
    for row in table:
        ours |= _checked_row(row, tensors, expected, dtype, what)
    return unflatten(ours)


def unread(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, Any],
    dtype: Any,
    ignore: Iterable[str] = (),
    what: str = "the file",
) -> dict[str, Any]:
    """Do the same as `to_ours` with Unread arrays, so that a network larger than memory can be written by parameter.

    Raises:
        UserError: tensors are missing or left over; from `read`, those of `to_ours`.
    """
    expected = _checked_shapes(table, tensors, like, ignore, what)
    assert expected is not None

    def later(row: Row, path: str) -> Unread:
        def read() -> np.ndarray:
            return _checked_row(row, tensors, expected, lambda _: dtype, what)[path]

        return Unread.of(expected[path].shape, dtype, read)

    return unflatten({path: later(row, path) for row in table for path in row.our_paths()})


def _checked_shapes(
    table: Table, tensors: Mapping[str, np.ndarray], like: Mapping[str, Any] | None, ignore: Iterable[str], what: str
) -> dict[str, Any] | None:
    """Check that the names on both sides are those of the table; return the shapes in `like` by path."""
    wanted = [name for row in table for names in row.torch_names() for name in names]
    ignored = set(ignore)
    _check_names(wanted, (name for name in tensors if name not in ignored), what)
    expected = None if like is None else flatten(like)
    if expected is not None:
        paths = {path for row in table for path in row.our_paths()}
        _check_names(paths, expected, "the model", "parameter")
    return expected


def _checked_row(
    row: Row,
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any] | None,
    dtype: Callable[[str], Any] | None,
    what: str,
) -> dict[str, np.ndarray]:
    """Read a row's parameters by path, and check their shapes."""
    ours = dict(zip(row.our_paths(), _read_row(row, tensors, dtype, what), strict=True))
    for path, array in ours.items():
        if expected is not None and array.shape != tuple(expected[path].shape):
            raise UserError(
                f"{what}: {row.torch} gives {path} the shape {list(array.shape)}, but this config's model has "
                f"{list(expected[path].shape)}; use the config that these weights were trained with"
            )
    return ours


def _read_row(
    row: Row, tensors: Mapping[str, np.ndarray], dtype: Callable[[str], Any] | None, what: str
) -> list[np.ndarray]:
    """Read a row's parameters, block by block, into arrays that are allocated once."""
    results: list[np.ndarray] = []
    paths = row.our_paths()
    for i, names in enumerate(row.torch_names()):
        arrays = [np.asarray(tensors[name]) for name in names]
        for name, array, ndim in zip(names, arrays, row.transform.ndims, strict=True):
            if array.ndim != ndim:
                raise UserError(
                    f"{what}: {name} has the shape {list(array.shape)}, but {ndim} dimensions are expected; "
                    "is this another model's file?"
                )
        try:
            blocks = row.transform.to_ours(arrays)
        except ValueError as error:
            shapes = ", ".join(str(list(a.shape)) for a in arrays)
            raise UserError(
                f"{what}: {', '.join(names)} of shape {shapes} can't be read as {row.transform.name} ({error}); "
                "use the config that these weights were trained with"
            ) from error
        if row.count is None:
            results = [
                np.empty(block.shape, dtype(path) if dtype else block.dtype)
                for path, block in zip(paths, blocks, strict=True)
            ]
            for result, block in zip(results, blocks, strict=True):
                _copy(result, block)
            return results
        if i == 0:
            results = [
                np.empty((row.count, *block.shape), dtype(path) if dtype else block.dtype)
                for path, block in zip(paths, blocks, strict=True)
            ]
        for result, block in zip(results, blocks, strict=True):
            if block.shape != result.shape[1:] or (dtype is None and block.dtype != result.dtype):
                raise UserError(
                    f"{what}: {', '.join(names)} has another shape or type than block {row.first}'s "
                    f"({list(block.shape)} {block.dtype}, {list(result.shape[1:])} {result.dtype}); the file is damaged"
                )
            _copy(result[i], block)
    return results


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Set target[...] = source; a transposed matrix is copied in strips that fit the cache, 2 to 4 times faster."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], 128):
        target[:, start : start + 128] = source[:, start : start + 128]


def to_torch(table: Table, params: Mapping[str, Any], *, consume: bool = False) -> dict[str, np.ndarray]:
    """Convert our nested dictionary to PyTorch tensors by name, each contiguous; the inverse of `to_ours`.

    Args:
        consume: remove each parameter from `params` (nested dictionaries) as it is converted, so that memory never
            holds both in full.

    Raises:
        UserError: parameters are missing, left over, or stacked to another depth than the table's.
    """
    ours = flatten(params)
    _check_names([path for row in table for path in row.our_paths()], ours, "the parameters", "parameter")
    tensors: dict[str, np.ndarray] = {}
    for row in table:
        arrays = [np.asarray(ours.pop(path)) for path in row.our_paths()]
        if consume:
            for path in row.our_paths():
                _remove(params, path)
        for path, array in zip(row.our_paths(), arrays, strict=True):
            if row.count is not None and array.shape[:1] != (row.count,):
                raise UserError(
                    f"the parameters: {path} has the shape {list(array.shape)}, but the model has {row.count} blocks; "
                    "use the config that they were trained with"
                )
        for i, names in enumerate(row.torch_names()):
            block = arrays if row.count is None else [array[i] for array in arrays]
            try:
                converted = row.transform.to_torch(block)
            except ValueError as error:
                raise UserError(
                    f"the parameters: {', '.join(row.our_paths())} can't be written as {row.transform.name} ({error}); "
                    "use the config that they were trained with"
                ) from error
            for name, tensor in zip(names, converted, strict=True):
                if not tensor.flags.c_contiguous:
                    contiguous = np.empty(tensor.shape, tensor.dtype)
                    _copy(contiguous, tensor)
                    tensor = contiguous
                tensors[name] = tensor
    return tensors


def _remove(tree: Any, path: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree[parent]
    del tree[last]


def listed(names: Iterable[str]) -> str:
    """List the first few of many names, and how many more there are."""
    # Names in a file may contain anything, even terminal escape codes.
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_names(wanted: Iterable[str], found: Iterable[str], what: str, kind: str = "tensor") -> None:
    wanted, found = dict.fromkeys(wanted), dict.fromkeys(found)
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{kind}s missing: {len(missing)} ({listed(missing)})")
        if extra:
            parts.append(f"{kind}s left over: {len(extra)} ({listed(extra)})")
        raise UserError(f"{what} doesn't fit this config's model: {'; '.join(parts)}; check the config or the file")

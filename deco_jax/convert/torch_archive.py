"""Reads the zip archives of PyTorch and TorchScript, without PyTorch and without running any code in them.

An archive holds a pickle, which refers to tensors by their storages, and a file of raw bytes for each storage. The
pickle is read with a table of the few functions that make tensors. Anything else it names, such as a class of
hyper-parameters or code, becomes an inert `Other`: nothing is looked up, so nothing can be called. TorchScript's code
is never opened.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

CHUNK = 2**22  # bytes per step of a checksum

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class Other:
    """A value whose class or function isn't in the table: kept as its name and arguments, and never called."""

    path = ""  # of the class; each name has its own subclass

    def __new__(cls, *arguments: Any, **_: Any) -> Other:
        self = super().__new__(cls)
        self.arguments, self.state = arguments, {}
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """As pickles fill subclasses of dict."""

    def append(self, value: Any) -> None:
        """As pickles fill subclasses of list."""

    def extend(self, values: Any) -> None:
        """As pickles fill subclasses of list."""


class Storage:
    """One storage of an archive: `count` elements of `dtype` in the archive's file `key`."""

    def __init__(self, archive: Archive, key: str, dtype: str, count: int) -> None:
        self.archive, self.key, self.dtype, self.count = archive, key, dtype, count


class Tensor:
    """A dense tensor in an archive; `numpy` reads its bytes.

    Attributes:
        shape: its sizes.
        problem: why its values can't be read, for instance because it is sparse; "" if they can.
    """

    def __init__(
        self, storage: Storage | None, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], problem: str = ""
    ) -> None:
        self.storage, self.offset, self.shape, self.strides, self.problem = storage, offset, shape, strides, problem

    @property
    def dtype(self) -> str:
        """PyTorch's name for the type of the elements."""
        return self.storage.dtype if self.storage else ""

    def numpy(self) -> np.ndarray:
        """Read the elements from the file and compare their checksum.

        Raises:
            ValueError: the tensor exceeds its storage, the bytes are damaged, or see `problem`.
        """
        if self.storage is None or self.problem:
            raise ValueError(self.problem)
        dtype = np.dtype(DTYPES[self.storage.dtype])
        if min(self.shape, default=1) == 0:
            return np.zeros(self.shape, dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.offset < 0 or min(self.strides, default=0) < 0 or last >= self.storage.count:
            raise ValueError("a tensor exceeds its storage")
        # A view into a much larger storage is cut out, so that reading it only costs its own size.
        raw = self.storage.archive.read(self.storage.key, self.offset * dtype.itemsize, (last + 1) * dtype.itemsize)
        flat = np.frombuffer(raw, dtype)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class Archive:
    """A zip archive of PyTorch: `content` is what was saved, with a `Tensor` for each tensor.

    Raises:
        Exception: any of many kinds, if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as file:
            entries = {entry.filename: entry for entry in file.infolist()}
        pickles = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("a zip archive, but not of PyTorch")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._entries = {name.removeprefix(self._prefix): entry for name, entry in entries.items()}
        # PyTorch can be told to write no checksums; it then writes zeros.
        self._with_checksums = any(entry.CRC for entry in entries.values())
        self._checked: set[str] = set()
        self.is_script = any(name.startswith("code/") for name in self._entries)
        if "byteorder" in self._entries and bytes(self.read("byteorder")) != b"little":
            raise ValueError("written on a big-endian machine")
        self.content = _Unpickler(self).load()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Return bytes start..stop of a file in the archive; the first time, compare the whole file's checksum."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"it has no {name}")
        stop = entry.file_size if stop is None else stop
        if stop > entry.file_size:
            raise ValueError(f"{name} is shorter than its tensors")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            with zipfile.ZipFile(self.path) as archive:
                return memoryview(archive.read(entry))[start:stop]
        with self.path.open("rb") as file:
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            begin = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            begin += int.from_bytes(lengths[2:], "little")
            buffer = memoryview(bytearray(stop - start))
            file.seek(begin + start)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{name} is cut off")
            if self._with_checksums and entry.filename not in self._checked:
                whole = stop - start == entry.file_size
                if (_checksum([buffer]) if whole else _checksum(_chunks(file, begin, entry.file_size))) != entry.CRC:
                    raise ValueError(f"{name} fails its checksum")
                self._checked.add(entry.filename)
        return buffer


def _chunks(file: Any, begin: int, size: int) -> Iterator[bytes]:
    file.seek(begin)
    for start in range(0, size, CHUNK):
        yield file.read(min(CHUNK, size - start))


def _checksum(parts: Any) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


class _Function:
    """A function of the table, in a form that a pickle can only call."""

    __slots__ = ("_call",)
    _call: Any

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("a pickle that changes what it is read by")


def _dense(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    """Do what `torch._utils._rebuild_tensor_v2` and `_v3` do; v3 gives the type of a storage without one."""
    shape, strides = tuple(int(n) for n in size), tuple(int(n) for n in stride)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or min(shape, default=0) < 0:
        raise pickle.UnpicklingError("a tensor without a storage")
    for extra in more:
        if isinstance(extra, _Name):
            width = np.dtype(DTYPES[extra.name]).itemsize if extra.name in DTYPES else 0
            storage = Storage(storage.archive, storage.key, extra.name, storage.count // width if width else 0)
    problem = ""
    if storage.dtype not in DTYPES:
        problem = f"it is of the type {storage.dtype}"
    elif any(isinstance(extra, dict) and (extra.get("conj") or extra.get("neg")) for extra in more):
        problem = "it is a conjugated or negated view"
    return Tensor(storage, int(offset), shape, strides, problem)


def _without_values(problem: str) -> Any:
    return lambda *_: Tensor(None, 0, (), (), problem)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    code = dtype.arguments[0] if isinstance(dtype, Other) and dtype.arguments else ""
    if isinstance(code, str) and re.fullmatch(r"[iufb][1248]", code) and isinstance(data, bytes):
        return np.frombuffer(data, code)[0].item()
    return None


class _Name:
    """torch.NAME: a type, or anything else that is only named."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _dense,
    ("torch._utils", "_rebuild_tensor_v2"): _dense,
    ("torch._utils", "_rebuild_tensor_v3"): _dense,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda _, __, arguments, ___: _dense(*arguments),
    ("torch._utils", "_rebuild_sparse_tensor"): _without_values("it is sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _without_values("it is sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _without_values("it is a nested tensor"),
    ("torch._utils", "_rebuild_qtensor"): _without_values("it is quantized"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _without_values("it is a meta tensor, without values"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _without_values("it is of a class of its own"),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    # How protocol 2, which PyTorch uses, stores the bytes of NumPy's scalars.
    ("_codecs", "encode"): lambda text, _="latin1": str(text).encode("latin1"),
    ("builtins", "set"): lambda values=(): list(values),
    ("__builtin__", "set"): lambda values=(): list(values),
    ("torch", "Size"): lambda values=(): tuple(values),
    ("torch.jit._pickle", "build_intlist"): lambda values: values,
    ("torch.jit._pickle", "build_doublelist"): lambda values: values,
    ("torch.jit._pickle", "build_boollist"): lambda values: values,
    ("torch.jit._pickle", "build_tensorlist"): lambda values: values,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: Archive) -> None:
        super().__init__(io.BytesIO(archive.read("data.pkl")))
        self._archive = archive
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in FUNCTIONS:
            return _Function(FUNCTIONS[module, name])
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or name in DTYPES):
            return _Name(name)
        if module == "torch" and name.islower():  # types that NumPy lacks
            return _Name(name)
        return type("Other", (Other,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Storage:
        kind, typed, key, _, count = pid
        if kind != "storage" or not isinstance(typed, _Name):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return Storage(self._archive, f"data/{key}", STORAGES.get(typed.name, typed.name), int(count))


def script_tensors(module: Any) -> dict[str, Tensor]:
    """Return the parameters and buffers of a TorchScript module by their dotted names, as in its `state_dict`."""
    found: dict[str, Tensor] = {}

    def walk(node: Any, prefix: str, inside: frozenset[int]) -> None:
        if not isinstance(node, Other) or not isinstance(node.state, dict) or id(node) in inside:
            return
        for name, value in node.state.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            else:
                walk(value, f"{prefix}{name}.", inside | {id(node)})

    walk(module, "", frozenset())
    return found

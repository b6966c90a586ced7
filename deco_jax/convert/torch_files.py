"""Reads and writes weight files of PyTorch programs: Lightning checkpoints, `.pth` state dictionaries, safetensors.

Everything is read lazily: a tensor's bytes are only read when its name is looked up.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deco_jax.convert import torch_archive
from deco_jax.convert.mapping import listed
from deco_jax.errors import UserError, reason
from deco_jax.run import fetch, files

PREFIXES = {"denoiser": "denoiser.", "ema": "ema_denoiser.", "projector": "diffusion_trainer.proj."}
SAFETENSORS_INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """The contents of an official checkpoint; tensors by their names without the prefix.

    Attributes:
        denoiser, ema, projector, second_ema: empty if the file has none; only JiT's files have the last.
        step, epoch: how far it was trained.
        has_optimizer: whether the file also has PyTorch's optimizer state, which isn't read.
    """

    denoiser: Mapping[str, np.ndarray] = field(default_factory=dict)
    ema: Mapping[str, np.ndarray] = field(default_factory=dict)
    projector: Mapping[str, np.ndarray] = field(default_factory=dict)
    second_ema: Mapping[str, np.ndarray] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    has_optimizer: bool = False


class _TorchTensors(Mapping[str, np.ndarray]):
    """PyTorch tensors in a file as NumPy arrays, each read and checked when its name is looked up."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path, self.tensors = path, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            array = _array(self.tensors[name])
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path}: {name} can't be read: {reason(error)}; download the file again") from error
        return _weights(array, name, self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _array(tensor: Any) -> np.ndarray:
    if isinstance(tensor, torch_archive.Tensor):
        return tensor.numpy()
    import torch  # for a file from before PyTorch 1.6

    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        raise ValueError("it is sparse")
    if tensor.dtype == torch.bfloat16:  # NumPy doesn't have this type
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.resolve_conj().resolve_neg().numpy()


def _weights(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Return the array if it can hold weights, which are real and finite; raise UserError otherwise."""
    if array.dtype.kind == "c":
        raise UserError(f"{path}: {name} holds complex numbers, but weights are real; is this another model's file?")
    if not _finite(array):
        raise UserError(f"{path}: {name} holds values that are not finite; the file is damaged or its training failed")
    return array


def _finite(array: np.ndarray) -> bool:
    if array.dtype == ml_dtypes.bfloat16:  # check the bits, which is many times faster
        return not bool(np.any((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


class _SafeTensors(Mapping[str, np.ndarray]):
    """Tensors of one or several memory-mapped safetensors files."""

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        self.path, self.files = path, files  # tensor name → open file

    def __getitem__(self, name: str) -> np.ndarray:
        return _weights(self.files[name].get_tensor(name), name, self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "reading or writing PyTorch files needs PyTorch, which isn't installed; "
            "run: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return torch


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}; check the path")
    return path


def read_pickled(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Return the dictionary that `torch.save` wrote, without reading its tensors; code hidden in the file isn't run.

    For TorchScript, this is the state dictionary.

    Raises:
        UserError: the file is missing, damaged, or not a dictionary of weights; or it is from before PyTorch 1.6, whose
            files aren't zip archives, and PyTorch isn't installed.
    """
    path = _existing(path)
    try:
        if zipfile.is_zipfile(path):
            archive = torch_archive.Archive(path)
            content = torch_archive.script_tensors(archive.content) if archive.is_script else archive.content
        else:
            content = _torch().load(path, weights_only=True, map_location="cpu")
    except UserError:
        raise
    # Damage may raise almost any exception: from pickle, zip, storage sizes, or text decoding.
    except Exception as error:
        raise UserError(f"{path}: not a readable PyTorch weight file ({reason(error)}); download it again") from error
    if not isinstance(content, dict):
        kind = content.path if isinstance(content, torch_archive.Other) else type(content).__name__
        raise UserError(f"{path}: holds a {reason(ValueError(kind))}, not a dictionary of weights; check the path")
    return content


def state_dict(path: Path, content: Any, what: str) -> dict[str, Any]:
    """Return `content` if it is a dictionary of tensors by name; raise UserError otherwise."""
    if not isinstance(content, dict) or not content or not all(map(_is_tensor, content.values())):
        raise UserError(f"{path}: {what}; check the path")
    if unnamed := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: tensors whose names aren't text: {len(unnamed)} ({unnamed[0]!r}); check the path")
    return content


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch_archive.Tensor) or hasattr(value, "detach")


def read_lightning(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of the official code, and sort its tensors into networks.

    Raises:
        UserError: as for `read_pickled`; or the file isn't such a checkpoint, or holds tensors of an unknown network.
    """
    return lightning(Path(path), read_pickled(path))


def lightning(path: Path, content: Mapping[Any, Any]) -> Checkpoint:
    """Sort the contents of such a file into networks."""
    what = "has no `state_dict` of tensors, so it isn't a Lightning checkpoint"
    state = state_dict(path, content.get("state_dict"), what)
    networks: dict[str, dict[str, Any]] = {name: {} for name in PREFIXES}
    unknown = []
    for key, tensor in state.items():
        for name, prefix in PREFIXES.items():
            if key.startswith(prefix):
                networks[name][key.removeprefix(prefix)] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"{path}: tensors of an unknown network: {len(unknown)} ({listed(unknown)}); "
            f"known: {', '.join(f'{prefix}*' for prefix in PREFIXES.values())}"
        )
    if not networks["denoiser"] and not networks["ema"]:
        raise UserError(f"{path}: holds neither denoiser.* nor ema_denoiser.* tensors; check the path")
    return Checkpoint(
        **{name: _TorchTensors(path, tensors) for name, tensors in networks.items()},
        step=counter(path, content, "global_step"),
        epoch=counter(path, content, "epoch"),
        has_optimizer=bool(content.get("optimizer_states")),
    )


def counter(path: Path, content: Mapping[Any, Any], name: str) -> int:
    """Read a count in a checkpoint, 0 if it has none."""
    value = content.get(name)
    if _is_tensor(value):
        array = _array(value)
        value = array.item() if array.size == 1 else "a tensor"
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        shown = reason(ValueError(repr(value)), 40)
        raise UserError(f"{path}: {name}={shown} is not a count from 0 to 2³¹ − 1; is the file damaged?")
    return value


def write_lightning(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the layout of the official files, which have no optimizer state.

    The file appears whole or not at all.

    Raises:
        UserError: PyTorch isn't installed.
    """
    state = {
        prefix + key: array for name, prefix in PREFIXES.items() for key, array in getattr(checkpoint, name).items()
    }
    content = {
        "epoch": checkpoint.epoch,
        "global_step": checkpoint.step,
        # Lightning upgrades files by the rules of this version.
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    write_pickled(path, content)


def write_pickled(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a dictionary as `torch.save` does, its arrays as tensors, two levels deep; whole or not at all.

    Raises:
        UserError: PyTorch isn't installed.
    """
    torch = _torch()
    content = {
        key: {name: _to_torch(torch, a) if isinstance(a, np.ndarray) else a for name, a in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in content.items()
    }
    with _whole(path) as partial:
        torch.save(content, partial)


def tensors(path: Path, found: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """Return tensors of a file that `read_pickled` read, as arrays that are read when they are looked up."""
    return _TorchTensors(path, found)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # PyTorch warns about read-only memory
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Read tensors by name from a safetensors file, an index of several, or a folder with either.

    bfloat16 tensors are returned as `ml_dtypes.bfloat16`.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / SAFETENSORS_INDEX, path / "model.safetensors"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise UserError(f"{path}: has neither model.safetensors nor {SAFETENSORS_INDEX}; check the path")
        path = found[0]
    if path.suffix != ".json":
        file = _open_safetensors(path)
        return _SafeTensors(path, {name: file for name in file.keys()})  # noqa: SIM118  (not a dictionary)
    try:
        index = json.loads(_existing(path).read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): Path(str(file)).name for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable index of safetensors files; download it again") from error
    files = {file: _open_safetensors(path.parent / file) for file in sorted(set(names.values()))}
    contents = {file: set(opened.keys()) for file, opened in files.items()}
    missing = [name for name, file in names.items() if name not in contents[file]]
    if missing:
        raise UserError(f"{path}: tensors that its files lack: {len(missing)} ({listed(missing)}); download them again")
    extra = [name for file, held in contents.items() for name in sorted(held) if names.get(name) != file]
    if extra:
        raise UserError(
            f"{path}: tensors that it doesn't list: {len(extra)} ({listed(extra)}); download index and files again"
        )
    return _SafeTensors(path, {name: files[file] for name, file in names.items()})


def _open_safetensors(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(_existing(path), framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({reason(error)}); download it again") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; `metadata` goes into its header."""
    import safetensors
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with _whole(path) as partial:
        Path(partial).touch()
        rights = os.stat(partial).st_mode  # from the umask; safetensors makes files that nobody else may read
        try:
            save_file(contiguous, partial, metadata={"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        os.chmod(partial, rights)


def read_tensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Read tensors by name from safetensors (file, index or folder) or from a state dictionary by `torch.save`.

    Raises:
        UserError: as for `read_safetensors` and `read_pickled`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        return read_safetensors(path)
    return _TorchTensors(path, state_dict(path, read_pickled(path), "not a state dictionary (tensors by name)"))


@contextlib.contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name to write to, which becomes `path` only if everything succeeds."""
    try:
        with files.whole(path) as part:
            yield str(part)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter on a full disk
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path}: can't be written ({why}); check the folder and the free space") from error


def with_prefix_removed(tensors: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    """Return the same lazily read tensors with `prefix` removed from the names that have it."""
    return _Renamed(tensors, {name.removeprefix(prefix): name for name in tensors})


def below(tensors: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    """Return the lazily read tensors whose names begin with `prefix`, without it; if none does, all unchanged."""
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    return _Renamed(tensors, names) if names else tensors


class _Renamed(Mapping[str, np.ndarray]):
    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_weights(path: str | os.PathLike[str] | None, what: str, remedy: str) -> Mapping[str, np.ndarray]:
    """Read a frozen network's weights with `read_tensors`; remote ones are fetched once (`fetch.local`).

    Raises:
        UserError: nothing is there or no path is given ("no WHAT weights there; REMEDY"), or as for `read_tensors`.
    """
    here = fetch.local(path) if path else None
    if here is None or not here.exists():
        raise UserError(f"{path or 'no path'}: no {what} weights there; {remedy}")
    return read_tensors(here)

"""Files of weights that PyTorch programs write: Lightning checkpoints, `.pth` state dictionaries, safetensors.

Everything is read lazily: a tensor's bytes leave the disk when its name is looked up.
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

from deco_jax.convert.mapping import listed
from deco_jax.errors import UserError
from deco_jax.run import files

PREFIXES = {"denoiser": "denoiser.", "ema": "ema_denoiser.", "projector": "diffusion_trainer.proj."}
SAFETENSORS_INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """What a Lightning checkpoint of the official code holds; tensors by their names without the prefix.

    Attributes:
        denoiser, ema, projector: empty where the file has none.
        step, epoch: how far it was trained.
    """

    denoiser: Mapping[str, np.ndarray] = field(default_factory=dict)
    ema: Mapping[str, np.ndarray] = field(default_factory=dict)
    projector: Mapping[str, np.ndarray] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0


class _TorchTensors(Mapping[str, np.ndarray]):
    """PyTorch tensors seen as NumPy arrays, without a copy."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        tensor = self.tensors[name].detach()
        if tensor.dtype == torch.bfloat16:  # which NumPy doesn't know
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _SafeTensors(Mapping[str, np.ndarray]):
    """Tensors of one or several memory-mapped safetensors files."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = files  # tensor name → open file

    def __getitem__(self, name: str) -> np.ndarray:
        return self.files[name].get_tensor(name)

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


def read_pickled(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, memory-mapped; code hidden in the file isn't run.

    Raises:
        UserError: PyTorch isn't installed; the file is missing, damaged, or no dictionary of weights.
    """
    path = _existing(path)
    torch = _torch()
    try:
        # Files from before PyTorch 1.6 are no zip archives and can't be mapped.
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    # Damage shows as almost any exception: of pickle, zip, storage sizes, text decoding.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no readable PyTorch file of weights ({reason[:120]}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights; check the path")
    return content


def read_lightning(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint of the official code, its tensors sorted into networks.

    Raises:
        UserError: as `read_pickled`; the file isn't such a checkpoint, or holds tensors of no known network.
    """
    content = read_pickled(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(hasattr(tensor, "detach") for tensor in state.values()):
        raise UserError(f"{path}: has no `state_dict` of tensors, so it is no Lightning checkpoint; check the path")
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
            f"{path}: tensors of no known network: {len(unknown)} ({listed(unknown)}); "
            f"known are {', '.join(f'{prefix}*' for prefix in PREFIXES.values())}"
        )
    if not networks["denoiser"] and not networks["ema"]:
        raise UserError(f"{path}: holds neither denoiser.* nor ema_denoiser.* tensors; check the path")
    return Checkpoint(
        **{name: _TorchTensors(tensors) for name, tensors in networks.items()},
        step=int(content.get("global_step", 0)),
        epoch=int(content.get("epoch", 0)),
    )


def write_lightning(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint in the layout of the official files, without an optimizer state as those are.

    The file appears whole or not at all.

    Raises:
        UserError: PyTorch isn't installed.
    """
    torch = _torch()
    state = {
        prefix + key: _to_torch(torch, array)
        for name, prefix in PREFIXES.items()
        for key, array in getattr(checkpoint, name).items()
    }
    content = {
        "epoch": checkpoint.epoch,
        "global_step": checkpoint.step,
        # Lightning upgrades files by this version's rules.
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    with _whole(path) as partial:
        torch.save(content, partial)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # PyTorch warns of read-only memory
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_safetensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Tensors by name from a safetensors file, an index of several, or a folder with either.

    bfloat16 tensors come as `ml_dtypes.bfloat16`.

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
        return _SafeTensors({name: file for name in file.keys()})  # noqa: SIM118  (not a dictionary)
    try:
        index = json.loads(_existing(path).read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): Path(str(file)).name for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable index of safetensors files; download it again") from error
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
    return _SafeTensors({name: files[file] for name, file in names.items()})


def _open_safetensors(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(_existing(path), framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: not a readable safetensors file ({reason[:120]}); download it again") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; `metadata` goes into its header."""
    import safetensors
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with _whole(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Tensors by name from safetensors (file, index or folder) or from a state dictionary that `torch.save` wrote.

    Raises:
        UserError: as `read_safetensors` and `read_pickled`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        return read_safetensors(path)
    content = read_pickled(path)
    if not content or not all(hasattr(tensor, "detach") for tensor in content.values()):
        raise UserError(f"{path}: no state dictionary (tensors by name); check the path")
    return _TorchTensors(content)


@contextlib.contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name to write to that becomes `path` only when everything went well."""
    try:
        with files.whole(path) as part:
            yield str(part)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: can't be written ({reason}); check the folder and its space") from error


def with_prefix_removed(tensors: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    """The same lazily read tensors under names without `prefix`, where they have it."""
    return _Renamed(tensors, {name.removeprefix(prefix): name for name in tensors})


class _Renamed(Mapping[str, np.ndarray]):
    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

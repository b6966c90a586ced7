"""Files on this machine and objects in buckets (gs://, s3://) under one kind of path.

Paths are etils' epath over fsspec (gcsfs, s3fs); Orbax and TensorStore, and ArrayRecord's reader, open gs:// by
themselves. A bucket has no rename, no append and no lock, so what makes a file whole differs by its kind:

    config.json, grids, reports, caches, exports   written on this machine, then put as one object (`files.whole`)
    metrics.jsonl                                  held in memory, put anew as one object; before each checkpoint too
    TensorBoard events                             the same, in files of at most 16 MiB
    checkpoints                                    Orbax's commit_success.txt, written last; checksums.json before it
    .lock                                          a record with a number that its holder raises
    indices of data                                one object beside the data

Requests are tried again by the libraries (gcsfs for about half a minute, botocore, TensorStore); then the run ends
with one line, and the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from deco_jax.errors import UserError

SCHEMES = ("gs://", "s3://")
PACKAGES = {"gs://": "gcsfs", "s3://": "s3fs"}
# Of TensorStore, which waits 1, 2, 4, ... 32 s between them: about two minutes. Its default of 32 is a quarter hour.
CHECKPOINT_RETRIES = 6
# Large enough for several small images of a tar at once, small enough to pass over large ones.
INDEX_BLOCK = 2**18
TEMPORARY = "deco_jax_of_"  # then the process
PUT_SECONDS = 30.0  # between two puts of what grows


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(SCHEMES)


def path(name: str | os.PathLike[str]) -> pathlib.Path:
    """The file that a name stands for.

    Returns:
        A pathlib.Path; of a bucket an epath.Path, which has its methods (but no absolute, and no mode "a" of open).

    Raises:
        UserError: the package that reads such a bucket is missing.
    """
    if not is_remote(name):
        return pathlib.Path(name)
    _filesystem(os.fspath(name)[:5])
    from etils import epath

    return epath.Path(name)


def is_file(name: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; no name is too long to ask."""
    if not is_remote(name):
        return os.path.isfile(name)
    with answering(name):
        return bool(system(name).isfile(os.fspath(name)))


def absolute(name: str | os.PathLike[str]) -> pathlib.Path:
    """`path` as it is from every folder."""
    return path(name) if is_remote(name) else pathlib.Path(name).absolute()


@functools.cache
def _filesystem(scheme: str) -> Any:
    # gcsfs would ask another service, with credentials of its own, what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        from etils.epath import backend

        __import__(PACKAGES[scheme])
        # Nothing is remembered of a folder: other hosts write to it.
        fsspec.config.conf.setdefault(scheme[:2], {})["use_listings_cache"] = False
        system = backend.fsspec_backend.fs(scheme)
    except ImportError as error:
        raise UserError(
            f'reading {scheme} needs {PACKAGES[scheme]}: pip install "deco_jax[{scheme[:2]}]" ({error})'
        ) from error
    for name in ("gcsfs", "fsspec", "s3fs", "botocore", "asyncio"):  # they print what they raise, with stack traces
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return system


def system(name: str | os.PathLike[str]) -> Any:
    """fsspec's file system of a remote path."""
    return _filesystem(os.fspath(name)[:5])


# ---------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def answering(name: str | os.PathLike[str]) -> Iterator[None]:
    """What a bucket refuses as a UserError, so that nobody takes it for a damaged file; FileNotFoundError stays."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if line := refusal(error):
            raise UserError(f"{os.fspath(name)} can't be read: {line}") from error
        raise


def read(name: str) -> bytes:
    """All of an object. FileNotFoundError if it isn't there; UserError if the bucket refuses."""
    with answering(name):
        return system(name).cat_file(name)


def read_range(name: str, start: int, size: int) -> bytes:
    """`size` bytes of an object from `start` on; errors as `read`, and OSError if it has fewer."""
    with answering(name):
        data = system(name).cat_file(name, start=start, end=start + size) if size else b""
    if len(data) != size:
        raise OSError(f"{name} has become shorter")
    return data


def open_blocks(name: str) -> BinaryIO:
    """An object as a seekable file, read in blocks of INDEX_BLOCK: for many small reads in nearly ascending order."""
    options = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
    return system(name).open(name, "rb", block_size=INDEX_BLOCK, **options)


def tree(root: str) -> dict[str, str]:
    """Relative path → a stamp that changes when the object does, of all objects under `root`, in sorted order."""
    found = system(root).find(root, detail=True)
    prefix = root.rstrip("/").removeprefix(root[:5]) + "/"
    return {name.removeprefix(prefix): stamp_of(info) for name, info in sorted(found.items()) if name != prefix}


def stamp(name: str) -> str:
    """What tells an object from a later one of the same name."""
    return stamp_of(system(name).info(name))


def modified(name: str | os.PathLike[str]) -> float:
    """When an object was put, in seconds since 1970."""
    return system(name).modified(os.fspath(name)).timestamp()


def stamp_of(info: dict[str, Any]) -> str:
    return f"{info['size']} {info.get('generation') or info.get('ETag') or info.get('mtime')}"


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder under a remote `root` with its sorted files, hidden ones left out: as `captioned_pairs.walk`."""
    folders: dict[str, list[str]] = {"": []}
    for name in tree(root):
        folder, _, file = name.rpartition("/")
        if file and not any(part.startswith(".") for part in name.split("/")):
            folders.setdefault(folder, []).append(file)
    yield from sorted(folders.items(), key=lambda item: item[0].split("/"))


def load_array(name: str | os.PathLike[str]) -> np.ndarray:
    """A .npy file; memory-mapped where it lies on this machine."""
    if not is_remote(name):
        return np.load(name, mmap_mode="r")
    return np.load(io.BytesIO(path(name).read_bytes()))


def open_rows(name: str | os.PathLike[str]) -> Any:
    """A .npy file by its rows: memory-mapped, or of a bucket read by range."""
    return ArrayRows(os.fspath(name)) if is_remote(name) else np.load(name, mmap_mode="r")


class ArrayRows:
    """Rows of a .npy file in a bucket, each read by itself: what a memory map is for a file."""

    def __init__(self, name: str) -> None:
        self._name = name
        with open_blocks(name) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran_order, self.dtype = read(file)
            self._start = file.tell()
        if fortran_order:
            raise ValueError("not in C order")
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        data = read_range(self._name, self._start + int(row) * self._row_bytes, self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])


def md5(info: dict[str, Any]) -> bytes | None:
    """The MD5 of an object, by what its service tells of it; None if it tells none."""
    import base64

    if info.get("md5Hash"):
        return base64.b64decode(info["md5Hash"])
    etag = str(info.get("ETag", "")).strip('"')  # of an object put in one part, without a key of its own
    return bytes.fromhex(etag) if len(etag) == 32 and "SSEKMSKeyId" not in info else None


# ---------------------------------------------------------------------------------------- writing


def put(name: str | os.PathLike[str], data: bytes) -> None:
    """Make an object, or replace it; it is there as a whole or not at all."""
    system(name).pipe_file(os.fspath(name), data)


def create(name: str | os.PathLike[str], data: bytes) -> None:
    """Make an object. FileExistsError if there is one, whoever made it at the same moment."""
    system(name).pipe_file(os.fspath(name), data, mode="create")


def append(name: pathlib.Path, text: str) -> None:
    """Add text to the end of a file; one in a bucket is put anew as a whole."""
    if not is_remote(name):
        with name.open("a") as file:
            file.write(text)
        return
    put(name, (name.read_bytes() if name.exists() else b"") + text.encode())


@contextlib.contextmanager
def temporary() -> Iterator[str]:
    """A folder on this machine for what is on its way to a bucket; those that killed processes left are removed."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*_*"):
        process = left.name.removeprefix(TEMPORARY).partition("_")[0]
        if process.isdigit() and not os.path.exists(f"/proc/{process}") and os.path.isdir("/proc"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}_") as folder:
        yield folder


@contextlib.contextmanager
def staged(name: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path on this machine to write to, put as the object `name` if the block ends well."""
    with temporary() as folder:
        part = pathlib.Path(folder) / os.path.basename(os.fspath(name))
        yield part
        system(name).put_file(str(part), os.fspath(name))


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A folder to write to: `folder` itself, or one on this machine whose files are put under it at the end."""
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    with temporary() as part:
        yield pathlib.Path(part)
        if any(pathlib.Path(part).iterdir()):
            system(folder).put(part + "/", os.fspath(folder) + "/", recursive=True)


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A folder to write to, which takes the place of `folder` at the end; in a bucket object by object."""
    if is_remote(folder):
        with staged_folder(folder) as part:
            yield part
            remove_tree(folder)
        return
    folder = pathlib.Path(folder)
    part = folder.with_name(folder.name + ".part")
    remove_tree(part)
    yield part
    remove_tree(folder)
    part.replace(folder)


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Remove a folder with all in it; one that isn't there is no error."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            system(folder).rm(os.fspath(folder), recursive=True)


# ---------------------------------------------------------------------------------------- failing

# Whose exceptions mean that a bucket did not do what it was asked.
LIBRARIES = ("gcsfs", "aiohttp", "s3fs", "botocore", "aiobotocore", "google", "requests", "fsspec")


def refusal(error: BaseException | None) -> str | None:
    """One line for what a bucket refused, or None if the error is none of a bucket's."""
    while error is not None:
        module, text = type(error).__module__.partition(".")[0], " ".join(str(error).split())[:300]
        forbidden = isinstance(error, PermissionError | OSError) and text.startswith(("Forbidden", "Access Denied"))
        if module in LIBRARIES or forbidden:
            return (
                f"the bucket did not answer as it should ({type(error).__name__}: {text or 'no reason given'}); check "
                "the network, the credentials and the bucket, and start again: what is saved is kept"
            )
        error = error.__cause__ or error.__context__
    return None


@functools.cache
def limit_checkpoint_retries() -> None:
    """Have TensorStore give up on a bucket after about two minutes."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # Orbax has no public setting for it. Each of its contexts is a copy of one of these.
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        context = getattr(tensorstore_utils, name, None)
        if isinstance(context, dict):
            for service in ("gcs", "s3"):
                context.setdefault(f"{service}_request_retries", {"max_retries": CHECKPOINT_RETRIES})

"""Local files and objects in buckets (gs://, s3://) under one kind of path.

Paths are etils' epath over fsspec (gcsfs, s3fs); Orbax, TensorStore and ArrayRecord's reader open gs:// themselves. A
bucket can't rename, append or lock, so each kind of file is kept complete in its own way:

    config.json, grids, reports, caches, exports   written on this machine, then uploaded as one object (`files.whole`)
    metrics.jsonl                                  held in memory, uploaded again as one object, also before checkpoints
    TensorBoard events                             the same, in files of at most 16 MiB
    checkpoints                                    Orbax's commit_success.txt, written last; checksums.json before it
    .lock                                          a record with a number that its holder increments
    indices of data                                one object beside the data

The libraries retry requests (gcsfs for about half a minute, botocore, TensorStore). After that, the run ends with one
line, and the same command continues from the last checkpoint.
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
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from deco_jax.errors import UserError

SCHEMES = ("gs://", "s3://")
PACKAGES = {"gs://": "gcsfs", "s3://": "s3fs"}
# Retries of TensorStore, which waits 1, 2, 4, ... 32 s between them: about two minutes. Its default, 32, takes a
# quarter of an hour.
CHECKPOINT_RETRIES = 6
# Large enough for several small images of a tar at once, small enough to skip large ones.
INDEX_BLOCK = 2**18
TEMPORARY = "deco_jax_of_"  # then the process
PUT_SECONDS = 30.0  # between two uploads of a growing file

# NumPy reads headers by Python's parser, which in CPython 3.11 fails now and then when two threads enter it at once
# ("AST constructor recursion depth mismatch").
_OPENING = threading.Lock()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEMES)


def path(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path for a name.

    Returns:
        A pathlib.Path; in a bucket an epath.Path, which has the same methods (except absolute, and open's mode "a").

    Raises:
        UserError: the package that reads such a bucket is missing.
    """
    if not is_remote(name):
        return pathlib.Path(name)
    _filesystem(os.fspath(name)[:5])
    from etils import epath

    return epath.Path(name)


def is_file(name: str | os.PathLike[str]) -> bool:
    """Return whether such a file exists; names that are too long simply don't."""
    if not is_remote(name):
        return os.path.isfile(name)
    with answering(name):
        return bool(system(name).isfile(os.fspath(name)))


def absolute(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute path."""
    return path(name) if is_remote(name) else pathlib.Path(name).absolute()


@functools.cache
def _filesystem(scheme: str) -> Any:
    # gcsfs would ask another service, with credentials of its own, what kind of bucket it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        from etils.epath import backend

        __import__(PACKAGES[scheme])
        # Folder listings aren't cached, because other hosts write to them.
        fsspec.config.conf.setdefault(scheme[:2], {})["use_listings_cache"] = False
        system = backend.fsspec_backend.fs(scheme)
    except ImportError as error:
        raise UserError(
            f'reading {scheme} needs {PACKAGES[scheme]}: pip install "deco_jax[{scheme[:2]}]" ({error})'
        ) from error
    for name in ("gcsfs", "fsspec", "s3fs", "botocore", "asyncio"):  # they also log what they raise, with stack traces
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return system


def system(name: str | os.PathLike[str]) -> Any:
    """Return fsspec's file system for a remote path."""
    return _filesystem(os.fspath(name)[:5])


# ---------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def answering(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a bucket's refusal into a UserError, so that it isn't taken for a damaged file; FileNotFoundError stays."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if line := refusal(error):
            raise UserError(f"{os.fspath(name)} can't be read: {line}") from error
        raise


def read(name: str) -> bytes:
    """Read a whole object; FileNotFoundError if it doesn't exist, UserError if the bucket refuses."""
    with answering(name):
        return system(name).cat_file(name)


def read_range(name: str, start: int, size: int) -> bytes:
    """Read `size` bytes of an object from `start` on; errors as for `read`, and OSError if there are fewer."""
    with answering(name):
        data = system(name).cat_file(name, start=start, end=start + size) if size else b""
    if len(data) != size:
        raise OSError(f"{name} has become shorter")
    return data


def open_blocks(name: str) -> BinaryIO:
    """Open an object as a seekable file with blocks of INDEX_BLOCK, for many small reads in nearly ascending order."""
    options = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
    return system(name).open(name, "rb", block_size=INDEX_BLOCK, **options)


def tree(root: str) -> dict[str, str]:
    """List all objects under `root`, sorted: relative path → a stamp that changes when the object does."""
    found = system(root).find(root, detail=True)
    prefix = root.rstrip("/").removeprefix(root[:5]) + "/"
    return {name.removeprefix(prefix): stamp_of(info) for name, info in sorted(found.items()) if name != prefix}


def stamp(name: str) -> str:
    """Return a stamp that differs between an object and a later one of the same name."""
    return stamp_of(system(name).info(name))


def modified(name: str | os.PathLike[str]) -> float:
    """Return when an object was written, in seconds since 1970."""
    return system(name).modified(os.fspath(name)).timestamp()


def stamp_of(info: dict[str, Any]) -> str:
    return f"{info['size']} {info.get('generation') or info.get('ETag') or info.get('mtime')}"


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder under a remote `root` with its sorted files, without hidden ones, as `captioned_pairs.walk`."""
    folders: dict[str, list[str]] = {"": []}
    for name in tree(root):
        folder, _, file = name.rpartition("/")
        if file and not any(part.startswith(".") for part in name.split("/")):
            folders.setdefault(folder, []).append(file)
    yield from sorted(folders.items(), key=lambda item: item[0].split("/"))


def load_array(name: str | os.PathLike[str]) -> np.ndarray:
    """Load a .npy file, memory-mapped if it is on this machine."""
    if not is_remote(name):
        return np.load(name, mmap_mode="r")
    return np.load(io.BytesIO(path(name).read_bytes()))


def open_rows(name: str | os.PathLike[str]) -> Any:
    """Open a .npy file by rows: memory-mapped, or, in a bucket, read in ranges."""
    with _OPENING:
        return ArrayRows(os.fspath(name)) if is_remote(name) else np.load(name, mmap_mode="r")


class ArrayRows:
    """Rows of a .npy file in a bucket, each read separately, like a memory map of a local file."""

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
    """Return the MD5 of an object from the service's metadata; None if it has none."""
    import base64

    if info.get("md5Hash"):
        return base64.b64decode(info["md5Hash"])
    # The MD5 if the object was uploaded in one part, except where `has_kms_key`.
    etag = str(info.get("ETag", "")).strip('"')
    return bytes.fromhex(etag) if len(etag) == 32 else None


def has_kms_key(name: str) -> bool:
    """Return whether an object is encrypted by a key of Amazon's KMS, so that its ETag isn't its MD5."""
    if not name.startswith("s3://"):
        return False
    bucket, _, key = name.removeprefix("s3://").partition("/")
    head = system(name).call_s3("head_object", Bucket=bucket, Key=key)
    return str(head.get("ServerSideEncryption", "")).startswith("aws:kms")


# ---------------------------------------------------------------------------------------- writing


def put(name: str | os.PathLike[str], data: bytes) -> None:
    """Create or replace an object; it appears as a whole or not at all."""
    system(name).pipe_file(os.fspath(name), data)


def create(name: str | os.PathLike[str], data: bytes) -> None:
    """Create an object; FileExistsError if there is one, even if it was created at the same moment."""
    system(name).pipe_file(os.fspath(name), data, mode="create")


def append(name: pathlib.Path, text: str) -> None:
    """Append text to a file; one in a bucket is uploaded again as a whole."""
    if not is_remote(name):
        with name.open("a") as file:
            file.write(text)
        return
    put(name, (name.read_bytes() if name.exists() else b"") + text.encode())


@contextlib.contextmanager
def temporary() -> Iterator[str]:
    """Yield a local folder for uploads to a bucket; folders left behind by killed processes are removed."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*_*"):
        process = left.name.removeprefix(TEMPORARY).partition("_")[0]
        if process.isdigit() and not os.path.exists(f"/proc/{process}") and os.path.isdir("/proc"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}_") as folder:
        yield folder


@contextlib.contextmanager
def staged(name: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a local path to write to, which is uploaded as the object `name` if the block succeeds."""
    with temporary() as folder:
        part = pathlib.Path(folder) / os.path.basename(os.fspath(name))
        yield part
        system(name).put_file(str(part), os.fspath(name))


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a folder to write to: `folder` itself, or a local one whose files are uploaded to it at the end."""
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    with temporary() as part:
        yield pathlib.Path(part)
        if any(pathlib.Path(part).iterdir()):
            system(folder).put(part + "/", os.fspath(folder) + "/", recursive=True)


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a folder to write to, which replaces `folder` at the end; in a bucket, object by object."""
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
    """Remove a folder and everything in it; a missing one is no error."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            system(folder).rm(os.fspath(folder), recursive=True)


# ---------------------------------------------------------------------------------------- failing

# Packages whose exceptions mean that a bucket didn't do what it was asked.
LIBRARIES = ("gcsfs", "aiohttp", "s3fs", "botocore", "aiobotocore", "google", "requests", "fsspec")


def refusal(error: BaseException | None) -> str | None:
    """Return one line about what a bucket refused, or None if the error isn't from a bucket."""
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
    """Make TensorStore give up on a bucket after about two minutes."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # Orbax has no public setting for it. Each of its contexts is a copy of one of these.
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        context = getattr(tensorstore_utils, name, None)
        if isinstance(context, dict):
            for service in ("gcs", "s3"):
                context.setdefault(f"{service}_request_retries", {"max_retries": CHECKPOINT_RETRIES})

"""Buckets on this machine for tests: Google's in gcp-storage-emulator, Amazon's in moto."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import socket
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runs import files

NAME = "bucket"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"a bucket on this machine needs pip install {' '.join(missing)}")


needs_gcs = needs("gcp_storage_emulator", "gcsfs")
needs_s3 = needs("moto", "s3fs", "flask")
# aiohttp warns of how gcsfs puts more than a MiB at once.
large_puts = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def uses(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> Iterator[None]:
    """This process, and those that it starts, use a bucket; temporary files and copies lie in folders of their own."""
    from etils.epath import backend

    from deco_jax.run import storage

    (folder / "temporary").mkdir()
    more = {"TMPDIR": folder / "temporary", "DECO_JAX_CACHE": folder / "cache", "XDG_CACHE_HOME": folder / "cache"}
    for name, value in {**environment, **more}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where TMPDIR is remembered
    storage._filesystem.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    storage._filesystem.cache_clear()


def make_images(folder: pathlib.Path, captions: bool = False) -> pathlib.Path:
    """Twelve pictures of noise, in three classes or with captions."""
    for i in range(12):
        path = folder / ("pairs" if captions else f"class {i % 3}") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"noise number {i}")
    return folder


def upload(bucket: AnyBucket, folder: pathlib.Path, name: str) -> str:
    for relative, data in files(folder).items():
        bucket.upload(f"{name}/{relative}", data)
    return f"{bucket.url}/{name}"


def download(bucket: AnyBucket, prefix: str, folder: pathlib.Path) -> pathlib.Path:
    for name, data in bucket.files.items():
        if name.startswith(prefix + "/"):
            path = folder / name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


class Bucket:
    """gs://bucket, served by a thread; it can go away and come back with what it holds."""

    url = f"gs://{NAME}"

    def __init__(self) -> None:
        from gcp_storage_emulator import server, settings
        from gcp_storage_emulator.handlers import objects

        _complete(objects)
        self.port = free_port()
        self._settings, self._server = settings, server
        self._server_object = server.create_server("127.0.0.1", self.port, in_memory=True, default_bucket=NAME)
        self._storage = self._server_object._storage
        self._api: Any = None

    @property
    def env(self) -> dict[str, str]:
        """Of a process that is to use this bucket."""
        address = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        }

    def start(self) -> None:
        self._api = self._server.APIThread("127.0.0.1", self.port, self._storage, daemon=True)
        self._api.start()
        self._api.is_running.wait()

    def stop(self) -> None:
        self._api.join()

    @property
    def files(self) -> dict[str, bytes]:
        """Everything in it, by name."""
        found = self._storage.get_file_list(NAME, None, None)[0]
        names = sorted(item["name"] for item in found)
        return {name: self._storage.get_file(NAME, name) for name in names}

    def names(self, prefix: str = "") -> list[str]:
        """The names of everything in it that begins so."""
        time.sleep(0.01)  # as in `has`
        found = self._storage.get_file_list(NAME, None, None)[0]
        return sorted(item["name"] for item in found if item["name"].startswith(prefix))

    def has(self, name: str) -> bool:
        from gcp_storage_emulator.exceptions import NotFound

        time.sleep(0.01)  # whoever asks in a loop leaves the server some time
        try:
            return bool(self._storage.get_file_obj(NAME, name))
        except NotFound:
            return False

    def remove(self, name: str) -> None:
        self._storage.delete_file(NAME, name)

    def upload(self, name: str, data: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        address = f"http://127.0.0.1:{self.port}/upload/storage/v1/b/{NAME}/o?{query}"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(address, data or b" ", headers, method="POST")).close()


class S3Bucket:
    """s3://bucket, served by a thread; the same methods."""

    url = f"s3://{NAME}"

    def __init__(self) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints each request
        self.port = free_port()
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._client = functools.partial(
            boto3.client,
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._server.start()
        self._s3 = self._client()
        self._s3.create_bucket(Bucket=NAME)

    def stop(self) -> None:
        self._s3.close()
        self._server.stop()

    def names(self, prefix: str = "") -> list[str]:
        time.sleep(0.01)
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    @property
    def files(self) -> dict[str, bytes]:
        return {name: self._s3.get_object(Bucket=NAME, Key=name)["Body"].read() for name in self.names()}

    def has(self, name: str) -> bool:
        return name in self.names(name)

    def upload(self, name: str, data: bytes, **options: str) -> None:
        self._s3.put_object(Bucket=NAME, Key=name, Body=data, **options)

    def remove(self, name: str) -> None:
        self._s3.delete_object(Bucket=NAME, Key=name)


CLOUD = "DECO_JAX_CLOUD"
needs_cloud = pytest.mark.skipif(
    not os.environ.get(CLOUD),
    reason=f"needs a bucket of a real cloud, and credentials: {CLOUD}=gs://BUCKET/FOLDER or s3://BUCKET/FOLDER",
)


class RealBucket:
    """A new folder in the one that CLOUD names, with the same methods; its credentials are those of the machine."""

    env: Mapping[str, str] = {}

    def __init__(self) -> None:
        from deco_jax.run import storage

        self.url = f"{os.environ[CLOUD].rstrip('/')}/deco_jax_test_{uuid.uuid4().hex[:12]}"
        self._storage = storage

    def names(self, prefix: str = "") -> list[str]:
        time.sleep(0.2)
        return [name for name in self._storage.tree(self.url) if name.startswith(prefix)]

    @property
    def files(self) -> dict[str, bytes]:
        return {name: self._storage.read(f"{self.url}/{name}") for name in self.names()}

    def has(self, name: str) -> bool:
        time.sleep(0.2)
        return self._storage.path(f"{self.url}/{name}").exists()

    def upload(self, name: str, data: bytes) -> None:
        self._storage.put(f"{self.url}/{name}", data)

    def remove(self, name: str) -> None:
        self._storage.path(f"{self.url}/{name}").unlink()

    def clear(self) -> None:
        self._storage.remove_tree(self.url)


AnyBucket = Bucket | S3Bucket | RealBucket


@functools.cache
def _complete(objects: Any) -> None:
    """What Google's service does and the emulator doesn't: generations of what is read, ifGenerationMatch, moving."""
    download, insert = objects.download, objects.insert

    def generation(storage: Any, name: str, *, of: str) -> str | None:
        try:
            return storage.get_file_obj(of, name)["generation"]
        except Exception:
            return None

    def download_with_generation(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
        download(request, response, storage, *rest, **options)
        found = generation(storage, request.params["object_id"], of=request.params["bucket_name"])
        if found is not None:
            response["x-goog-generation"] = found

    def insert_if(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
        wanted = request.query.get("ifGenerationMatch")
        if wanted:
            name = (request.query.get("name") or [None])[0] or request.data["meta"]["name"]
            found = generation(storage, name, of=request.params["bucket_name"]) or "0"
            if found != wanted[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        insert(request, response, storage, *rest, **options)

    from gcp_storage_emulator import server

    def exchanged(handlers: Any) -> Any:
        new = {download: download_with_generation, insert: insert_if}
        return {method: new.get(handler, handler) for method, handler in handlers.items()}

    server.HANDLERS = tuple((pattern, exchanged(handlers)) for pattern, handlers in server.HANDLERS)
    real_get = objects.get

    def get(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
        real_get(request, response, storage, *rest, **options)
        if request.query.get("alt") == ["media"]:
            found = generation(storage, request.params["object_id"], of=request.params["bucket_name"])
            if found is not None:
                response["x-goog-generation"] = found

    def move(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage, *rest, **options)
        if response.status == HTTPStatus.OK:
            objects.delete(request, response, storage, *rest, **options)

    # gcsfs moves so, and tries again for a minute where it isn't known.
    moving = (
        rf"^{re.escape(server.settings.API_ENDPOINT)}/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$",
        {"POST": move},
    )
    server.HANDLERS = (
        moving,
        *(
            (pattern, {method: get if handler is real_get else handler for method, handler in handlers.items()})
            for pattern, handlers in server.HANDLERS
        ),
    )

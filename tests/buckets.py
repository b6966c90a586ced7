"""Buckets on this machine for tests: Google's in gcp-storage-emulator, Amazon's in moto."""

from __future__ import annotations

import functools
import importlib.util
import socket
import time
import urllib.parse
import urllib.request
from http import HTTPStatus
from typing import Any

import pytest

NAME = "bucket"


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"a bucket on this machine needs pip install {' '.join(missing)}")


needs_gcs = needs("gcp_storage_emulator", "gcsfs")
needs_s3 = needs("moto", "s3fs", "flask")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Bucket:
    """gs://bucket, served by a thread; it can go away and come back with what it holds."""

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

    def has(self, name: str) -> bool:
        from gcp_storage_emulator.exceptions import NotFound

        time.sleep(0.01)  # whoever asks in a loop leaves the server some time
        try:
            return bool(self._storage.get_file_obj(NAME, name))
        except NotFound:
            return False

    def upload(self, name: str, data: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        address = f"http://127.0.0.1:{self.port}/upload/storage/v1/b/{NAME}/o?{query}"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(address, data or b" ", headers, method="POST")).close()


@functools.cache
def _complete(objects: Any) -> None:
    """What Google's service does and the emulator doesn't: the generation of what is read, and ifGenerationMatch."""
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

    server.HANDLERS = tuple(
        (pattern, {method: get if handler is real_get else handler for method, handler in handlers.items()})
        for pattern, handlers in server.HANDLERS
    )

"""--mode=sample: draws images from a checkpoint's averaged weights, as a grid and, if asked, as the ADM suite's npz.

Class-to-image models draw all classes in order, or config.sample.classes. Text-to-image models draw
config.sample.prompts, or without them the data's captions. Finished batches are kept in samples/parts until all are
done, so an interrupted run continues. Images of an earlier request are kept in samples/earlier.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from deco_jax import api, images, interrupts
from deco_jax.conditioning import requests as requests_lib
from deco_jax.conditioning.requests import Prompts, Requests
from deco_jax.config import to_json
from deco_jax.data import prompts as prompts_lib
from deco_jax.data import sources
from deco_jax.run import distributed, files, lock, storage
from deco_jax.run.progress import Progress
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import save_png, write_atomically, write_json
from deco_jax.sampling import generate

REQUEST = "request.json"  # beside the images: the request that they belong to


def sample(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write the images into WORKDIR/samples."""
    prompts = requests_lib.open_prompts(config)
    from_data = bool(config.model.text_width) and prompts is None
    source = sources.open_source(config.data) if from_data else None
    model = api.open_model(config, workdir, checkpoint_path, source)
    requests = requests_lib.sampling_requests(config.sample, model.condition, prompts)
    folder = storage.path(workdir) / "samples"
    make_workdir(folder)
    # Another request at the same time would take this one's parts for its own.
    held = lock.RunLock(folder)
    distributed.on_main_host(held.acquire)
    try:
        _sample(config, folder, model, requests, prompts)
    finally:
        held.release()


def _sample(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    model: api.Model,
    requests: Requests,
    prompts: Prompts | None,
) -> None:
    fingerprint = generate.fingerprint(config, model.name, requests.names)
    parts = Parts(folder / "parts", fingerprint)
    main_host = jax.process_index() == 0
    if main_host:
        print(f"{requests.count:,} images from {model.name}, {parts.count:,} of them done; compiling ...", flush=True)
    progress = Progress(requests.count, parts.count, "images drawn")
    with interrupts.waits_for("the batch that is drawn"):
        for batch in model.images(requests, model.sampling(config), config.sample.batch_size, parts.count):
            parts.add(batch, write=main_host)
            progress(parts.count)
    request = {"fingerprint": fingerprint, "checkpoint": model.name, "sample": to_json(config)["sample"]}
    # The other hosts wait: one that ends early counts as lost.
    distributed.on_main_host(lambda: write_all(config, folder, parts, requests, prompts, request))


def write_all(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    parts: Parts,
    requests: Requests,
    prompts: Prompts | None,
    request: dict[str, Any],
) -> None:
    """Write the finished images into `folder` in the formats asked for; move an earlier request's images away first."""
    settings, paths = config.sample, [folder / "grid.png"]
    keep_earlier(folder, request["fingerprint"])
    write_json(folder / REQUEST, request)
    shown = np.unique(np.linspace(0, parts.count - 1, min(settings.grid_images, parts.count)).round().astype(int))
    names = None if requests.names is None else [requests.names[int(i)] for i in shown]
    columns = requests_lib.grid_columns(settings, None if requests.labels is None else requests.labels[shown])
    save_png(paths[0], images.sample_grid(parts.take(shown), columns, names))
    if prompts is not None:
        paths.append(folder / "images")
        write_prompted(paths[-1], prompts, parts)
    elif settings.png:
        paths.append(folder / "images")
        write_images(paths[-1], parts, requests.labels)
    if settings.npz:
        paths.append(folder / "samples.npz")
        write_npz(paths[-1], parts)
    for path in paths:
        print(f"wrote {path}")
    parts.remove()


def keep_earlier(folder: pathlib.Path, fingerprint: str) -> None:
    """Move what another request left in `folder` to folder/earlier/NUMBER, counting from 1."""
    found = [folder / name for name in (REQUEST, "grid.png", "samples.npz", "images") if (folder / name).exists()]
    note = folder / REQUEST
    if not found or (note.exists() and json.loads(note.read_text())["fingerprint"] == fingerprint):
        return
    earlier = folder / "earlier"
    numbers = [int(entry.name) for entry in earlier.glob("*") if entry.name.isdigit()]
    kept = earlier / str(max(numbers, default=0) + 1)
    for path in found:
        files.move(path, kept / path.name)
    print(f"the images of an earlier request are kept in {kept}", flush=True)


def write_images(folder: pathlib.Path, parts: Parts, labels: np.ndarray | None) -> None:
    """Write all images as INDEX.png, with classes as INDEX_class_LABEL.png; the folder appears when complete."""
    with storage.replaced_folder(folder) as part:
        for index in range(parts.count):
            name = f"{index:06d}" + ("" if labels is None else f"_class_{labels[index]}")
            save_png(part / f"{name}.png", parts.take(np.asarray([index]))[0])


def write_prompted(folder: pathlib.Path, prompts: Prompts, parts: Parts) -> None:
    """Write all images in their benchmark's layout; the folder appears when it is complete."""
    each = prompts.images_each
    with storage.replaced_folder(folder) as part:
        for i in range(len(prompts.set)):
            prompts_lib.write_images(part, prompts.set, i, parts.take(np.arange(i * each, (i + 1) * each)))


class Parts:
    """Finished batches of images of one request, as files FIRST_INDEX.npy; those of another request are deleted."""

    def __init__(self, folder: pathlib.Path, request: str) -> None:
        self.folder = folder
        self.count = 0
        self._firsts: list[int] = []  # on the main host: the first image of each file
        self._loaded: tuple[int, np.ndarray] | None = None  # of a bucket a file at a time: it is fetched whole
        if jax.process_index() == 0:
            note = folder / "request"
            if not note.exists() or note.read_text() != request:
                storage.remove_tree(folder)
                write_atomically(note, request.encode())
            while self._path(self.count).exists():
                self._firsts.append(self.count)
                self.count += len(self._load(self.count))
        self.count = distributed.from_main_host(self.count)

    def _path(self, first: int) -> pathlib.Path:
        return self.folder / f"{first:09d}.npy"

    def add(self, batch: np.ndarray, write: bool = True) -> None:
        if write:
            self._firsts.append(self.count)
            files.save_array(self._path(self.count), batch)
        self.count += len(batch)

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield all batches in order."""
        return map(self._load, self._firsts)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return images by their indices, which ascend, uint8 [len(indices), height, width, 3]."""
        holding = np.searchsorted(self._firsts, indices, side="right") - 1  # the file of each image
        firsts = np.asarray(self._firsts)[holding]
        return np.stack([self._load(first)[i - first] for i, first in zip(indices, firsts.tolist(), strict=True)])

    def _load(self, first: int) -> np.ndarray:
        if self._loaded is None or self._loaded[0] != first:
            self._loaded = (first, storage.load_array(self._path(first)))
        return self._loaded[1]

    def remove(self) -> None:
        storage.remove_tree(self.folder)


def write_npz(path: pathlib.Path, parts: Parts) -> None:
    """Write arr_0, uint8 [images, height, width, 3], batch by batch to keep memory small."""
    shape = (parts.count, *parts.take(np.asarray([0])).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        files.whole(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for array in parts.arrays():
            file.write(np.ascontiguousarray(array).tobytes())

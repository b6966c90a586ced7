"""--mode=sample: images from a checkpoint's EMA weights, as a grid and, if asked, as the ADM suite's npz.

Of all classes in their order; or, text-to-image, of config.sample.prompts, or without them of the data's captions.

Finished batches are kept in samples/parts until all are there, so a run that was cut off continues.
"""

from __future__ import annotations

import pathlib
import time
import zipfile

import jax
import ml_collections
import numpy as np

from deco_jax import images
from deco_jax.conditioning import requests as requests_lib
from deco_jax.conditioning.condition import open_condition
from deco_jax.conditioning.requests import Prompts, Requests
from deco_jax.data import prompts as prompts_lib
from deco_jax.data import sources
from deco_jax.models import network as network_lib
from deco_jax.run import checkpoint, distributed, files, sharding, storage
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import save_png, write_atomically
from deco_jax.sampling import generate


def sample(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write the images into WORKDIR/samples."""
    settings = config.sample
    where = checkpoint.find(workdir, checkpoint_path, config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    prompts = requests_lib.open_prompts(config)
    from_data = bool(config.model.text_width) and prompts is None
    condition = open_condition(config, mesh, sources.open_source(config.data) if from_data else None)
    network = network_lib.build(config.model.to_dict())
    params = checkpoint.load_average(where, network.shapes, config, mesh)
    requests = requests_lib.sampling_requests(config.sample, condition, prompts)
    count = requests.count
    folder = storage.path(workdir) / "samples"
    make_workdir(folder)

    parts = Parts(folder / "parts", generate.fingerprint(config, where, requests.names))
    main_host = jax.process_index() == 0
    if main_host:
        print(f"{count:,} images from {where}, {parts.count:,} of them done; compiling ...", flush=True)
    generator = generate.make_generator(network, config, mesh)
    began, compiled = time.monotonic(), False
    for batch in generate.generate_images(generator, params, requests, settings.batch_size, mesh, parts.count):
        parts.add(batch, write=main_host)
        took = "" if compiled else f" (compiled and drawn in {time.monotonic() - began:.1f} s)"
        compiled = True
        if main_host:
            print(f"{parts.count:,} of {count:,} images{took}", flush=True)
    # The others wait: a host that ends early is taken for lost.
    distributed.on_main_host(lambda: write_all(config, folder, parts, requests, prompts))


def write_all(
    config: ml_collections.ConfigDict, folder: pathlib.Path, parts: Parts, requests: Requests, prompts: Prompts | None
) -> None:
    """What is asked for of the finished images, into `folder`; then the parts go."""
    shown = np.unique(np.linspace(0, parts.count - 1, min(config.sample.grid_images, parts.count)).round().astype(int))
    captions = None if requests.names is None else [requests.names[int(i)] for i in shown]
    save_png(folder / "grid.png", images.sample_grid(parts.take(shown), config.model.num_classes, captions))
    print(f"wrote {folder / 'grid.png'}")
    if prompts is not None:
        write_prompted(folder / "images", prompts, parts)
        print(f"wrote {folder / 'images'}")
    if config.sample.npz:
        write_npz(folder / "samples.npz", parts)
        print(f"wrote {folder / 'samples.npz'}")
    parts.remove()


def write_prompted(folder: pathlib.Path, prompts: Prompts, parts: Parts) -> None:
    """All images in their benchmark's layout; the folder appears when it is complete, and replaces an older one."""
    each = prompts.images_each
    with storage.replaced_folder(folder) as part:
        for i in range(len(prompts.set)):
            prompts_lib.write_images(part, prompts.set, i, parts.take(np.arange(i * each, (i + 1) * each)))


class Parts:
    """Finished batches of images as files FIRST_INDEX.npy, for one request; another request's are deleted."""

    def __init__(self, folder: pathlib.Path, request: str) -> None:
        self.folder = folder
        self.count = 0
        if jax.process_index() == 0:
            note = folder / "request"
            if not note.exists() or note.read_text() != request:
                storage.remove_tree(folder)
                write_atomically(note, request.encode())
            while (path := self._path(self.count)).exists():
                self.count += len(storage.load_array(path))
        self.count = distributed.from_main_host(self.count)

    def _path(self, first: int) -> pathlib.Path:
        return self.folder / f"{first:09d}.npy"

    def add(self, batch: np.ndarray, write: bool = True) -> None:
        if write:
            with files.whole(self._path(self.count)) as part, part.open("wb") as file:
                np.save(file, batch)
        self.count += len(batch)

    def arrays(self) -> list[np.ndarray]:
        """All batches, memory-mapped, in order."""
        return [storage.load_array(path) for path in sorted(self.folder.glob("*.npy"))]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Images by index, uint8 [len(indices), height, width, 3]."""
        paths = sorted(self.folder.glob("*.npy"))
        firsts = np.asarray([int(path.stem) for path in paths])
        holding = np.searchsorted(firsts, indices, side="right") - 1  # of each image, the file that it is in
        arrays = {k: storage.load_array(paths[k]) for k in np.unique(holding)}
        return np.stack([arrays[k][i - firsts[k]] for i, k in zip(indices, holding, strict=True)])

    def remove(self) -> None:
        storage.remove_tree(self.folder)


def write_npz(path: pathlib.Path, parts: Parts) -> None:
    """arr_0 uint8 [images, height, width, 3], written batch by batch so that memory stays small."""
    arrays = parts.arrays()
    header = {"descr": "|u1", "fortran_order": False, "shape": (parts.count, *arrays[0].shape[1:])}
    with (
        files.whole(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())

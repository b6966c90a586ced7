"""--mode=sample: images from a checkpoint's EMA weights, as a grid and, if asked, as the ADM suite's npz.

Finished batches are kept in samples/parts until all are there, so a run that was cut off continues.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import time
import zipfile

import jax
import ml_collections
import numpy as np

from deco_jax import checkpoint, distributed, generate, images, sharding
from deco_jax.config import to_json
from deco_jax.models import network as network_lib
from deco_jax.workdir import make_workdir
from deco_jax.writer import save_png, write_atomically


def sample(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Write config.sample.num_images images, in class order, into WORKDIR/samples."""
    settings = config.sample
    where = checkpoint.find(workdir, checkpoint_path)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    network = network_lib.build(config.model.to_dict())
    params = checkpoint.load_average(where, network.shapes, config, mesh)
    folder = pathlib.Path(workdir) / "samples"
    make_workdir(folder)

    labels = generate.class_labels(settings.num_images, config.model.num_classes)
    parts = Parts(folder / "parts", fingerprint(config, where))
    main_host = jax.process_index() == 0
    if main_host:
        print(f"{len(labels):,} images from {where}, {parts.count:,} of them done; compiling ...", flush=True)
    generator = generate.make_generator(network, config, mesh)
    began, compiled = time.monotonic(), False
    for batch in generate.generate_images(generator, params, labels, settings.batch_size, mesh, parts.count):
        parts.add(batch, write=main_host)
        took = "" if compiled else f" (compiled and drawn in {time.monotonic() - began:.1f} s)"
        compiled = True
        if main_host:
            print(f"{parts.count:,} of {len(labels):,} images{took}", flush=True)
    if not main_host:
        return

    shown = np.unique(np.linspace(0, len(labels) - 1, min(settings.grid_images, len(labels))).round().astype(int))
    save_png(folder / "grid.png", images.sample_grid(parts.take(shown), config.model.num_classes))
    print(f"wrote {folder / 'grid.png'}")
    if settings.npz:
        write_npz(folder / "samples.npz", parts)
        print(f"wrote {folder / 'samples.npz'}")
    parts.remove()


def fingerprint(config: ml_collections.ConfigDict, where: pathlib.Path) -> str:
    """Names everything that the images depend on."""
    values = to_json(config)
    drawn_from = {
        "checkpoint": str(where), "model": values["model"], "size": values["data"]["image_size"],
        "sample": {k: v for k, v in values["sample"].items() if k not in ("npz", "grid_images", "batch_size")},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(drawn_from, sort_keys=True).encode()).hexdigest()


class Parts:
    """Finished batches of images as files FIRST_INDEX.npy, for one request; another request's are deleted."""

    def __init__(self, folder: pathlib.Path, request: str) -> None:
        self.folder = folder
        note = folder / "request"
        if jax.process_index() == 0 and (not note.exists() or note.read_text() != request):
            shutil.rmtree(folder, ignore_errors=True)
            write_atomically(note, request.encode())
        self.count = 0
        while (path := self._path(self.count)).exists():
            self.count += len(np.load(path, mmap_mode="r"))
        self.count = distributed.from_main_host(self.count)

    def _path(self, first: int) -> pathlib.Path:
        return self.folder / f"{first:09d}.npy"

    def add(self, batch: np.ndarray, write: bool = True) -> None:
        if write:
            part = self.folder / "part"
            with part.open("wb") as file:
                np.save(file, batch)
            part.replace(self._path(self.count))
        self.count += len(batch)

    def arrays(self) -> list[np.ndarray]:
        """All batches, memory-mapped, in order."""
        return [np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Images by index, uint8 [len(indices), height, width, 3]."""
        wanted, first, taken = set(indices.tolist()), 0, []
        for array in self.arrays():
            taken += [array[i - first] for i in range(first, first + len(array)) if i in wanted]
            first += len(array)
        return np.stack(taken)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def write_npz(path: pathlib.Path, parts: Parts) -> None:
    """arr_0 uint8 [images, height, width, 3], written batch by batch so that memory stays small."""
    arrays = parts.arrays()
    header = {"descr": "|u1", "fortran_order": False, "shape": (parts.count, *arrays[0].shape[1:])}
    unfinished = path.with_name(path.name + ".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for array in arrays:
                file.write(np.ascontiguousarray(array).tobytes())
    unfinished.replace(path)

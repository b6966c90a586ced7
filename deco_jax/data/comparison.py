"""Measures what reading images costs a core, with this pipeline and PyTorch's DataLoader, for --mode=benchmark."""

from __future__ import annotations

import io
import os
import pathlib
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from deco_jax.data import pipeline
from deco_jax.data.source import Source

ROUNDS, BATCHES, BATCH_SIZE = 5, 16, 32


def images_per_core_second(source: Source, image_size: tuple[int, int], fast_crop: bool, count: int = 64) -> float:
    """Return how many images one core reads, decodes and crops per second of processor time."""
    indices = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    pipeline.read_one(source, indices[0], image_size, fast_crop=fast_crop)
    began = time.process_time()
    for index in indices:
        pipeline.read_one(source, index, image_size, fast_crop=fast_crop)
    return count / (time.process_time() - began)


class Plain:
    """A data set for PyTorch's DataLoader: ADM's preparation in PIL's plainest words, the whole image resized."""

    def __init__(self, source: Source, image_size: tuple[int, int]) -> None:
        self._source, self._size = source, image_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        sample = self._source[index]
        encoded = sample["image"]
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as picture:
            image = picture.convert("RGB")
        height, width = self._size
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width / image.width, height / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = (image.height - height) // 2, (image.width - width) // 2
        return pixels[top : top + height, left : left + width], int(sample["label"])


def against_torch(source: Source, image_size: tuple[int, int], fast_crop: bool) -> dict[str, float]:
    """Measure images per core second with this pipeline and PyTorch's DataLoader, one worker each, in turns.

    The time is the processor time of the workers and this process, so other work on the machine doesn't count. Figures
    are medians of ROUNDS.

    Raises:
        ImportError: PyTorch is not installed.
    """
    from torch.utils.data import DataLoader, RandomSampler

    plain: Any = Plain(source, image_size)
    # One epoch without end: a worker's time would be lost with the worker.
    sampler = RandomSampler(plain, replacement=True, num_samples=10**9)
    theirs = iter(DataLoader(plain, BATCH_SIZE, sampler=sampler, num_workers=1, multiprocessing_context="spawn"))
    ours = pipeline.train_batches(
        source, image_size=image_size, batch_size=BATCH_SIZE, seed=0, num_workers=1, fast_crop=fast_crop
    )
    rates: dict[str, list[float]] = {"deco_jax": [], "torch": []}
    try:
        for _ in range(ROUNDS):
            for name, batches in (("deco_jax", ours), ("torch", theirs)):
                for _ in range(4):  # past what a worker had ready
                    next(batches)
                began = cpu_seconds()
                for _ in range(BATCHES):
                    next(batches)
                rates[name].append(BATCHES * BATCH_SIZE / (cpu_seconds() - began))
    finally:
        ours.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": medians["deco_jax"] / medians["torch"]}


def cpu_seconds() -> float:
    """Return the processor time so far of this process and all its children; Linux only."""
    family, times, parents = {os.getpid()}, {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:  # it ended
            continue
        if fields:
            parents[int(entry.name)], times[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    grown = True
    while grown:
        children = {process for process, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(times.get(process, 0) for process in family) / os.sysconf("SC_CLK_TCK")

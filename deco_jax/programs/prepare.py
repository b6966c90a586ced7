"""--mode=prepare: writes config.data as ArrayRecord shards to WORKDIR, from which a pod reads at full speed.

Train on them with --config.data.source=prepared --config.data.path=WORKDIR. Hosts take turns with the shards; an
interrupted run continues with the missing ones.
"""

from __future__ import annotations

import io
import json
import os
import time
from concurrent.futures import as_completed
from typing import Any

import jax
import ml_collections
import numpy as np

from deco_jax.data import prepared, sources
from deco_jax.data.captioned_pairs import worker_pool
from deco_jax.data.source import parse_weights
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.run import distributed, storage
from deco_jax.run.workdir import make_workdir
from deco_jax.run.writer import write_atomically, write_json

SHARD_IMAGES = 1024
SECONDS_BETWEEN_LINES = 10.0


def prepare(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Write all missing shards, then the files that make them a dataset.

    Raises:
        UserError: WORKDIR holds the shards of another source, or too many images can't be read.
    """
    data, folder = config.data, storage.path(workdir)
    if workdir.startswith("s3://"):
        raise UserError(f"--workdir={workdir}: ArrayRecord's reader only opens disks and gs://; give one of these")
    if data.random_crop and data.prepared_images != "files":
        raise UserError(
            f"config.data.random_crop needs whole images, but config.data.prepared_images={data.prepared_images} "
            "stores cropped ones; prepare with config.data.prepared_images=files"
        )
    for name in ("weights", "prior_path"):
        if data.get(name):
            raise UserError(
                f"--mode=prepare writes one dataset, but config.data.{name} mixes several; prepare each by itself, and "
                f"give config.data.{name} with the prepared folders when you train"
            )
    source = sources.open_source(data)
    distributed.check_same_data(source)
    size = image_sides(data.image_size)
    made_of: dict[str, Any] = {
        "version": prepared.VERSION,
        "source": [data.source, data.path, data.split],
        "samples": len(source),
        "image_size": list(size),
        "images": data.prepared_images,
        "shard": SHARD_IMAGES,
    }
    if data.source == "parquet":
        made_of["columns"] = [data.image_column, data.label_column, data.caption_column]
    if source.caption_weights:
        made_of["captions"] = list(parse_weights(data.captions))
    make_workdir(folder)
    distributed.on_main_host(lambda: _check_same(folder / "made_of.json", made_of))
    shards = [range(start, min(start + SHARD_IMAGES, len(source))) for start in range(0, len(source), SHARD_IMAGES)]
    mine = range(jax.process_index(), len(shards), jax.process_count())
    left = [number for number in mine if not (folder / f"{number:05d}.json").exists()]
    print(f"{len(source):,} images in {len(shards):,} shards; {len(left):,} to write here", flush=True)
    began = spoke = time.monotonic()
    done = 0
    with worker_pool(data.num_workers) as pool:
        jobs = {
            pool.submit(prepared.write_shard, source, shards[n], workdir, n, data.prepared_images, size): n
            for n in left
        }
        for job in as_completed(jobs):
            job.result()
            done += len(shards[jobs[job]])
            if time.monotonic() - spoke > SECONDS_BETWEEN_LINES or done == sum(len(shards[n]) for n in left):
                spoke = time.monotonic()
                print(f"{done:,} images, {done / (spoke - began):.3g} per second", flush=True)
    # Once all hosts have reached this point, the other hosts' shards exist.
    distributed.all_hosts(True)
    distributed.on_main_host(lambda: _finish(folder, made_of, source, len(shards), data.max_unreadable))


def _check_same(path: Any, made_of: dict[str, Any]) -> None:
    if path.exists():
        before = json.loads(path.read_text())
        if before != made_of:
            different = ", ".join(
                f"{key}: {before.get(key)} there, {made_of[key]} here"
                for key in made_of
                if before.get(key) != made_of[key]
            )
            raise UserError(f"{path.parent} was prepared from something else ({different}); give another --workdir")
    else:
        write_json(path, made_of)


def _finish(folder: Any, made_of: dict[str, Any], source: sources.Source, num_shards: int, allowed: float) -> None:
    notes = [json.loads((folder / f"{number:05d}.json").read_text()) for number in range(num_shards)]
    left_out = [name for note in notes for name in note["left_out"]]
    for name in left_out[:20]:
        print(f"left out: {name}")
    if len(left_out) > allowed * max(len(source), 1000):
        raise UserError(
            f"{len(left_out):,} of {len(source):,} images can't be read, more than the share of {allowed:g} that "
            f"config.data.max_unreadable allows; the first is {left_out[0]}"
        )
    labels = np.concatenate([np.asarray(note["labels"], np.int32) for note in notes])
    buffer = io.BytesIO()
    np.save(buffer, labels)
    write_atomically(folder / "labels.npy", buffer.getvalue())
    counts = [len(note["labels"]) for note in notes]
    write_json(folder / prepared.INDEX, {**made_of, "class_names": list(source.class_names), "counts": counts})
    print(
        f"prepared {len(labels):,} images, {len(left_out):,} left out; train with --config.data.source=prepared "
        f"--config.data.path={os.fspath(folder)}"
    )

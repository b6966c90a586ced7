"""Makes uint8 batches from a source, with Grain.

    shuffle → repeat → read, decode, crop → flip → batches → this host's → from the step on → worker processes

Every stage is a function of the position in the stream. So the order only depends on the seed and the step, not on the
number of workers or hosts, and a run resumes by starting at its step.
"""

from __future__ import annotations

import functools
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from deco_jax.data import transforms
from deco_jax.data.mixture import Mixture
from deco_jax.data.source import BlockOrder, choose_caption
from deco_jax.data.sources import Source
from deco_jax.data.workers import follow_main
from deco_jax.errors import UserError

# (index of the image, its caption) → arrays of fixed shapes that take the caption's place in the sample
EncodeCaption = Callable[[int, str], dict[str, np.ndarray]]

# The share of unreadable images counts as if at least this many had been read: one bad file is no reason to stop.
MIN_IMAGES_JUDGED = 1000


class WorkerLostError(UserError):
    """A data worker was killed, by its number or by the lack of memory."""


class Batches(Iterator[dict[str, Any]]):
    """Batches as dicts: `image` uint8 `[batch, height, width, 3]`, `label` int32 `[batch]`, `unreadable` list of names,
    and what `encode_caption` made of the captions.

    `unreadable` names the images of this batch that could not be read and were replaced by the next of their class;
    each name is logged once. When they exceed `max_unreadable` of the images handed out so far (of at least
    MIN_IMAGES_JUDGED), the next batch raises UserError. `close()` ends the worker processes.
    """

    def __init__(
        self, batches: grain.MapDataset, source: Source, num_workers: int, max_unreadable: float, batch_bytes: int
    ) -> None:
        self._source = source
        self._max_unreadable = max_unreadable
        self._logged: set[str] = set()
        self.num_images = 0
        self.num_unreadable = 0
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain hands its flags on to the workers; outside app.run nobody parsed
                flags.FLAGS.mark_as_parsed()
            dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
            # Small arrays are cheaper to send than to map. Three batches a worker are under way: made, waiting, in use.
            min_shm_size = 2**20 if _fits_shared_memory(3 * num_workers * batch_bytes) else 2**62
            options = grain.experimental.DatasetOptions(min_shm_size=min_shm_size)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers), lambda index, count: follow_main())
        else:
            dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        self._iterator: grain.DatasetIterator | None = iter(dataset)

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = re.search(r"exit code (-?\d+)", str(error))
            raise WorkerLostError(
                f"a data worker was killed{f' (exit code {code[1]})' if code else ''}, usually because this host is "
                "out of memory; lower config.data.num_workers and start the same command again"
            ) from error
        names = [self._source.name(int(i)) for i in batch["unreadable"] if i >= 0]
        for name in names:
            if name not in self._logged:
                logging.warning("unreadable image, replaced by the next one of its class: %s", name)
                self._logged.add(name)
        self.num_images += len(batch["unreadable"])
        self.num_unreadable += len(names)
        if self.num_unreadable > self._max_unreadable * max(self.num_images, MIN_IMAGES_JUDGED):
            self.close()
            raise UserError(
                f"{self.num_unreadable} of {self.num_images} images could not be read, more than the share of "
                f"{self._max_unreadable:g} allowed by data.max_unreadable; the last was {names[-1]}"
            )
        return {**{key: np.asarray(value) for key, value in batch.items()}, "unreadable": names}

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def train_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    num_workers: int = 0,
    flip: bool = False,
    random_crop: bool = False,
    max_unreadable: float = 0.01,
    encode_caption: EncodeCaption | None = None,
    fast_crop: bool = False,
) -> Batches:
    """Yield endless batches for training, reshuffled every epoch, from step `start_step` on.

    `image_size` is (height, width), `batch_size` global. Host i gets rows i·local to (i + 1)·local of each global
    batch, local = batch_size / host_count: the hosts' rows in their order are what a single host would get.
    `flip` mirrors half of the images, `random_crop` cuts them at random; `fast_crop`: see `transforms.center_crop`.
    `encode_caption` runs in the workers and is pickled to them.
    """

    def maybe_flip(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**sample, "image": transforms.flip(sample["image"])} if rng.random() < 0.5 else sample

    samples = _in_random_order(source, seed)
    if random_crop or source.num_captions > 1:
        samples = samples.random_map(
            lambda index, rng: read_one(source, index, image_size, encode_caption, rng, fast_crop, random_crop)
        )
    else:
        samples = samples.map(lambda index: read_one(source, index, image_size, encode_caption, fast_crop=fast_crop))
    if flip:
        samples = samples.random_map(maybe_flip)
    # Hosts take turns with whole local batches, which makes their rows contiguous in the global one.
    local_size = _local_size(batch_size, host_count)
    batches = samples.batch(local_size, drop_remainder=True)[host_index::host_count][start_step:]
    return Batches(batches, source, num_workers, max_unreadable, local_size * image_size[0] * image_size[1] * 3)


def _in_random_order(source: Source, seed: int) -> grain.MapDataset:
    """Yield the endless indices of a source, in another order every epoch."""
    if isinstance(source, Mixture):
        # Each part has an order of its own, whatever the shares of the others are.
        orders = [
            _in_random_order(part, seed + number).map(functools.partial(operator.add, start))
            for number, (part, start) in enumerate(zip(source.parts, source.starts(), strict=True))
        ]
        return grain.MapDataset.mix(orders, source.weights).seed(seed)
    if source.blocks is None:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    return grain.MapDataset.range(2**62).seed(seed).map(BlockOrder(source.blocks, seed))


def epoch(
    source: Source,
    image_size: tuple[int, int],
    *,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
    num_workers: int = 0,
    max_unreadable: float = 0.01,
    indices: np.ndarray | None = None,
    encode_caption: EncodeCaption | None = None,
) -> Batches:
    """Yield every sample (or those of `indices`) once, in order, as for training but unshuffled and never mirrored.

    `batch_size` is global; the hosts take turns with batches of batch_size / host_count. The very last batch may be
    shorter, and hosts may differ by one in their number of batches.
    """
    chosen = range(len(source)) if indices is None else indices
    samples = grain.MapDataset.range(len(chosen)).map(
        lambda i: read_one(source, int(chosen[i]), image_size, encode_caption)
    )
    local_size = _local_size(batch_size, host_count)
    batches = samples.batch(local_size)[host_index::host_count]
    return Batches(batches, source, num_workers, max_unreadable, local_size * image_size[0] * image_size[1] * 3)


def read_one(
    source: Source,
    index: int,
    image_size: tuple[int, int],
    encode_caption: EncodeCaption | None = None,
    rng: np.random.Generator | None = None,
    fast_crop: bool = False,
    random_crop: bool = False,
) -> dict[str, Any]:
    """One sample: `image` uint8 `[height, width, 3]`, `label` int32, `unreadable` int64, and what its source adds.

    An unreadable image is replaced by the next readable one of its class, and `unreadable` is then `index` instead
    of −1. A caption is replaced by what `encode_caption` makes of it and of its number (the image's index times the
    captions of each, plus which of them); without `encode_caption` it is dropped. `rng` draws among several captions,
    and the crop where that is random. Raises UserError where no image of the class can be read.
    """
    used, sample = index, {}
    while True:
        try:
            sample = source[used]
            picture = transforms.decode(sample["image"])
            if random_crop and rng is not None:
                image = transforms.random_crop(picture, image_size, rng)
            else:
                image = transforms.center_crop(picture, image_size, fast_crop)
            which = choose_caption(sample["captions"], source.caption_weights, rng) if "captions" in sample else 0
        except UserError:
            raise
        except Exception as error:  # on a damaged file PIL raises nearly anything
            used = source.next_of_class(used)
            if used == index:
                kind = f" of class '{source.class_names[sample['label']]}'" if sample and source.class_names else ""
                raise UserError(
                    f"no image{kind} can be read, {source.name(index)} for one: {error}; check the files"
                ) from error
        else:
            break
    captions = sample.pop("captions", None) or [sample.pop("caption", None)]
    number = used * source.num_captions + which
    encoded = {} if encode_caption is None else encode_caption(number, captions[which])
    unreadable = np.int64(-1 if used == index else index)
    return {**sample, **encoded, "image": image, "label": np.int32(sample["label"]), "unreadable": unreadable}


def _local_size(batch_size: int, host_count: int) -> int:
    if batch_size < 1 or batch_size % host_count:
        raise UserError(f"data.batch_size={batch_size} must be a positive multiple of the {host_count} hosts")
    return batch_size // host_count


def _fits_shared_memory(size: int) -> bool:
    """Return whether /dev/shm has `size` bytes: containers often have 64 MB, and a worker that exceeds it is killed."""
    return not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free > size

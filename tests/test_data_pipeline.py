"""Batches: the same stream on any number of workers and hosts and from any step; unreadable images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from deco_jax.data.pipeline import MIN_IMAGES_JUDGED, epoch, read_one, train_batches
from deco_jax.data.sources import Digits, ImageFolder, Source
from deco_jax.errors import UserError
from tests.helpers import ROOT, first_batches

SIZE = (4, 6)


class Numbered(Source):
    """`count` images in two classes, odd and even; image i has i in its left half and 255 − i in its right."""

    def __init__(self, count: int, bad: frozenset[int] = frozenset()):
        self.class_names = ["even", "odd"]
        self._count = count
        self._bad = bad

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        image = np.full((*SIZE, 3), index, np.uint8)
        image[:, SIZE[1] // 2 :] = 255 - index
        return {"image": b"broken" if index in self._bad else image, "label": index % 2}

    def name(self, index):
        return f"number {index}"

    def next_of_class(self, index):
        return index + 2 if index + 2 < self._count else index % 2


def take(count: int, source: Source, **options) -> list[dict]:
    options = {"image_size": SIZE, "batch_size": 6, "seed": 1, "flip": True, **options}
    return first_batches(count, source, **options)


def same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
        assert a["unreadable"] == b["unreadable"]


def numbers(batches: list[dict]) -> list[int]:
    """Which images the batches hold, whether mirrored or not."""
    left = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).astype(int)
    return np.minimum(left, 255 - left).tolist()


def test_batches():
    batches = take(5, Numbered(100))
    for batch in batches:
        assert set(batch) == {"image", "label", "unreadable"}
        assert batch["image"].shape == (6, *SIZE, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].shape == (6,)
        assert batch["label"].dtype == np.int32
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [n % 2 for n in numbers(batches)]


def test_each_epoch_has_every_image_once_in_another_order():
    order = numbers(take(10, Numbered(20)))  # 60 images: three epochs, batches across their borders
    epochs = [order[i : i + 20] for i in (0, 20, 40)]
    assert [sorted(one) for one in epochs] == [list(range(20))] * 3
    assert len({tuple(one) for one in [*epochs, range(20)]}) == 4
    assert numbers(take(10, Numbered(20), seed=2)) != order


def test_flip():
    left = np.concatenate([batch["image"][:, 0, 0, 0] for batch in take(100, Numbered(100))])
    flipped = (left > 127).mean()
    assert abs(flipped - 0.5) < 4 * 0.5 / np.sqrt(600)
    plain = np.concatenate([batch["image"][:, 0, 0, 0] for batch in take(20, Numbered(100), flip=False)])
    assert (plain < 100).all()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(workers):
    source = Numbered(30, frozenset({3, 9}))
    same(take(12, source, num_workers=workers), take(12, source))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume(workers):
    source = Numbered(30, frozenset({3}))
    whole = take(12, source)
    same(take(5, source, start_step=7, num_workers=workers), whole[7:])


def test_hosts_share_the_batch():
    source = Numbered(30, frozenset({3}))
    whole = take(8, source)
    hosts = [take(8, source, host_index=host, host_count=2) for host in range(2)]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in ("image", "label")}
        | {"unreadable": a["unreadable"] + b["unreadable"]}
        for a, b in zip(*hosts, strict=True)
    ]
    same(joined, whole)
    same(take(3, source, host_index=1, host_count=2, start_step=5, num_workers=2), hosts[1][5:])


def test_batch_must_divide_among_hosts():
    with pytest.raises(UserError, match="batch_size=6"):
        take(1, Numbered(30), host_count=4)


def test_arrays_survive_the_workers():
    """Batches large enough to go through shared memory stay valid after later ones and after close."""
    options = {"image_size": (300, 400), "batch_size": 4, "flip": False}
    plain, shared = (take(6, Digits(), num_workers=workers, **options) for workers in (0, 1))
    same(plain, shared)


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr("deco_jax.data.pipeline._fits_shared_memory", lambda size: False)
    options = {"image_size": (300, 400), "batch_size": 4, "flip": False}
    plain, sent = (take(3, Digits(), num_workers=workers, **options) for workers in (0, 1))
    same(plain, sent)


def test_unreadable_is_replaced_by_the_next_of_its_class(caplog):
    source = Numbered(20, frozenset({4, 6, 19}))
    stream = take(10, Numbered(20), flip=False)
    with caplog.at_level("WARNING", "absl"):
        damaged = take(10, source, flip=False)
    expected = [{4: 8, 6: 8, 19: 1}.get(n, n) for n in numbers(stream)]
    assert numbers(damaged) == expected
    for batch, reference in zip(damaged, stream, strict=True):
        np.testing.assert_array_equal(batch["label"], reference["label"])
        assert batch["unreadable"] == [f"number {n}" for n in numbers([reference]) if n in (4, 6, 19)]
    logged = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert sorted(logged) == ["number 19", "number 4", "number 6"]  # once, though three epochs were read


def test_a_class_without_a_readable_image():
    source = Numbered(20, frozenset(range(0, 20, 2)))
    for workers in (0, 1):
        with pytest.raises(UserError, match="no image of class 'even' can be read") as caught:
            take(1, source, num_workers=workers, max_unreadable=1.0)
        assert "\n" not in str(caught.value)


def test_too_many_unreadable():
    """1 of 20 is bad. 1 % of at least 1,000 images allows ten; the eleventh comes in epoch eleven, at 5 %."""
    source = Numbered(20, frozenset({5}))
    batches = train_batches(source, image_size=SIZE, batch_size=20, seed=1)
    for _ in range(10):
        assert next(batches)["unreadable"] == ["number 5"]
    with pytest.raises(UserError, match=r"11 of 220 images .* 0\.01 .* number 5"):
        next(batches)

    batches = train_batches(source, image_size=SIZE, batch_size=20, seed=1, max_unreadable=0.06)
    for _ in range(2 * MIN_IMAGES_JUDGED // 20):
        next(batches)
    assert batches.num_images == 2 * MIN_IMAGES_JUDGED
    assert batches.num_unreadable == 100
    batches.close()

    with pytest.raises(UserError, match=r"allowed by data\.max_unreadable"):
        take(10, source, max_unreadable=0.0)


def test_broken_files(tmp_path, monkeypatch):
    """Truncated, empty, no image at all, missing by now, a decompression bomb, far too elongated."""
    good = tmp_path / "class" / "good.png"
    good.parent.mkdir()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(good)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "class" / "whole.jpg")
    data = (tmp_path / "class" / "whole.jpg").read_bytes()
    (tmp_path / "class" / "whole.jpg").unlink()
    (tmp_path / "class" / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "class" / "empty.png").touch()
    (tmp_path / "class" / "text.webp").write_text("<html>404</html>")
    Image.new("RGB", (150, 150)).save(tmp_path / "class" / "bomb.png")
    Image.new("RGB", (2000, 1)).save(tmp_path / "class" / "line.png")
    (tmp_path / "class" / "gone.png").touch()
    source = ImageFolder(str(tmp_path))
    (tmp_path / "class" / "gone.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for i in range(len(source)):
        sample = read_one(source, i, (8, 8))
        assert (sample["image"] == 9).all()
        assert sample["unreadable"] == (-1 if source.name(i) == str(good) else i)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_reads_everything_once(workers):
    source = Numbered(20, frozenset({3}))
    batches = list(epoch(source, SIZE, batch_size=6, num_workers=workers))
    assert [len(batch["label"]) for batch in batches] == [6, 6, 6, 2]
    assert numbers(batches) == [0, 1, 2, 5, *range(4, 20)]
    assert batches[0]["unreadable"] == ["number 3"]
    hosts = [list(epoch(Numbered(20), SIZE, batch_size=6, host_index=i, host_count=2)) for i in range(2)]
    assert sorted(numbers(hosts[0]) + numbers(hosts[1])) == list(range(20))
    assert list(epoch(Numbered(2), SIZE, batch_size=6, host_index=1, host_count=3, num_workers=workers)) == []


WORKERS = """
import multiprocessing, sys, time
from deco_jax.data.pipeline import train_batches
from deco_jax.data.sources import Digits

if __name__ == "__main__":
    batches = train_batches(Digits(), image_size=(16, 16), batch_size=8, seed=0, num_workers=2)
    for _ in range(6):
        next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    assert "tensorflow_datasets" not in sys.modules, "workers would pay for it"
    time.sleep(1)
    for _ in range(20):
        next(batches)
    print("still fed", flush=True)
    time.sleep(60)
"""


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
def test_workers_heed_no_signal_but_never_outlive_their_parent(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    main = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert main.stdout is not None
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert main.stdout.readline().strip() == "still fed"
        assert all(running(pid) for pid in workers)
    finally:
        main.kill()
        main.communicate()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)

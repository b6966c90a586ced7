"""Several captions of an image, drawn by weight: which there are, which is drawn, and that it depends on the seed and
the step alone."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
import tarfile
import types
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from scipy import stats

from deco_jax.conditioning.requests import caption_requests
from deco_jax.data import captioned_pairs, prepared, sources
from deco_jax.data import features as features_lib
from deco_jax.data.source import Source, choose_caption, parse_weights
from deco_jax.errors import UserError
from deco_jax.programs.prepare import prepare
from tests.helpers import first_batches
from tests.runs import NO_SAMPLES, rows, succeed

COUNT = 8
WEIGHTS = {"txt": 1.0, "long": 3.0, "rare": 0.5}
# Every third image has no long caption, every other no rare one.
CAPTIONS = [[f"{i}", "" if i % 3 == 0 else f"{i} long", "" if i % 2 else f"{i} rare"] for i in range(COUNT)]


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def in_folder(root: pathlib.Path) -> str:
    root.mkdir()
    for i, captions in enumerate(CAPTIONS):
        (root / f"{i}.png").write_bytes(picture(i))
        for name, caption in zip(("", ".long", ".rare"), captions, strict=True):
            if caption:
                (root / f"{i}{name}.txt").write_text(caption + "\n")
    return str(root)


def in_tars(root: pathlib.Path) -> str:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for i, captions in enumerate(CAPTIONS):
            fields = {name: caption for name, caption in zip(WEIGHTS, captions, strict=True) if caption}
            files = {"png": picture(i), "json": json.dumps(fields).encode(), "txt": b"what the alt text says"}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return str(root)


def in_parquet(root: pathlib.Path) -> str:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    root.mkdir()
    columns: dict[str, Any] = {"image": [picture(i) for i in range(COUNT)]}
    for name, column in zip(WEIGHTS, zip(*CAPTIONS, strict=True), strict=True):
        columns[name] = [caption or None for caption in column]
    pq.write_table(pa.table(columns), root / "0.parquet", row_group_size=4)
    return str(root)


MADE = {"captioned_folder": in_folder, "webdataset": in_tars, "parquet": in_parquet}


def settings(source: str, path: str, **more: Any) -> ConfigDict:
    captions = ",".join(f"{name}={weight}" for name, weight in WEIGHTS.items())
    columns = {"image_column": "image", "label_column": "label", "caption_column": ""}
    shown = {"split": "", "image_size": 8, "num_workers": 0, "captions": captions, **columns, **more}
    return ConfigDict({"source": source, "path": path, **shown})


@pytest.fixture(params=list(MADE))
def source(request, tmp_path) -> Source:
    return sources.open_source(settings(request.param, MADE[request.param](tmp_path / "data")))


def test_the_captions_of_each_image(source):
    assert len(source) == COUNT
    assert source.num_captions == 3
    for i, captions in enumerate(CAPTIONS):
        assert source.captions(i) == source[i]["captions"] == captions
        # What stands for the image where nothing is drawn: the heaviest that it has.
        assert source.caption(i) == (captions[1] or captions[0])
    assert "skipped: nothing" in source.notes() or "Parquet" in source.notes()


def test_an_empty_file_is_a_caption_that_is_not_there(tmp_path):
    path = in_folder(tmp_path / "data")
    (tmp_path / "data" / "0.rare.txt").write_text(" \n")
    source = sources.open_source(settings("captioned_folder", path))
    assert source.captions(0)[2] == source[0]["captions"][2] == ""


def drawn(source: Source, steps: int, start: int = 0, **options: Any) -> list[tuple[int, str]]:
    """(number, caption) of the images of batches of four."""
    found: list[tuple[int, str]] = []

    def keep(number: int, caption: str) -> dict[str, np.ndarray]:
        found.append((number, caption))
        return {"number": np.int64(number)}

    options = {"image_size": (8, 8), "batch_size": 4, "seed": 3, "num_workers": 0, **options}
    batches = first_batches(steps, source, start_step=start, encode_caption=keep, **options)
    numbers = [int(number) for batch in batches for number in batch["number"]]
    captions = dict(found)
    return [(number, captions[number]) for number in numbers]


def test_drawn_as_a_function_of_the_seed_and_the_step(source):
    whole = drawn(source, 12)
    for number, caption in whole:
        assert caption == CAPTIONS[number // 3][number % 3] != ""
    assert drawn(source, 5, start=7) == whole[28:]
    halves = [drawn(source, 12, host_index=host, host_count=2) for host in (0, 1)]
    of_both = [half[i : i + 2] for i in range(0, 24, 2) for half in halves]
    assert list(itertools.chain(*of_both)) == whole
    assert drawn(source, 12, seed=4) != whole
    # In another epoch an image has another caption.
    per_image = {image: {number for number, _ in whole if number // 3 == image} for image in range(COUNT)}
    assert max(map(len, per_image.values())) > 1


class InMemory(Source):
    """The same captions, of images that need no reading."""

    def __init__(self) -> None:
        self.class_names, self.caption_weights = [], tuple(WEIGHTS.values())

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "captions": CAPTIONS[index]}

    def captions(self, index: int) -> list[str]:
        return CAPTIONS[index]


def test_drawn_by_weight():
    """Counts of each image's captions against their weights, by a chi-squared test."""
    numbers = [number for number, _ in drawn(InMemory(), 150)]
    for image, captions in enumerate(CAPTIONS):
        there = [i for i, caption in enumerate(captions) if caption]
        counts = [numbers.count(3 * image + i) for i in there]
        assert sum(counts) == 75
        weights = np.asarray([list(WEIGHTS.values())[i] for i in there])
        if len(there) > 1:
            assert stats.chisquare(counts, 75 * weights / weights.sum()).pvalue > 1e-4


def test_random_crops_are_the_same_with_and_without(tmp_path):
    path = in_folder(tmp_path / "data")
    options = {"image_size": (4, 4), "batch_size": 8, "seed": 0, "num_workers": 0, "random_crop": True, "flip": True}
    several = first_batches(3, sources.open_source(settings("captioned_folder", path)), **options)
    one = first_batches(3, sources.open_source(settings("captioned_folder", path, captions="")), **options)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_one_caption_is_drawn_as_ever():
    assert choose_caption(["", "b", "c"], (5.0, 1.0, 1.0)) == 1
    with pytest.raises(ValueError, match="none of its captions"):
        choose_caption(["", ""], (1.0, 1.0), np.random.default_rng(0))


def test_an_image_whose_json_has_none_has_its_text():
    read = captioned_pairs.parse_captions
    assert read(b"alt", False, ("short", "long")) == ["alt", ""]
    assert read(b'{"long": " a "}', True, ("short", "long")) == ["", "a"]
    for data in (b'{"caption": "of another name"}', b"[]"):
        with pytest.raises(ValueError, match=r"an empty caption|not a JSON object"):
            read(data, True, ("short", "long"))


@pytest.mark.parametrize("text", ["txt", "txt=0", "txt=-1", "=1", "txt=1,txt=2", "txt=nan", "txt=inf"])
def test_weights_that_make_no_sense(text):
    with pytest.raises(UserError, match=r"config.data.captions=.* must be names with weights above 0, each once"):
        parse_weights(text)


def test_what_has_no_captions_is_refused(tmp_path):
    with pytest.raises(UserError, match="the source digits has none; choose one of captioned_folder"):
        sources.open_source(settings("digits", ""))
    path = in_parquet(tmp_path / "data")
    with pytest.raises(UserError, match="has no column short, only image, txt, long, rare"):
        sources.open_source(settings("parquet", path, captions="txt=1,short=1"))


def test_prepared_data_keeps_all_of_them(tmp_path):
    config = ConfigDict(
        {
            "data": {
                **settings("captioned_folder", in_folder(tmp_path / "data")),
                "max_unreadable": 0.01,
                "prepared_images": "pixels",
                "random_crop": False,
            }
        }
    )
    prepare(config, str(tmp_path / "shards"))
    ours = sources.open_source(settings("prepared", str(tmp_path / "shards")))
    theirs = sources.open_source(config.data)
    assert [ours.captions(i) for i in range(COUNT)] == CAPTIONS
    assert ours.caption(1) == "1 long"
    assert drawn(ours, 12) == drawn(theirs, 12)
    with pytest.raises(UserError, match=r"was prepared with config.data.captions=txt=1,long=1,rare=1"):
        prepared.Prepared(str(tmp_path / "shards"), {"txt": 1.0})


def test_stored_features_of_the_heaviest_caption_are_drawn(tmp_path):
    source = InMemory()
    key = {"captions": 3 * COUNT, "length": 2, "width": 1, "prefix": "", "encoder": "none"}
    features_lib.create(tmp_path, key)
    store = features_lib.Features(tmp_path, key)
    # The features of caption i are the bits i, so that the drawn ones tell where they are from.
    bits = np.repeat(np.arange(3 * COUNT, dtype=np.uint16), 2).reshape(-1, 2, 1)
    store.write(0, bits, np.zeros(3 * COUNT, np.uint64))
    store.write_null(np.zeros((2, 1), np.uint16))
    texts = types.SimpleNamespace(source=source, features=store)
    requests = caption_requests(texts, 4)  # of images 0, 2, 4 and 6
    assert list(requests.names) == ["0", "2 long", "4 long", "6"]
    drawn = np.asarray(requests.batch(0, 4)["context"]).view(np.uint16)
    assert drawn[:, 0, 0].tolist() == [0, 7, 13, 18]


def test_a_prior_has_several_captions_too(tmp_path):
    path = in_folder(tmp_path / "data")
    source = sources.open_source(settings("captioned_folder", path, prior_path=path))
    assert len(source) == 2 * COUNT
    assert source.caption(COUNT + 1) == "1 long"
    for number, caption in drawn(source, 3):
        assert caption == CAPTIONS[number // 3 % COUNT][number % 3]


@pytest.mark.slow
def test_through_the_command_line(tmp_path):
    """Encoded in the step and before it, the same losses; resumed, the same to the bit."""
    path = in_folder(tmp_path / "data")
    command = ["--config=configs/t2i_256.py:smoke", NO_SAMPLES, "--config.data.source=captioned_folder"]
    command += [f"--config.data.path={path}", "--config.data.captions=txt=1,long=3,rare=0.5"]
    command += ["--config.data.image_size=8", "--config.data.batch_size=4", "--config.train.log_every=1"]
    succeed(*command, f"--workdir={tmp_path / 'whole'}", "--config.train.num_steps=4")
    stored = f"--config.text.features={tmp_path / 'features'}"
    assert "24 of 24 captions" in succeed(*command, stored, "--mode=encode", f"--workdir={tmp_path / 'none'}").stdout
    for steps in (2, 4):
        succeed(*command, stored, f"--workdir={tmp_path / 'parts'}", f"--config.train.num_steps={steps}")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert list(whole) == list(parts) == [1, 2, 3, 4]
    for step in whole:
        assert parts[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-3)

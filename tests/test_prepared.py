"""--mode=prepare: the shards are the source, to the bit, however often their making is cut off."""

from __future__ import annotations

import json
import pathlib
import pickle

import ml_collections
import numpy as np
import pytest
from PIL import Image

from deco_jax.data import prepared, sources
from deco_jax.errors import UserError
from deco_jax.programs import prepare as program
from tests.helpers import first_batches

SIZE = 16


def make_images(folder: pathlib.Path, captions: bool) -> pathlib.Path:
    for i in range(30):
        path = folder / ("pairs" if captions else f"class {i % 3}") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE + 9, SIZE + 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"noise, number {i}")
    return folder


def config(path: object, captions: bool = False, **more: object) -> ml_collections.ConfigDict:
    data = {"source": "captioned_folder" if captions else "image_folder", "path": str(path), "split": ""}
    shown = {
        "image_size": SIZE,
        "num_workers": 0,
        "max_unreadable": 0.01,
        "prepared_images": "pixels",
        "random_crop": False,
    }
    return ml_collections.ConfigDict({"data": {**data, **shown, **more}})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(program, "SHARD_IMAGES", 8)


@pytest.mark.parametrize("kind", prepared.KINDS)
@pytest.mark.parametrize("captions", [False, True])
def test_training_on_the_shards_is_training_on_the_source(tmp_path, captions, kind):
    folder = make_images(tmp_path / "images", captions)
    settings = config(folder, captions, prepared_images=kind)
    program.prepare(settings, str(tmp_path / "shards"))
    source = sources.open_source(settings.data)
    ours = sources.open_source(config(tmp_path / "shards", source="prepared").data)
    assert len(ours) == len(source) == 30
    assert ours.class_names == source.class_names
    options = {"image_size": (SIZE, SIZE), "batch_size": 7, "seed": 3, "flip": True}
    if captions:
        options["encode_caption"] = lambda index, caption: {"text": np.frombuffer(caption.encode()[:5], np.uint8)}
        assert [ours.caption(i) for i in range(30)] == [source.caption(i) for i in range(30)]
    for mine, other in zip(first_batches(9, ours, **options), first_batches(9, source, **options), strict=True):
        assert mine.keys() == other.keys()
        for key in other:
            np.testing.assert_array_equal(mine[key], other[key])
    assert [ours.next_of_class(i) for i in range(30)] == [source.next_of_class(i) for i in range(30)]
    assert pickle.loads(pickle.dumps(ours))[29]["label"] == source[29]["label"]


def test_a_split_of_prepared_data_is_a_subfolder(tmp_path):
    whole, part = make_images(tmp_path / "images", False), tmp_path / "shards"
    program.prepare(config(whole), str(part))
    with pytest.raises(UserError, match=r"split=val: prepared data of a split are in a subfolder .*--workdir=\S+/val"):
        sources.open_source(config(part, source="prepared", split="val").data)
    program.prepare(config(whole, image_size=8), str(part / "val"))
    assert sources.open_source(config(part, source="prepared", split="val", image_size=8).data)._root == str(
        part / "val"
    )


def test_images_that_were_cropped_smaller_are_not_enlarged(tmp_path):
    program.prepare(config(make_images(tmp_path / "images", False)), str(tmp_path / "shards"))
    with pytest.raises(UserError, match=r"which is smaller than \(64, 8\); prepare the data again"):
        sources.open_source(config(tmp_path / "shards", source="prepared", image_size=(64, 8)).data)


def test_images_that_were_cropped_are_not_cropped_at_random(tmp_path):
    folder = make_images(tmp_path / "images", False)
    for kind in ("pixels", "files"):
        program.prepare(config(folder, prepared_images=kind), str(tmp_path / kind))
    sources.open_source(config(tmp_path / "files", source="prepared", random_crop=True).data)
    with pytest.raises(UserError, match=r"random_crop needs whole images, but .*pixels has cropped ones; set it to"):
        sources.open_source(config(tmp_path / "pixels", source="prepared", random_crop=True).data)


def test_other_columns_are_another_dataset(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    make_images(tmp_path / "images", False)
    images = [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.jpg"))]
    pq.write_table(pa.table({"image": images, "coarse": [0] * 30, "fine": list(range(30))}), tmp_path / "x.parquet")
    columns = {"image_column": "image", "caption_column": "", "captions": ""}
    for label in ("coarse", "fine"):
        settings = config(tmp_path / "x.parquet", source="parquet", label_column=label, **columns)
        if label == "coarse":
            program.prepare(settings, str(tmp_path / "shards"))
        else:
            with pytest.raises(UserError, match=r"something else \(columns: \['image', 'coarse', ''\] there"):
                program.prepare(settings, str(tmp_path / "shards"))


@pytest.mark.parametrize("setting", ["weights", "prior_path"])
def test_several_datasets_are_prepared_one_by_one(tmp_path, setting):
    with pytest.raises(UserError, match=rf"config.data.{setting} mixes several; prepare each by itself"):
        program.prepare(config(tmp_path, **{setting: "1,2"}), str(tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_cut_off_it_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    settings = config(make_images(tmp_path / "images", False))
    program.prepare(settings, str(tmp_path / "whole"))
    real, written = prepared.write_shard, []

    def cut_off(source, indices, folder, number, *rest):
        if number == 2 and not written:
            written.append(number)
            raise KeyboardInterrupt
        real(source, indices, folder, number, *rest)

    monkeypatch.setattr(prepared, "write_shard", cut_off)
    with pytest.raises(KeyboardInterrupt):
        program.prepare(settings, str(tmp_path / "part"))
    with pytest.raises(UserError, match=r"has no complete prepared\.json; run --mode=prepare"):
        sources.open_source(config(tmp_path / "part", source="prepared").data)
    monkeypatch.setattr(prepared, "write_shard", real)
    capsys.readouterr()
    program.prepare(settings, str(tmp_path / "part"))
    assert "1 to write here" in capsys.readouterr().out
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"was prepared from something else \(images: pixels there, png here\)"):
        program.prepare(config(tmp_path / "images", prepared_images="png"), str(tmp_path / "part"))


def test_unreadable_images_are_counted(tmp_path, capsys):
    folder = make_images(tmp_path / "images", False)
    (folder / "class 1" / "04.jpg").write_bytes(b"no image")
    program.prepare(config(folder), str(tmp_path / "shards"))
    out = capsys.readouterr().out
    assert "04.jpg" in out
    assert "prepared 29 images, 1 left out" in out
    ours = sources.open_source(config(tmp_path / "shards", source="prepared").data)
    assert len(ours) == 29
    assert len(json.loads((tmp_path / "shards" / "prepared.json").read_text())["counts"]) == 4
    with pytest.raises(UserError, match="1 of 30 images can't be read, more than the share of 0 "):
        program.prepare(config(folder, max_unreadable=0.0), str(tmp_path / "strict"))

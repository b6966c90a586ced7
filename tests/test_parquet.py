"""Hugging Face datasets as Parquet files, on a disk and in a bucket."""

from __future__ import annotations

import io
import json
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from deco_jax.data import parquet, pipeline, sources
from deco_jax.data.source import shuffled_blocks
from deco_jax.errors import UserError
from tests.helpers import first_batches

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

ROWS = 40


class Data(dict):
    """The data section of a config."""

    __getattr__ = dict.__getitem__


def settings(path: object, **more: object) -> Data:
    columns = {"image_column": "image", "label_column": "label", "caption_column": ""}
    return Data(
        {"source": "parquet", "path": str(path), "split": "", "image_size": 8, "num_workers": 0, **columns, **more}
    )


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 5 * i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: pathlib.Path) -> pathlib.Path:
    """Forty rows as `datasets` writes them: two files of a split in row groups of six, and one of another split."""
    (folder / "data").mkdir(parents=True)
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
    for file, rows in (("train-00000-of-00002", range(25)), ("train-00001-of-00002", range(25, ROWS)), ("test-0", [0])):
        table = pa.table(
            {
                "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in rows],
                "label": [i % 3 for i in rows],
                "text": [f"picture {i}" for i in rows],
                "kind": pa.array(["picture" for _ in rows]).dictionary_encode(),
            }
        ).replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, folder / "data" / f"{file}.parquet", row_group_size=6)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp("parquet"))


def test_rows_are_samples(folder):
    source = sources.open_source(settings(folder, split="train"))
    assert len(source) == ROWS
    assert source.class_names == ["cat", "dog", "owl"]
    for i in range(ROWS):
        assert source[i] == {"image": picture(i), "label": i % 3}
    assert [source.next_of_class(i) for i in (0, 38, 39)] == [3, 2, 0]
    assert "train-00001-of-00002.parquet row group 1 row 2" in source.name(33)
    assert pickle.loads(pickle.dumps(source))[30]["image"] == picture(30)
    assert list(source.blocks) == [6, 12, 18, 24, 25, 31, 37, 40]


def test_captions_by_column(folder):
    source = sources.open_source(settings(folder, split="train", caption_column="text"))
    assert source.num_classes == 0
    assert source[31] == {"image": picture(31), "label": 0, "caption": "picture 31"}
    assert source.caption(7) == "picture 7"


@pytest.mark.parametrize(
    "more, says",
    [
        ({"image_column": "img"}, "has no column img, only image, label, text, kind; set --config.data.image_column"),
        ({"label_column": "text"}, "the column text holds string .* labels are integers"),
        ({"image_column": "text"}, "the column text of .*test-0.parquet holds string, not images' bytes; set"),
        ({"label_column": "kind"}, "the column kind holds dictionary<.* labels are integers"),
        ({"label_column": "image"}, "the column image holds struct<.* labels are integers"),
        ({"split": "validation"}, "has no .parquet file of the split validation"),
        ({"path": "{folder}/none"}, "none has no .parquet file"),
    ],
)
def test_what_is_wrong_is_said(folder, more, says):
    given = {key: str(value).format(folder=folder) for key, value in more.items()}
    with pytest.raises(UserError, match=says):
        sources.open_source(settings(given.pop("path", folder), **given))


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(UserError, match="can't be read"):
        sources.open_source(settings(tmp_path))


def test_rows_without_bytes_are_one_line(tmp_path):
    """`datasets` also writes paths alone."""
    images = pa.array([{"bytes": None, "path": "0.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no image can be read, .* has no bytes in the column image") as caught:
        first_batches(1, sources.open_source(settings(tmp_path)), image_size=(8, 8), batch_size=1, seed=0)
    assert "\n" not in str(caught.value)


def test_blocks_are_shuffled_whole_and_mixed_by_window():
    ends = np.cumsum(np.random.default_rng(0).integers(1, 9, 50))
    first = shuffled_blocks(ends, 3, 0)
    assert sorted(first) == list(range(ends[-1]))
    np.testing.assert_array_equal(first, shuffled_blocks(ends, 3, 0))
    assert not np.array_equal(first, shuffled_blocks(ends, 3, 1))
    assert not np.array_equal(first, shuffled_blocks(ends, 4, 0))
    block = np.searchsorted(ends, first, side="right")
    last_seen = {b: int(np.flatnonzero(block == b)[-1]) for b in set(block)}
    first_seen = {b: int(np.flatnonzero(block == b)[0]) for b in set(block)}
    under_way = [sum(first_seen[b] <= at <= last_seen[b] for b in first_seen) for at in range(len(first))]
    assert max(under_way) <= parquet.KEPT_GROUPS  # so every row group is read once an epoch
    assert np.mean(np.abs(np.diff(block))) > 5


def values(batches: list[dict]) -> list[int]:
    return [int(v) // 5 for batch in batches for v in batch["image"][:, 0, 0, 0]]


def test_training_sees_every_row_once_an_epoch_and_resumes(folder, monkeypatch):
    source = sources.open_source(settings(folder, split="train"))
    reads: list[tuple[int, int]] = []
    real = parquet._open

    def counted(name):
        reads.append(name)
        return real(name)

    monkeypatch.setattr(parquet, "_open", counted)
    options = {"image_size": (8, 8), "batch_size": 8, "seed": 5}
    seen = values(first_batches(10, source, **options))
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == list(range(ROWS))
    assert seen[:ROWS] != seen[ROWS:]
    assert len(reads) <= 3 * len(source.blocks)  # two epochs, and what is read ahead
    assert values(first_batches(3, source, start_step=4, **options)) == seen[32:56]
    halves = [values(first_batches(10, source, host_index=k, host_count=2, **options)) for k in range(2)]
    both = [v for a in range(10) for half in halves for v in half[4 * a : 4 * a + 4]]
    assert both == seen
    workers = pipeline.train_batches(source, num_workers=2, **options)
    try:
        assert values([next(workers) for _ in range(6)]) == seen[:48]
    finally:
        workers.close()

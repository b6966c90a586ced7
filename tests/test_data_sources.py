"""Sources: what they list, in which order, and what they say about a wrong path."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from deco_jax.data.pipeline import epoch, read_one
from deco_jax.data.sources import Digits, ImageFolder, Tfds, check_classes, open_source
from deco_jax.errors import UserError
from tests.helpers import ROOT

pytestmark = pytest.mark.fast


def section(source: str, path: object = "", split: str = "") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"source": source, "path": str(path), "split": split})


def save(path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    Image.new("RGB", (12, 10), (level,) * 3).save(path, kind)


@pytest.fixture
def folder(tmp_path):
    """Three classes; b holds its images at several depths and under every accepted suffix."""
    for i, name in enumerate(["b/z.jpg", "b/deep/er/y.JPEG", "b/x.PnG", "b/w.webp", "a/1.png", "c/1.png", "c/2.png"]):
        save(tmp_path / name, 10 * i)
    for name in ["a/.hidden.png", ".cache/1.png", "b/.git/1.png", "top.png"]:
        save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    return tmp_path


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    reference, source = load_digits(), open_source(section("digits"))
    assert len(source) == 1797
    assert source.class_names == [str(i) for i in range(10)]
    assert [source[i]["label"] for i in range(len(source))] == list(reference.target)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert images.dtype == np.uint8
    np.testing.assert_allclose(images, reference.images * 255 / 16, atol=0.5)


def test_digits_come_in_the_size_asked_for():
    sample = read_one(Digits(), 3, (16, 16))
    expected = Image.fromarray(Digits()[3]["image"]).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(sample["image"], np.stack([np.asarray(expected)] * 3, -1))


def test_next_of_class_walks_through_one_class(folder):
    for source in (Digits(), ImageFolder(str(folder))):
        labels = np.array([source[i]["label"] for i in range(len(source))])
        for label in range(source.num_classes):
            members = np.flatnonzero(labels == label)
            assert [source.next_of_class(int(i)) for i in members] == np.roll(members, -1).tolist()


def test_image_folder(folder):
    source = open_source(section("image_folder", folder))
    assert source.class_names == ["a", "b", "c"]
    names = [os.path.relpath(source.name(i), folder) for i in range(len(source))]
    assert names == ["a/1.png", "b/deep/er/y.JPEG", "b/w.webp", "b/x.PnG", "b/z.jpg", "c/1.png", "c/2.png"]
    assert [source[i]["label"] for i in range(len(source))] == [0, 1, 1, 1, 1, 2, 2]
    images = [read_one(source, i, (8, 8))["image"] for i in range(len(source))]
    np.testing.assert_allclose([image.mean() for image in images], [40, 10, 30, 20, 0, 50, 60], atol=1)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(len(copy))] == [source[i] for i in range(len(source))]


def test_split_is_a_subfolder(folder):
    source = open_source(section("image_folder", folder.parent, folder.name))
    assert len(source) == 7


def test_names_outside_utf8_and_linked_files(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "1.png", 77)
    (folder / "d").symlink_to(elsewhere)
    os.rename(os.fsencode(folder / "a/1.png"), os.fsencode(folder / "a") + b"/\xff\xe9.png")
    source = ImageFolder(str(folder))
    assert source.class_names == ["a", "b", "c", "d"]
    assert source.name(0).endswith(r"\xff\xe9.png")
    assert read_one(source, 0, (8, 8))["image"].mean() == 40
    assert read_one(source, 7, (8, 8))["image"].mean() == 77


def test_a_copy_for_a_worker_is_small(tmp_path):
    for label in range(2):
        (tmp_path / f"n0144076{label}").mkdir()
        for i in range(2000):
            (tmp_path / f"n0144076{label}" / f"n0144076{label}_{i:05}.JPEG").touch()
    assert len(pickle.dumps(ImageFolder(str(tmp_path)))) < 4000 * 32


def test_mistakes_in_the_config(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    save(tmp_path / "flat" / "1.png")
    (tmp_path / "none" / "class").mkdir(parents=True)
    save(tmp_path / "partly" / "full" / "1.png")
    (tmp_path / "partly" / "vacant").mkdir()
    for data, message in [
        (section("imagenet"), "unknown data.source 'imagenet'"),
        (section("image_folder"), "data.path is empty"),
        (section("tfds"), "data.path is empty"),
        (section("image_folder", tmp_path / "missing"), "no such folder: .*missing"),
        (section("image_folder", folder, "train"), "no such folder: .*train"),
        (section("image_folder", folder / "top.png"), "no such folder"),
        (section("image_folder", tmp_path / "empty"), "no class folders"),
        (section("image_folder", tmp_path / "flat"), "no class folders"),
        (section("image_folder", tmp_path / "none"), "without images"),
        (section("image_folder", tmp_path / "partly"), "class folder .*vacant holds no images"),
        (section("tfds", tmp_path / "missing"), "no such folder"),
        (section("tfds", tmp_path / "empty"), "dataset_info.json"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(data)
        assert "\n" not in str(caught.value)


def test_class_count():
    check_classes(Digits(), 10)
    with pytest.raises(UserError, match="the data has 10 classes, but the model has 1000"):
        check_classes(Digits(), 1000)


def test_tfds_lacks_a_package(monkeypatch):
    import tensorflow_datasets as tfds

    def builder(name, **options):
        raise ModuleNotFoundError("In <Image> with name \"image\":\nNo module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(UserError, match="'cifar10': No module named 'tensorflow'; install it"):
        open_source(section("tfds", "cifar10"))


PREPARE = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyColours(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
        }))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            file = io.BytesIO()
            Image.new("RGB", (20, 16), (i, i % 3, 0)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}
"""

READ = (
    PREPARE
    + """
from deco_jax.data.sources import Tfds, open_source
from deco_jax.data.pipeline import train_batches
import ml_collections

if __name__ == "__main__":
    source = open_source(ml_collections.ConfigDict({"source": "tfds", "path": "tiny_colours", "split": ""}))
    batches = train_batches(source, image_size=(8, 8), batch_size=12, seed=0, num_workers=1)
    batch = next(batches)
    batches.close()
    assert sorted(batch["image"][:, 0, 0, 0]) == list(range(12))
    assert (batch["label"] == batch["image"][:, 0, 0, 1]).all()
    assert "tensorflow" not in sys.modules
    print(source._folder)
"""
)


def test_tfds(tmp_path):
    """Prepared by name, then read from its folder: without TensorFlow, through a worker too."""
    script = tmp_path / "read.py"
    script.write_text(READ)
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr
    folder = run.stdout.strip().split("\n")[-1]

    source = open_source(section("tfds", folder))
    assert source.class_names == ["red", "green", "blue"]
    assert len(source) == 12
    assert len(open_source(section("tfds", folder, "train[:50%]"))) == 6
    sample = source[5]
    image = Image.open(io.BytesIO(sample["image"]))
    assert image.getpixel((0, 0))[1] == sample["label"]
    assert source.name(5).endswith("train record 5")

    (batch,) = epoch(source, (8, 8), batch_size=12)
    assert sorted(batch["image"][:, 0, 0, 0]) == list(range(12))
    labels = batch["label"]
    for i in range(12):
        following = next((i + step) % 12 for step in range(1, 12) if labels[(i + step) % 12] == labels[i])
        assert source.next_of_class(i) == following
    with pytest.raises(UserError, match="split 'validation'"):
        Tfds(folder, "validation")
    with pytest.raises(UserError, match="'no_such_dataset'"):
        Tfds("no_such_dataset")
    assert "tensorflow" not in sys.modules

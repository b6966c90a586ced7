"""Several data sets in one stream, and random crops: functions of the seed and the step alone."""

from __future__ import annotations

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from deco_jax.data import pipeline, sources, transforms
from deco_jax.data.mixture import Mixture
from deco_jax.errors import UserError
from deco_jax.method.objective import make_method
from deco_jax.method.step import Observed
from deco_jax.models import network as network_lib
from tests.helpers import first_batches


def make_images(folder, count, level, names=("a", "b")):
    for i in range(count):
        path = folder / names[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), level + i, np.uint8)).save(path)
    return folder


def config(paths, weights):
    data = {"source": "image_folder", "path": paths, "split": "", "image_size": 8, "num_workers": 0}
    return ml_collections.ConfigDict({**data, "weights": weights})


@pytest.fixture
def mixture(tmp_path) -> Mixture:
    many, few = make_images(tmp_path / "many", 30, 0), make_images(tmp_path / "few", 6, 100)
    return sources.open_source(config(f"{many},{few}", "3,1"))


def test_shares_order_and_resumption(mixture):
    options = {"image_size": (8, 8), "batch_size": 8, "seed": 1}
    batches = first_batches(30, mixture, **options)
    values = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert np.mean(values >= 100) == pytest.approx(1 / 4, abs=0.01)
    assert sorted(values[values < 100][:30]) == list(range(30))  # of each data set every image once, then again
    assert sorted(values[values >= 100][:6]) == list(range(100, 106))
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 2)
    resumed = first_batches(5, mixture, start_step=20, **options)
    halves = [first_batches(30, mixture, host_index=k, host_count=2, **options) for k in range(2)]
    for i in range(5):
        np.testing.assert_array_equal(resumed[i]["image"], batches[20 + i]["image"])
    for i in range(30):
        np.testing.assert_array_equal(np.concatenate([half[i]["image"] for half in halves]), batches[i]["image"])
    workers = pipeline.train_batches(mixture, num_workers=2, **options)
    try:
        for batch in batches[:4]:
            np.testing.assert_array_equal(next(workers)["image"], batch["image"])
    finally:
        workers.close()


def test_a_mixture_is_its_parts_one_after_the_other(mixture):
    assert len(mixture) == 36
    assert mixture.notes().startswith("2 data sets: 30 images at 75.0%, 6 images at 25.0%")
    assert mixture.name(30).endswith("few/a/00.png")
    assert mixture.next_of_class(34) == 35
    assert mixture.next_of_class(32) == 30  # the last of its class in its data set, then the first


def test_what_does_not_go_together_is_said(tmp_path):
    one = make_images(tmp_path / "one", 4, 0)
    other = make_images(tmp_path / "other", 4, 0, names=("a", "c"))
    with pytest.raises(UserError, match="have different classes"):
        sources.open_source(config(f"{one},{other}", "1,1"))
    with pytest.raises(UserError, match="has 3 numbers for 1 paths"):
        sources.open_source(config(str(one), "1,1,2"))
    with pytest.raises(UserError, match="must be comma-separated numbers"):
        sources.open_source(config(f"{one},{one}", "half,half"))


def test_random_crops_are_parts_of_the_picture():
    y, x = np.mgrid[0:40, 0:60]
    picture = Image.fromarray(np.stack([4 * x, 6 * y, 0 * x], -1).astype(np.uint8))
    corners = set()
    for seed in range(200):
        crop = transforms.random_crop(picture, (40, 40), np.random.default_rng(seed)).astype(float)
        assert crop.shape == (40, 40, 3)
        # One pixel of the crop is 1 to 0.8 pixels of the picture, in both directions.
        for channel, axis, step in ((0, 1, 4), (1, 0, 6)):
            slope = np.diff(crop[5:-5, 5:-5, channel], axis=axis).mean() / step
            assert 0.78 < slope < 1.02
        corners.add((round(crop[0, 0, 0] / 4), round(crop[0, 0, 1] / 6)))
    assert max(c[0] for c in corners) > 20
    assert max(c[1] for c in corners) > 4
    assert min(c[0] for c in corners) <= 1
    same = [transforms.random_crop(picture, (40, 40), np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_random_crops_resume(mixture):
    options = {"image_size": (6, 6), "batch_size": 4, "seed": 1, "random_crop": True, "flip": True}
    whole = first_batches(6, mixture, **options)
    for ours, theirs in zip(first_batches(3, mixture, start_step=3, **options), whole[3:], strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_a_prior_is_half_of_the_stream_and_has_classes_of_its_own(tmp_path):
    make_images(tmp_path / "mine", 4, 100, ("b", "x"))
    make_images(tmp_path / "prior", 10, 0, ("a", "b"))
    data = config(str(tmp_path / "mine"), "")
    data.prior_path = str(tmp_path / "prior")
    source = sources.open_source(data)
    assert source.class_names == ["a", "b", "x"]
    batches = first_batches(10, source, image_size=(8, 8), batch_size=8, seed=0)
    for batch in batches:
        levels = batch["image"][:, 0, 0, 0]
        np.testing.assert_array_equal(batch["prior"], levels < 100)
        assert np.sum(batch["prior"]) == 4
        odd = levels % 2
        np.testing.assert_array_equal(batch["label"], np.where(batch["prior"], odd, 1 + odd))
    data.weights = "1,2"
    with pytest.raises(UserError, match=r"leave config.data.weights empty"):
        sources.open_source(data)


def test_what_a_prior_counts():
    """Half of the mean is the loss of the prior's images, `prior_weight` times; against NumPy."""
    method = make_method(quickstart.get_config("smoke"))
    draws = method.draw(jax.random.key(0), (4, 16, 16, 3))
    config = quickstart.get_config("smoke")
    network = network_lib.build(config.model.to_dict())
    draw = np.random.default_rng(0)
    params = {"denoiser": jax.tree.map(lambda s: np.float32(draw.normal(0, 0.1, s.shape)), network.shapes)}
    pixels = draw.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    observed = Observed(np.arange(4), np.int32(10))

    @jax.jit
    def loss(draws):
        return method.objective(params, pixels, draws, observed, networks={"denoiser": network})[0]

    each = np.array([float(loss(method.weighted(draws, np.eye(4, dtype=np.float32)[i]))) for i in range(4)]) * 4
    assert float(loss(draws)) == pytest.approx(each.mean(), rel=1e-5)
    assert float(loss(method.weighted(draws, np.float32([1, 1, 0.5, 0.5])))) == pytest.approx(
        (each[:2].sum() + each[2:].sum() / 2) / 4, rel=1e-5
    )

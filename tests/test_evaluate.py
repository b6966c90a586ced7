"""--mode=evaluate and the quick FID, with random weights in the layout of pytorch-fid's file."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.evaluation import image_sets, inception_features, measuring
from deco_jax.evaluation.measuring import read
from deco_jax.evaluation.statistics import NpzImages
from deco_jax.models.inception import Features
from deco_jax.programs import evaluate as evaluate_lib
from deco_jax.run import preemption
from tests.helpers import relative_error
from tests.runs import NO_SAMPLES, SMOKE, rows, signal_when, succeed, two_steps
from tests.test_bad_input import refuse

torch = pytest.importorskip("torch")
WEIGHTS = os.environ.get("DECO_JAX_INCEPTION")  # the real ones


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from tests.test_inception import random_state_dict

    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save({key: torch.from_numpy(np.asarray(a)) for key, a in random_state_dict().items()}, path)
    return path


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def as_folder(folder, images):
    (folder / "deeper").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / ("" if i < 3 else "deeper") / f"{i:04d}.png")
    return folder


def settings(**changes) -> ConfigDict:
    config = quickstart.get_config("smoke")
    config.evaluate.update(changes)
    return config


class Projection:
    """Stands for the network where only the bookkeeping is looked at: features are a matrix times the pixels."""

    batch_size, has_classifier = 4, False

    def __init__(self, images_until_interrupt: int = 10**9) -> None:
        rng = np.random.default_rng(3)
        self.matrices = [rng.standard_normal((768, n), np.float32) for n in (2048, 2023)]
        self.left = images_until_interrupt

    def __call__(self, images):
        if self.left < len(images):
            raise KeyboardInterrupt
        self.left -= len(images)
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(flat @ self.matrices[0], flat @ self.matrices[1], None)


def state(accumulator):
    return [*accumulator.statistics(), accumulator.pool3()]


def measured(images, path=None, extractor=None, num_kept=6):
    extractor = extractor or Projection()
    return inception_features.measure(images, extractor, path, "digest", num_kept, 4, quiet=True)


def test_interrupted_and_continued(tmp_path):
    images = image_sets.folder_images(as_folder(tmp_path / "images", pictures(15)))
    with pytest.raises(KeyboardInterrupt):
        measured(images, tmp_path / "state.npz", Projection(10))
    rest = Projection(7)
    for ours, whole in zip(state(measured(images, tmp_path / "state.npz", rest)), state(measured(images)), strict=True):
        np.testing.assert_array_equal(ours, whole)
    assert rest.left == 0  # the first eight were not measured again
    measured(images, tmp_path / "state.npz", Projection(0))  # and now none
    with pytest.raises(KeyboardInterrupt):  # something else is not continued
        measured(images, tmp_path / "state.npz", Projection(0), num_kept=5)


def test_evaluators_of_the_same_features_share_a_reader(tmp_path):
    """ADM's scores and KID take Inception's features of each image once."""
    features = inception_features.InceptionFeatures.__new__(inception_features.InceptionFeatures)
    features.config, features.folder, features.weights = settings(), tmp_path, "digest"
    features.extractor, features._newest = Projection(7), measuring.Newest()
    samples = image_sets.folder_images(as_folder(tmp_path / "images", pictures(7)))
    read(samples, [features.reader(samples), features.reader(samples)], 4, quiet=True)
    assert features.of_samples(samples).count == 7
    other = samples._replace(identity="other")
    assert features.reader(other).count == 0


def test_a_stop_is_noticed_between_the_batches_of_a_measurement(tmp_path):
    images = image_sets.folder_images(as_folder(tmp_path / "images", pictures(15)))
    with preemption.Watch() as watch, watch.leaving():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(preemption.StopRequestedError):
            measured(images, extractor=Projection(0))


def test_npz_equals_folder(tmp_path):
    images = pictures(7)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    folder = as_folder(tmp_path / "images", images)
    config = settings(samples=str(tmp_path / "samples.npz"))
    sets = [evaluate_lib.open_samples(config, "")]
    config.evaluate.samples = str(folder)
    sets += [evaluate_lib.open_samples(config, "")]
    assert [s.total for s in sets] == [7, 7]
    for a, b in zip(*(state(measured(s)) for s in sets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_kept_features_are_evenly_spread(tmp_path):
    images = pictures(12)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    samples = image_sets.npz_images(NpzImages(tmp_path / "samples.npz"))
    features = Projection()(images).pool3
    assert relative_error(measured(samples, num_kept=4).pool3(), features[2::3]) < 1e-5
    assert len(measured(samples, num_kept=5).pool3()) == 5
    assert measured(samples, num_kept=0).pool3() is None


def test_data_as_reference():
    images = image_sets.source_images(settings(num_reference=5))
    assert (images.total, images.size) == (5, (16, 16))
    whole = np.concatenate(list(images.batches(2, 0)))
    assert whole.shape == (5, 16, 16, 3)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(2, 3))), whole[3:])
    assert image_sets.source_images(settings()).total == 1797
    assert image_sets.source_images(settings(num_reference=6)).identity != images.identity


def test_as_a_command(tmp_path, weights):
    """A set against itself; then the missing scores of a reference without images."""
    images = pictures(8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    common = [
        SMOKE,
        f"--workdir={tmp_path / 'run'}",
        "--mode=evaluate",
        f"--config.evaluate.inception={weights}",
        f"--config.evaluate.samples={tmp_path / 'images.npz'}",
        "--config.evaluate.batch_size=8",
    ]
    said = succeed(*common, f"--config.evaluate.reference={tmp_path / 'images.npz'}").stdout
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    scale = np.load(tmp_path / "run" / "evaluation" / "samples.npz")["features"].var(0).sum()
    assert abs(result["fid"]) < 1e-6 * scale
    assert (result["precision"], result["recall"], result["missing"]) == (1, 1, {})
    assert 1 <= result["inception_score"] <= 8
    assert result["samples"] == {"from": str(tmp_path / "images.npz"), "images": 8, "kept": 8}
    assert len(result["warnings"]) == 2
    assert "fewer than the 2048 Inception features" in said
    assert "Inception Score" in said

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.diag(rng.uniform(0, 1, 2048)))
    said = succeed(*common, f"--config.evaluate.reference={tmp_path / 'statistics.npz'}").stdout
    assert "8 of 8 images are already measured" in said
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["fid"] > 0
    assert result["sfid"] is result["precision"] is result["recall"] is None
    assert "arr_0" in result["missing"]["recall"]
    assert "mu_s" in result["missing"]["sfid"]


def test_other_pixels_in_the_same_files_are_another_reference(tmp_path):
    (tmp_path / "data" / "class").mkdir(parents=True)
    config = settings(cache=str(tmp_path / "cache"))
    config.data.source, config.data.path = "image_folder", str(tmp_path / "data")
    seen = []
    for seed in (0, 0, 1):
        for i, image in enumerate(pictures(3, seed)):
            Image.fromarray(image).save(tmp_path / "data" / "class" / f"{i}.png")
        seen.append(image_sets.source_images(config).identity)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("sizes", [[5], [2, 3, 1], [4, 4, 1], [1] * 7, [9, 1], []])
def test_rebatched(sizes):
    """The network runs on whole batches, however the images come."""
    images = pictures(sum(sizes))
    parts = np.split(images, np.cumsum(sizes)[:-1]) if sizes else []
    batches = list(image_sets.rebatched(iter(parts), 4))
    assert [len(batch) for batch in batches] == [4] * (len(images) // 4) + [len(images) % 4] * (len(images) % 4 > 0)
    if sizes:
        np.testing.assert_array_equal(np.concatenate(batches), images)


def test_runs_that_share_a_cache_measure_the_reference_once(tmp_path):
    config = settings(cache=str(tmp_path / "cache"), num_reference=12)

    def statistics(run, extractor):
        reference = inception_features.open_reference(config)
        found, features = reference.measure(extractor, tmp_path / run, "digest", config)
        return [*found, features]

    alone = settings(num_reference=12)
    expected = inception_features.open_reference(alone).measure(Projection(), tmp_path / "alone", "digest", alone)
    first, second = statistics("first", Projection()), statistics("second", Projection(0))
    for a, b, c in zip(first, second, [*expected[0], expected[1]], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    config.evaluate.num_reference = 9  # another set is measured, and lies beside it
    with pytest.raises(KeyboardInterrupt):
        statistics("third", Projection(0))
    statistics("third", Projection())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not (tmp_path / "first").exists()


@pytest.mark.slow
def test_devices_and_interruptions_change_nothing(tmp_path, weights):
    """Drawn and measured on one device, on eight, and on one in two runs: the same scores."""
    checkpoint = two_steps(tmp_path) / "checkpoints" / "2"
    command = [
        SMOKE,
        "--mode=evaluate",
        f"--checkpoint={checkpoint}",
        "--config.evaluate.save_every=2",
        f"--config.evaluate.inception={WEIGHTS or weights}",
        "--config.evaluate.num_reference=16",
        "--config.sample.num_steps=2",
        "--config.sample.num_images=16",
        "--config.sample.batch_size=2",
    ]

    def scores(name):
        result = json.loads((tmp_path / name / "evaluation.json").read_text())
        return [result[key] for key in ("fid", "sfid", "precision", "recall")]

    succeed(*command, f"--workdir={tmp_path / 'one'}", "--config.evaluate.batch_size=2")
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    succeed(
        *command,
        f"--workdir={tmp_path / 'eight'}",
        "--config.mesh.data=4",
        "--config.mesh.fsdp=2",
        "--config.evaluate.batch_size=8",
        env=env,
    )
    # With random weights the distances are large numbers.
    tolerance = {"abs": 1e-3} if WEIGHTS else {"rel": 1e-3}
    assert scores("eight") == pytest.approx(scores("one"), **tolerance)

    cut = tmp_path / "cut"
    saved = cut / "evaluation" / "samples.npz"
    arguments = [*command, f"--workdir={cut}", "--config.evaluate.batch_size=2"]
    code, _ = signal_when(signal.SIGKILL, lambda said: saved.exists(), *arguments)
    assert code == -signal.SIGKILL
    assert not (cut / "evaluation.json").exists()
    match = re.search(r"(\d+) of 16 images are already measured", succeed(*arguments).stdout)
    assert match
    assert 0 < int(match[1]) < 16
    assert scores("cut") == scores("one")


@pytest.mark.slow
def test_during_training(tmp_path, weights):
    """The quick FID of the last step is that of the checkpoint's samples, drawn and measured by --mode=evaluate."""
    run = two_steps(tmp_path)
    common = [
        SMOKE,
        f"--workdir={run}",
        f"--config.evaluate.inception={weights}",
        "--config.evaluate.num_reference=8",
        "--config.evaluate.batch_size=8",
        "--config.sample.num_steps=1",
        "--config.sample.num_images=6",
        "--config.sample.batch_size=3",
    ]
    succeed(
        *common,
        NO_SAMPLES,
        "--config.train.num_steps=4",
        "--config.evaluate.every=4",
        "--config.evaluate.during_training_images=6",
    )
    metrics = rows(run)
    assert "fid" not in metrics[3]
    said = succeed(*common, "--mode=evaluate").stdout
    assert "data digits: 8 of 8 images are already measured" in said
    result = json.loads((run / "evaluation.json").read_text())
    assert metrics[4]["fid"] == pytest.approx(result["fid"], rel=1e-4)
    assert result["samples"]["from"].endswith("checkpoints/4")


def bad(tmp_path, what, **arrays):
    path = tmp_path / f"{what}.npz"
    np.savez(path, **arrays)
    return str(path)


def test_bad_input(tmp_path, weights):
    good = bad(tmp_path, "good", arr_0=pictures(4))
    (tmp_path / "empty").mkdir()
    mixed = as_folder(tmp_path / "mixed", pictures(2))
    Image.fromarray(pictures(1, side=8)[0]).save(mixed / "z.png")
    broken = as_folder(tmp_path / "broken", pictures(1))
    (broken / "0000.png").write_bytes(b"no picture")
    floats = bad(tmp_path, "floats", arr_0=pictures(4) / 255)
    shapes = bad(tmp_path, "shapes", arr_0=pictures(4)[..., 0])
    keys = bad(tmp_path, "keys", images=pictures(4))
    cases = [
        ({"inception": ""}, "config.evaluate.inception is empty.*pt_inception-2015-12-05-6726825d.pth from github"),
        ({"inception": "/nowhere.pth"}, "no Inception weights at /nowhere.pth.*inception-2015-12-05.pt"),
        ({"samples": "/nowhere.npz"}, "no samples at /nowhere.npz"),
        ({"samples": ""}, "there is no checkpoint"),
        ({"samples": floats}, "float64 values; the Inception network takes uint8"),
        ({"samples": shapes}, r"expected \[images, height, width, 3\]"),
        ({"samples": keys}, "has no images 'arr_0'.*it holds 'images'"),
        ({"samples": str(tmp_path / "empty")}, "holds no images"),
        ({"samples": str(broken)}, "0000.png can't be read"),
        ({"samples": str(mixed)}, "z.png has 8x8 pixels and 0000.png has 16x16; all samples must have the same size"),
        ({"samples": bad(tmp_path, "none", arr_0=pictures(4)[:0])}, "samples: 0; an FID needs at least 2"),
        ({"samples": bad(tmp_path, "one", arr_0=pictures(1))}, "samples: 1; an FID needs at least 2"),
        ({"reference": keys}, "is not a reference file: it holds 'images'"),
        ({"reference": floats}, "float64 values"),
    ]
    for changes, says in cases:
        config = settings(**{"inception": str(weights), "samples": good, "reference": good, **changes})
        with pytest.raises(UserError, match=says) as error:
            evaluate_lib.evaluate(config, str(tmp_path / "run"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_every_is_a_multiple_of_log_every():
    from deco_jax.config import check

    config = settings(every=3)
    config.train.log_every = 2
    with pytest.raises(UserError, match=r"config.evaluate.every=3 must be a multiple of config.train.log_every=2"):
        check(config)


def test_a_refused_cache_leaves_nothing_in_the_workdir(weights, tmp_path):
    """Whichever mode would have made a folder there."""
    (tmp_path / "file").touch()
    np.savez(tmp_path / "samples.npz", arr_0=pictures(4))
    command = [SMOKE, NO_SAMPLES, f"--workdir={tmp_path / 'run'}", f"--config.evaluate.inception={weights}"]
    command += [f"--config.evaluate.cache={tmp_path / 'file' / 'cache'}"]
    for more in (
        ["--mode=evaluate", f"--config.evaluate.samples={tmp_path / 'samples.npz'}"],
        ["--config.evaluate.every=2", "--config.evaluate.during_training_images=4"],
    ):
        refuse(*command, *more, says="cache is a file, or is below one")
        assert not (tmp_path / "run").exists()

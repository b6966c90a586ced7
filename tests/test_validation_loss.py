"""The loss on held-out images: fixed noise, the averaged weights, and what it refuses."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import meanflow_cifar10, quickstart
from deco_jax import images as images_lib
from deco_jax.conditioning.condition import open_condition
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Subject
from deco_jax.evaluation.validation_loss import VALIDATION, ValidationLoss, method_to_compare, validation_of_training
from deco_jax.method import training
from deco_jax.method.losses.frequency import frequency_loss, jpeg_weights
from deco_jax.method.objective import make_method
from deco_jax.programs import train
from deco_jax.run import monitor, sharding
from tests.helpers import run_main
from tests.runs import NO_SAMPLES, SMOKE, rows, steps, succeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of images to train on and 7 to hold out."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 7)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return root


def config_for(folder):
    config = quickstart.get_config("smoke")
    config.model.num_classes = 2
    config.data.source, config.data.path, config.data.split = "image_folder", str(folder), "train"
    config.data.validation_split, config.data.batch_size = "val", 2
    config.train.validate_every = config.train.log_every = 2
    return config


def make(config):
    mesh = sharding.make_mesh(1, 1)
    source = sources.open_source(config.data)
    condition = open_condition(config, mesh, source)
    networks, _, _ = training.abstract_networks(config, mesh, condition)
    return ValidationLoss(config, mesh, condition, source.class_names), networks


def test_is_the_objective_at_fixed_noise(folder):
    """Against a loop over the files, with the path and the losses written out."""
    config = config_for(folder)
    evaluator, networks = make(config)
    params = networks["denoiser"].init(jax.random.key(1))
    scores = evaluator(Subject(None, params)).values
    assert scores.keys() == set(evaluator.titles) == {"validation_loss", "validation_pixel", "validation_frequency"}
    assert evaluator(Subject(None, params)).values == scores

    source = sources.ImageFolder(str(folder / "val"))
    chosen = np.arange(6) * 7 // 6  # three whole batches, evenly spread
    pixel, frequency = [], []
    for number in range(3):
        index = chosen[2 * number : 2 * number + 2]
        pictures = np.stack([np.asarray(Image.open(source[int(i)]["image"])) for i in index])
        labels = np.asarray([source[int(i)]["label"] for i in index])
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), VALIDATION), number)
        draws = make_method(config).draw(key, (2, 16, 16, 3))
        x, t = images_lib.to_float(jnp.asarray(pictures)), draws.times[:, None, None, None]
        state = t * x + (1 - t) * draws.noise
        context = jnp.where(draws.dropped, 2, labels)
        output, _ = networks["denoiser"].apply(params, state, draws.times, context)
        error = output - (x - draws.noise)
        pixel.append(np.mean(np.square(np.asarray(error, np.float64))))
        frequency.append(np.mean(frequency_loss(error, jpeg_weights(85))))
    assert scores["validation_pixel"] == pytest.approx(np.mean(pixel), rel=1e-5)
    assert scores["validation_frequency"] == pytest.approx(np.mean(frequency), rel=1e-5)
    assert scores["validation_loss"] == pytest.approx(np.mean(pixel) + np.mean(frequency), rel=1e-5)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data.validation_split": ""}, "give them as config.data.validation_split"),
        ({"data.validation_split": "missing"}, "no such folder"),
        ({"data.batch_size": 8}, "whole batches of 8 images"),
        ({"train.validate_every": 3}, "must be a multiple of config.train.log_every=2"),
        ({"text.features": "features"}, "run --mode=encode with --config.data.split=val .*text.validation_features"),
    ],
)
def test_what_it_refuses(folder, settings, said):
    config = config_for(folder)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=said):
        make(config)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data.split": "val"}, "validation_split=val is part of config.data.split=val"),
        ({"data.split": "v", "data.validation_split": "v/a"}, "validation_split=v/a is part of config.data.split=v;"),
        ({"data.split": "", "data.source": "webdataset"}, "config.data.split is empty, so training reads all of"),
        ({"data.split": "", "data.source": "tfds", "data.validation_split": "train"}, "is part of config.data.split="),
    ],
)
def test_images_that_are_trained_on_are_not_held_out(folder, settings, said):
    config = config_for(folder)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=said):
        validation_of_training(config, None, None, None)


def test_without_dropout_and_with_one_program(folder):
    """A teacher's weights, which training has until its loss ends, make no other program."""
    config = config_for(folder)
    config.model.dropout = 0.5
    config.loss.repa_weight = 0.5
    teacher = {"teacher": np.zeros(3, np.float32)}
    evaluator, networks = make(config)
    params = networks["denoiser"].init(jax.random.key(1))
    scores = evaluator(Subject(None, params, teacher)).values
    with monitor.CompileWatch() as compilations:
        assert evaluator(Subject(None, params)).values == scores
    assert compilations.unexpected == 0
    config.model.dropout = 0.0
    assert make(config)[0](Subject(None, params)).values == scores


def test_classes_of_imagenet_have_two_names(tmp_path):
    """Folders have WordNet's numbers, and classes.json of a run has words."""
    for split in ("train", "val"):
        for i, name in enumerate(("n01440764", "n01443537")):
            path = tmp_path / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), 99 * i, np.uint8)).save(path)
    config, mesh = config_for(tmp_path), sharding.make_mesh(1, 1)
    condition = open_condition(config, mesh, sources.open_source(config.data))
    ValidationLoss(config, mesh, condition, ["tench", "goldfish"])
    with pytest.raises(UserError, match=r"the classes in .* differ from those"):
        ValidationLoss(config, mesh, condition, ["goldfish", "tench"])


def test_is_refused_before_anything_compiles(folder, tmp_path, monkeypatch):
    config = config_for(folder)
    config.data.validation_split = ""
    monkeypatch.setattr(train, "choose_remat", lambda *arguments: pytest.fail("it compiles"))
    with pytest.raises(UserError, match=r"give them as config.data.validation_split"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_of_a_prediction_that_was_measured_on_the_data(folder, tmp_path):
    """--mode=evaluate takes the basis from the checkpoint, so it finds what training found."""
    command = [
        SMOKE, NO_SAMPLES, f"--workdir={tmp_path}", "--config.data.source=image_folder", f"--config.data.path={folder}",
        "--config.data.split=train", "--config.data.validation_split=val", "--config.model.num_classes=2",
        "--config.data.batch_size=2", "--config.data.num_workers=0", "--config.model.prediction=asymmetric",
        "--config.model.asymmetric_rank=3",
    ]  # fmt: skip
    succeed(*command, "--config.train.validate_every=2")
    succeed(*command, "--mode=evaluate", "--config.evaluate.metrics=validation_loss")
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    assert scores["validation_loss"] == pytest.approx(rows(tmp_path)[4]["validation_loss"], rel=1e-5)


def test_values_of_different_steps_can_be_compared(folder):
    """Neither the balance's factor, which changes, nor MeanFlow's division of errors by themselves."""
    config = config_for(folder)
    config.loss.lpips_weight, config.loss.balance_start = 0.1, 1
    assert make_method(config).balance is not None
    assert method_to_compare(config).balance is None
    learnt = meanflow_cifar10.get_config("dit-smoke")
    assert [loss.power for loss in make_method(learnt).losses] == [1.0, 1.0]
    assert [loss.power for loss in method_to_compare(learnt).losses] == [0.0, 0.0]


def test_while_training(folder, tmp_path):
    """It stands in the metrics, and changes nothing in them."""
    command = [
        SMOKE, NO_SAMPLES, "--config.data.source=image_folder", f"--config.data.path={folder}",
        "--config.data.split=train", "--config.model.num_classes=2", "--config.data.batch_size=2",
    ]  # fmt: skip
    succeed(*command, f"--workdir={tmp_path / 'without'}")
    succeed(
        *command, f"--workdir={tmp_path / 'with'}", "--config.train.validate_every=2",
        "--config.data.validation_split=val",
    )  # fmt: skip
    evaluated = succeed(
        *command, f"--workdir={tmp_path / 'with'}", "--mode=evaluate", "--config.data.validation_split=val",
        "--config.evaluate.metrics=validation_loss", "--config.data.num_workers=0",
    )  # fmt: skip
    without, found = rows(tmp_path / "without"), rows(tmp_path / "with")
    scores = json.loads((tmp_path / "with" / "evaluation.json").read_text())
    for name in ("validation_loss", "validation_pixel", "validation_frequency"):
        assert scores[name] == pytest.approx(found[4][name], rel=1e-5)  # of the same average, images and noise
    assert "samples" not in scores
    assert scores["weights"]["average"] == "ema"
    assert not (tmp_path / "with" / "evaluation" / "samples.npz").exists()
    assert "validation loss" in evaluated.stdout
    said = succeed(
        *command, f"--workdir={tmp_path / 'best'}", "--config.train.validate_every=1", "--config.data.num_workers=0",
        "--config.data.validation_split=val", "--config.train.keep_best=validation_loss", "--config.train.save_every=4",
        "--config.train.keep_checkpoints=1",
    ).stdout  # fmt: skip
    losses = {step: row["validation_loss"] for step, row in rows(tmp_path / "best").items()}
    best = min(losses, key=losses.__getitem__)
    assert f"step {best} is the best so far by validation_loss; its checkpoint is kept" in said
    # The last save, before step 4 was measured, kept the best until then.
    assert steps(tmp_path / "best") == [str(min((1, 2, 3), key=losses.__getitem__)), "4"]
    measured = {step: row.get("validation_loss") for step, row in found.items()}
    assert [step for step, value in measured.items() if value is not None] == [2, 4]
    assert measured[2] != measured[4]
    for step, row in without.items():
        assert found[step]["loss"] == row["loss"]
        assert row["learning_rate"] == pytest.approx(1e-3 * step / 50)


def test_of_given_samples(folder):
    evaluator, _ = make(config_for(folder))
    with pytest.raises(UserError, match=r"needs weights, and config\.evaluate\.samples has none"):
        evaluator(Subject(None))


def test_with_stored_features(tmp_path):
    """The held-out captions' features are theirs, not those of the captions that are trained on."""
    draw = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            path = tmp_path / "data" / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"{split} number {i}")
    command = [
        "--config=configs/t2i_emoji.py:smoke", NO_SAMPLES, "--config.data.source=captioned_folder",
        f"--config.data.path={tmp_path / 'data'}", "--config.data.split=train", "--config.data.batch_size=2",
        "--config.data.num_workers=0", "--config.train.num_steps=2", "--config.train.log_every=2",
        "--config.train.validate_every=2", "--config.data.validation_split=val",
    ]  # fmt: skip
    kept = {split: f"--config.text.features={tmp_path / split}" for split in ("train", "val")}
    for split in ("train", "val"):
        succeed(
            *command, "--mode=encode", f"--workdir={tmp_path}", f"--config.data.split={split}", kept[split],
        )  # fmt: skip
    succeed(*command, f"--workdir={tmp_path / 'encoded'}")
    succeed(
        *command, f"--workdir={tmp_path / 'stored'}", kept["train"],
        f"--config.text.validation_features={tmp_path / 'val'}",
    )  # fmt: skip
    encoded, stored = rows(tmp_path / "encoded")[2], rows(tmp_path / "stored")[2]
    assert stored["validation_loss"] == pytest.approx(encoded["validation_loss"], rel=1e-5)
    refused = run_main(
        *command, f"--workdir={tmp_path / 'wrong'}", kept["train"],
        f"--config.text.validation_features={tmp_path / 'train'}",
    )  # fmt: skip
    assert refused.returncode == 1
    assert re.fullmatch(r"error: the features in .*/train belong to something else[^\n]*\n", refused.stderr)

"""FD-DINOv2, LPIPS and CLIP score as evaluators."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from deco_jax.conditioning.classes import Classes
from deco_jax.data import pipeline, sources
from deco_jax.errors import UserError
from deco_jax.evaluation import evaluator, image_sets, lpips
from deco_jax.evaluation.evaluator import Setup, Subject
from deco_jax.images import to_float
from deco_jax.method import energy
from deco_jax.method.predictions import make_prediction
from deco_jax.models import vgg
from deco_jax.run import sharding
from tests.helpers import lpips_files, lpips_params
from tests.metric_files import write_clip, write_dinov2
from tests.runs import SMOKE, random_checkpoint, succeed


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The settings that name random weights."""
    folder = tmp_path_factory.mktemp("weights")
    return [
        *lpips_files(folder),
        f"--config.evaluate.clip={write_clip(folder / 'clip')}",
        f"--config.evaluate.dinov2={write_dinov2(folder / 'dinov2.safetensors')}",
        "--config.evaluate.dinov2_size=S",
        "--config.lpips.dtype=float32",
    ]


@pytest.mark.slow
def test_as_a_command(tmp_path, files):
    """All at once, of six samples that are drawn once."""
    pytest.importorskip("tokenizers")
    run = random_checkpoint(tmp_path / "run", quickstart.get_config("smoke"))
    names = ["zero", "one", *map(str, range(2, 10))]
    (run / "classes.json").write_text(json.dumps(names))  # by which captions are made for CLIP
    said = succeed(
        SMOKE,
        "--mode=evaluate",
        f"--workdir={run}",
        *files,
        "--config.evaluate.metrics=fd_dinov2,lpips,clip_score",
        "--config.evaluate.num_reference=6",
        "--config.evaluate.batch_size=6",
        "--config.evaluate.lpips_images=6",
        "--config.sample.num_images=6",
        "--config.sample.classes=3,7",
    ).stdout
    result = json.loads((run / "evaluation.json").read_text())
    assert said.count("6 of 6 images measured") == 2  # samples and reference
    assert result["fd_dinov2"] > 0
    assert 0 < result["lpips_pairs"] < 10
    assert 0 < result["lpips_reconstruction"] < 10
    assert 0 <= result["clip_score"] <= 100
    assert result["missing"] == {}
    assert "FD-DINOv2" in said
    assert "fid" not in result
    assert result["fd_dinov2_of"]["reference"] == 6


def setup_of(tmp_path, files, **changes):
    config = quickstart.get_config("smoke")
    config.update_from_flattened_dict(dict(part.removeprefix("--config.").split("=") for part in files))
    config.evaluate.update({"batch_size": 4, "lpips_images": 5, **changes})
    return Setup(config, tmp_path, sharding.make_mesh(1, 1), 5)


def test_pairs_of_a_folder(tmp_path, files):
    """Images of one class that stand side by side, by the network itself; others are in no pair."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    for i, (image, label) in enumerate(zip(pixels, [0, 0, 0, 1, 1], strict=True)):
        Image.fromarray(image).save(tmp_path / f"{i:06d}_class_{label}.png")
    samples = image_sets.folder_images(tmp_path)
    np.testing.assert_array_equal(samples.labels, [0, 0, 0, 1, 1])
    evaluator = lpips.make(setup_of(tmp_path, files))
    # With several hosts, a second reader might not see yet what the first host has written.
    assert evaluator.readers(samples) == evaluator.readers(samples)
    scores = evaluator(Subject(samples))
    network = vgg.frozen_lpips("", "", "float32", 4)
    expected = jax.jit(network.apply)(lpips_params(), *(to_float(jnp.asarray(a)) for a in (pixels[:1], pixels[1:2])))
    assert scores.values["lpips_pairs"] == pytest.approx(float(expected[0]), rel=1e-4)
    assert scores.missing == {"lpips_reconstruction": "there is no model, only samples"}
    nameless = samples._replace(labels=None, identity="another")
    assert "the same class" in lpips.make(setup_of(tmp_path, files))(Subject(nameless)).missing["lpips_pairs"]


def test_reconstruction(tmp_path, files):
    """Of a model that leaves the noise in, nothing is left at the end of time; earlier it is, and stays the same."""
    model = model_that_returns(lambda state, t: state)
    setup = setup_of(tmp_path, files)
    measure = lpips.make(setup)

    def distance(time, scale=1.0):
        setup.config.evaluate.lpips_time, setup.config.path.noise_scale = time, scale
        return measure(Subject(model=model)).values["lpips_reconstruction"]

    assert distance(1.0) == pytest.approx(0, abs=1e-6)
    early, late = distance(0.3), distance(0.9)
    assert early > late > 1e-3
    assert distance(0.3) == early
    assert distance(0.3, scale=2.0) > 1.05 * early


def model_that_returns(image, config=None):
    denoiser = types.SimpleNamespace(prediction=make_prediction(config or quickstart.get_config("smoke")))
    return types.SimpleNamespace(
        condition=Classes(10),
        frozen={},
        denoiser=denoiser,
        denoise=lambda state, t, labels: image(state, t) + 0 * labels[0],
    )


def test_reconstruction_of_a_perfect_model(tmp_path, files):
    """At the beginning of the energy-guided path, a perfect velocity leads to the blurred image, not to the image."""
    setup = setup_of(tmp_path, files)
    setup.config.path.name, setup.config.evaluate.lpips_time = "energy", 1e-3
    source = sources.open_source(setup.config.data)
    evenly = np.arange(5) * len(source) // 5
    batch = next(pipeline.epoch(source, (16, 16), batch_size=5, indices=evenly))
    images = to_float(jnp.asarray(batch["image"]))
    blurred = energy.blurred_endpoint(images, jnp.full(5, 1e-3)).image
    setup.config.evaluate.batch_size = 5
    found = {}
    for name, known in (("blurred", blurred), ("sharp", images)):
        model = model_that_returns(lambda state, t, known=known: known[: len(state)], setup.config)
        found[name] = lpips.make(setup)(Subject(model=model)).values["lpips_reconstruction"]
    assert found["blurred"] < 0.01 * found["sharp"]


def test_no_reconstruction_with_a_class_token(tmp_path, files):
    setup = setup_of(tmp_path, files)
    setup.config.model.class_token = 8
    scores = lpips.make(setup)(Subject(model=types.SimpleNamespace()))
    assert "class token" in scores.missing["lpips_reconstruction"]


def test_missing_weights():
    for name, says in (
        ("fd_dinov2", r"config.evaluate.dinov2 is empty; download DINOv2's"),
        ("lpips", r"config.lpips.vgg is empty; download https://download.pytorch.org/models/vgg16"),
        ("clip_score", r"config.evaluate.clip is empty; download config.json"),
        ("kid", r"config.evaluate.inception is empty"),
    ):
        config = quickstart.get_config("smoke")
        config.evaluate.metrics = name
        with pytest.raises(UserError, match=says) as error:
            evaluator.check_evaluators(config)
        assert "\n" not in str(error.value)

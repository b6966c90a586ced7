"""Text to image through the command line: encode, train, go on, sample from prompts into the benchmarks' folders."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import t2i_256
from deco_jax.conditioning import condition
from deco_jax.conditioning import requests as requests_lib
from deco_jax.conditioning.texts import Texts
from deco_jax.data import sources
from deco_jax.method import training
from deco_jax.method.optimizer import make_optimizer
from deco_jax.models import network as network_lib
from deco_jax.programs import evaluate
from deco_jax.run import checkpoint, sharding, start
from deco_jax.run.state import create_state, state_shapes
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from tests.helpers import relative_error
from tests.runs import NO_SAMPLES, random_checkpoint, rows, succeed
from tests.test_resume import losses
from tests.texts import write_encoder

SMOKE = "--config=configs/t2i_256.py:smoke"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on features of a small Qwen3 that were encoded before; its command and its folder."""
    folder = tmp_path_factory.mktemp("text")
    command = [
        SMOKE,
        NO_SAMPLES,
        "--config.text.encoder=qwen3",
        f"--config.text.path={write_encoder(folder / 'qwen3')}",
        f"--config.text.features={folder / 'features'}",
        "--config.model.text_width=40",
    ]
    said = succeed(*command, "--mode=encode", f"--workdir={folder / 'run'}").stdout
    assert "1,797 of 1,797 captions" in said
    assert not (folder / "run").exists()
    said = succeed(*command, f"--workdir={folder / 'run'}").stdout
    assert "1,797 images with captions" in said
    return command, folder / "run"


def test_resumed_is_uninterrupted_to_the_bit(run, tmp_path):
    command, whole = run
    succeed(*command, f"--workdir={tmp_path}", "--config.train.num_steps=2")
    said = succeed(*command, f"--workdir={tmp_path}").stdout
    assert "resumed at step 2" in said
    assert losses(tmp_path) == losses(whole)
    assert len(losses(whole)) == 4


def test_losses_are_those_of_encoding_in_each_step(run, tmp_path):
    command, whole = run
    succeed(*command, "--config.text.features=", f"--workdir={tmp_path}", "--config.train.num_steps=2")
    for step in (1, 2):
        assert rows(tmp_path)[step]["loss"] == pytest.approx(rows(whole)[step]["loss"], rel=1e-3)


PROMPTS = ['{"tag": "a", "prompt": "a photo of a bench"}', '{"tag": "b", "prompt": "two clocks"}']
SHORT = ["--config.sample.batch_size=8", "--config.sample.num_steps=2", "--config.sample.npz=True"]


def read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_benchmark_folders(run, tmp_path):
    """GenEval's, then DPG-Bench's, of the same prompts: the same images."""
    command, folder = run
    workdir = tmp_path / "run"
    shutil.copytree(folder, workdir)
    draw = [*command, f"--workdir={workdir}", "--mode=sample", *SHORT]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(PROMPTS) + "\n")
    succeed(*draw, f"--config.sample.prompts={tmp_path / 'evaluation_metadata.jsonl'}")
    drawn = workdir / "samples" / "images"
    found = sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*") if path.is_file())
    assert found == sorted(
        f"{name}/{file}"
        for name in ("00000", "00001")
        for file in ["metadata.jsonl", *(f"samples/{i:04d}.png" for i in range(4))]
    )
    assert [(drawn / name / "metadata.jsonl").read_text().strip() for name in ("00000", "00001")] == PROMPTS
    images = [[read(drawn / name / "samples" / f"{i:04d}.png") for i in range(4)] for name in ("00000", "00001")]
    with np.load(workdir / "samples" / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], np.concatenate(images))
    assert len(np.unique(np.reshape(images, (8, -1)), axis=0)) == 8
    grid = read(workdir / "samples" / "grid.png")
    assert grid.shape[0] > grid.shape[1]  # square images in a square, and captions beneath
    assert not (workdir / "samples" / "parts").exists()

    dpg = tmp_path / "dpg"
    dpg.mkdir()
    for i, name in enumerate(("first", "second")):
        (dpg / f"{name}.txt").write_text(json.loads(PROMPTS[i])["prompt"])
    succeed(*draw, f"--config.sample.prompts={dpg}")
    assert sorted(path.name for path in drawn.rglob("*")) == ["first.png", "second.png"]
    for name, four in zip(("first", "second"), images, strict=True):
        a, b, c, d = four
        np.testing.assert_array_equal(read(drawn / f"{name}.png"), np.block([[[a], [b]], [[c], [d]]]))


def test_one_prompt_at_another_size(run, tmp_path):
    command, folder = run
    workdir = tmp_path / "run"
    shutil.copytree(folder, workdir)
    succeed(
        *command,
        f"--workdir={workdir}",
        "--mode=sample",
        "--config.sample.prompts=a red fox in the snow",
        "--config.sample.images_per_prompt=2",
        "--config.data.image_size=(24,48)",
        "--config.sample.num_steps=1",
        "--config.sample.negative_prompt=blurry",
    )
    drawn = workdir / "samples" / "images"
    assert sorted(path.name for path in drawn.iterdir()) == ["00000_0.png", "00000_1.png"]
    assert read(drawn / "00000_1.png").shape == (24, 48, 3)


def test_the_next_stage_takes_weights_averages_and_moments(run):
    """As t2i_512 from a run of t2i_256; a schedule or moments that aren't asked for start anew."""
    _, folder = run
    config, mesh = t2i_256.get_config("smoke"), sharding.make_mesh(1, 1)
    config.model.text_width, config.text.encoder = 40, "qwen3"
    config.init_from = str(folder)
    networks, _, _ = training.abstract_networks(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    checkpoints = checkpoint.Checkpoints(folder, 3)
    before = checkpoints.restore(state_shapes(networks, optimizer, mesh), config)
    checkpoints.close()
    assert int(before["step"]) == 4
    new = create_state(1, networks, optimizer, mesh)
    for asked in (False, True):
        config.init_optimizer = asked
        started = start.start_from(config, new, mesh)
        assert int(started["step"]) == 0
        expected = {**before, "step": new["step"], "opt_state": (before if asked else new)["opt_state"]}
        jax.tree.map(np.testing.assert_array_equal, started, expected)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(started["opt_state"])) == 4  # a count of steps


# ---------------------------------------------------------------------------------------- what an image depends on


@pytest.fixture(scope="module")
def setup():
    config = t2i_256.get_config("smoke")
    config.sample.num_steps, config.sample.guidance = 3, 4.0
    network = network_lib.build(config.model.to_dict())
    draw = np.random.default_rng(0)
    # Away from the start, where the output is zero whatever the text, and with a text that is heard.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32(draw.normal(path[-1].key == "scale", 0.15, leaf.shape)), network.shapes
    )
    params["blocks"]["attention"]["text_kv"]["kernel"] *= 10
    mesh = sharding.make_mesh(1, 1)
    return config, params, mesh, generate.Generator(generate.make_denoiser(config), mesh)


def draw(setup, prompts, batch_size, **settings):
    config, params, mesh, generator = setup
    changed = config.copy_and_resolve_references()
    changed.sample.update(settings)
    texts = condition.open_condition(changed, mesh, None)
    requests = requests_lib.prompt_requests(texts, prompts, changed.sample.negative_prompt)
    return np.concatenate(list(generator.images(params, requests, Sampling.of(changed), batch_size)))


def draw_unguided(setup, prompts):
    return draw(setup, prompts, len(prompts), guidance=1.0).astype(int)


def test_an_image_depends_on_its_prompt_its_index_and_the_seed(setup):
    prompts = ["a cat", "a cat", "a dog"]
    images = draw(setup, prompts, 3).astype(int)
    assert images.shape == (3, 32, 32, 3)
    assert np.abs(images[0] - images[1]).max() > 2
    # Its neighbours in the batch, and where the batch ends, change nothing.
    other = draw(setup, ["a fox", "a cat", "a hen", "a cat"], 3)
    assert np.abs(images[1] - other[1]).max() <= 1
    assert np.abs(images[0] - other[0]).max() > 2
    negative = draw(setup, prompts, 3, negative_prompt="a cat")
    assert np.abs(images - negative).max() > 2
    # Guided away from itself, a prompt is the unguided one: the scale has nothing to scale.
    own = draw(setup, ["a dog"] * 3, 3, negative_prompt="a dog").astype(int)
    assert np.abs(own[2] - draw_unguided(setup, ["a dog"] * 3)[2]).max() <= 1


def test_the_empty_negative_prompt_is_the_trained_null(setup):
    config, _, mesh, _ = setup
    texts = condition.open_condition(config, mesh, sources.open_source(config.data))
    frozen = texts.load()
    for requests in (
        requests_lib.caption_requests(texts, 4, frozen=frozen),
        requests_lib.caption_requests(texts, 4),
        requests_lib.prompt_requests(texts, [""]),
    ):
        assert relative_error(requests.null.astype(np.float32), np.asarray(frozen["null"], np.float32)) == 0
    requests = requests_lib.caption_requests(texts, 5)
    np.testing.assert_array_equal(requests.kept(2).context(np.arange(5)), requests.context(np.arange(5)))


def test_evaluation_draws_the_datas_captions(run):
    _, folder = run
    config = t2i_256.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "text.encoder": "qwen3",
            "text.path": str(folder.parent / "qwen3"),
            "model.text_width": 40,
            "sample.num_images": 8,
            "sample.batch_size": 8,
            "sample.num_steps": 2,
        }
    )
    images = evaluate.drawn_samples(config, evaluate.open_model(config, str(folder), ""))
    drawn = np.concatenate(list(images.batches(8, 0)))
    assert (images.total, drawn.shape) == (8, (8, 32, 32, 3))
    where = folder / "checkpoints" / "4"
    assert images.identity == generate.fingerprint(
        config, where, requests_lib.CaptionsOf(sources.CaptionedDigits(), np.arange(8) * 1797 // 8)
    )
    assert images.identity != generate.fingerprint(config, where, ["another"] * 8)


def test_an_evaluation_reads_the_text_encoder_once(tmp_path, monkeypatch):
    """And not before there are images to draw."""
    config = t2i_256.get_config("smoke")
    random_checkpoint(tmp_path, config)
    config.sample.num_images, config.sample.num_steps, config.sample.batch_size = 4, 1, 2
    loaded, load = [], Texts.load_encoder
    monkeypatch.setattr(Texts, "load_encoder", lambda self: loaded.append(1) or load(self))
    model = evaluate.open_model(config, str(tmp_path), "")
    samples = evaluate.drawn_samples(config, model)
    evaluate.subject_of(samples, model)
    assert not loaded
    for _ in range(2):
        assert sum(len(batch) for batch in samples.batches(2, 0)) == 4
    assert len(loaded) == 1

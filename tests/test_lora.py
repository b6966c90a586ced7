"""Low-rank adaptation: the pretrained model at first, its frozen weights for good, and the gradient's projection."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import deco_jax
from configs import finetune, pixelgen256, quickstart
from deco_jax import config as config_lib
from deco_jax.convert import deco, torch_files
from deco_jax.errors import UserError
from deco_jax.method import lora, training
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.step import Observed
from deco_jax.models import network as network_lib
from deco_jax.run import adapted, checkpoint, sharding
from deco_jax.run.checkpoint import read
from deco_jax.run.state import create_state
from tests.helpers import ROOT, fake_devices, relative_error
from tests.runs import NO_SAMPLES, files, rows, signal_when, succeed, two_steps
from tests.test_bad_input import refuse

LORA = ("--config.lora.rank=3", "--config.lora.alpha=6", "--config.lora.whole=label_embed")


def config_of(**changes):
    config = quickstart.get_config("smoke")
    config.lora.rank, config.lora.alpha, config.lora.whole = 3, 6.0, "label_embed"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def random_like(shapes, seed: int):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(0, 0.1, leaf.shape)), shapes)


@pytest.fixture(scope="module")
def parts():
    """The adapter of a small model, its network, frozen weights and factors, all drawn at random."""
    config = config_of()
    adapter, network = lora.adapter_of(config), network_lib.build(config.model.to_dict())
    base = random_like(adapter.base_shapes(network.shapes), 0)
    return config, adapter, network, base, random_like(adapter.trained_shapes(network.shapes), 1)


def test_at_first_it_is_the_pretrained_model(parts):
    """To the bit, whatever the factors A are; and everything but the matrices and the label table is frozen."""
    _, adapter, network, base, _ = parts
    trained = adapter.init(jax.random.key(0), network)
    merged = adapter.merge(base, trained)
    expected = {**base, "label_embed": trained["label_embed"]}
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    names = {sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(trained)}
    assert names == {"label_embed/embedding"} | {
        f"blocks/{matrix}/kernel/{side}"
        for matrix in ("attention/qkv", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
        for side in "ab"
    }
    factor = trained["blocks"]["attention"]["qkv"]["kernel"]["a"]
    assert factor.shape == (2, 32, 3)
    assert np.std(np.asarray(factor)) == pytest.approx(1 / np.sqrt(32), rel=0.2)


def test_gradients_are_projections_of_the_whole_model_s(parts):
    """dA = α/r · dW · Bᵀ and dB = α/r · Aᵀ · dW of every block, worked out in float64 from the dense gradient dW."""
    config, adapter, network, base, trained = parts
    method = make_method(config)
    pixels = np.random.default_rng(2).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    draws = method.draw(jax.random.key(0), pixels.shape)
    observed = Observed(jnp.arange(4), jnp.int32(10))

    def objective(params, *rest):
        return method.objective(params, *rest, networks={"denoiser": network})

    merged = adapter.merge(base, trained)
    dense, _ = jax.jit(jax.grad(objective, has_aux=True))({"denoiser": merged}, pixels, draws, observed, {})
    ours, _ = jax.jit(jax.grad(lora.with_base(config, objective), has_aux=True))(
        {"denoiser": trained}, pixels, draws, observed, {lora.BASE: base}
    )
    for group, name in (("attention", "qkv"), ("attention", "out"), ("mlp", "gate"), ("mlp", "down")):
        weights = np.asarray(dense["denoiser"]["blocks"][group][name]["kernel"], np.float64)
        found = ours["denoiser"]["blocks"][group][name]["kernel"]
        a, b = (np.asarray(trained["blocks"][group][name]["kernel"][side], np.float64) for side in "ab")
        for block in range(2):
            assert relative_error(found["a"][block], 6 / 3 * weights[block] @ b[block].T) < 1e-5
            assert relative_error(found["b"][block], 6 / 3 * a[block].T @ weights[block]) < 1e-5
    labels = (tree["denoiser"]["label_embed"]["embedding"] for tree in (ours, dense))
    np.testing.assert_allclose(*labels, rtol=1e-5, atol=1e-8)


def step_on(config, base, mesh, accumulate: int = 1):
    """The state and the frozen weights after three steps on a mesh."""
    config.optimizer.accumulate_steps = accumulate
    condition = training.abstract_condition(config, mesh)
    networks, observe, shapes = training.abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    state = create_state(0, networks, optimizer, mesh, make_method(config).averages)
    trained = random_like(networks["denoiser"].shapes, 1)
    state["params"]["denoiser"] = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), trained, state["params"]["denoiser"]
    )
    null = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, 10, leaf.dtype), leaf.sharding), shapes)
    placed = jax.tree.map(lambda leaf, where: jax.device_put(leaf, where.sharding), base, shapes[lora.BASE])
    frozen = {**null, lora.BASE: placed}
    draw = np.random.default_rng(3)
    batch = {
        "image": draw.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8),
        "label": np.arange(16, dtype=np.int32) % 10,
    }
    batch = sharding.place_everywhere(mesh, batch)
    step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen).compile()
    for _ in range(3):
        state, metrics = step(state, batch, frozen)
    return state, frozen, metrics


def compare_devices():
    """Run the same three steps on one device and on eight; called by the test below where there are eight."""
    config = config_of(optimizer__learning_rate=1e-3, optimizer__warmup_steps=0)
    adapter, network = lora.adapter_of(config), network_lib.build(config.model.to_dict())
    base = random_like(adapter.base_shapes(network.shapes), 0)
    trained = random_like(adapter.trained_shapes(network.shapes), 1)
    one, _, expected = step_on(config, base, sharding.make_mesh(1, 1, jax.devices()[:1]))
    for shape, accumulate in (((1, 8), 1), ((2, 4), 2)):
        many, frozen, metrics = step_on(config, base, sharding.make_mesh(*shape), accumulate)
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
        for name in ("params", "averages"):
            difference = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), many[name], one[name])
            assert max(jax.tree.leaves(difference)) < 2e-5, difference
        jax.tree.map(np.testing.assert_array_equal, frozen[lora.BASE], base)
        for before, after in zip(jax.tree.leaves(trained), jax.tree.leaves(many["params"]["denoiser"]), strict=True):
            assert np.max(np.abs(before - np.asarray(after))) > 1e-4
        split = {
            sharding.path_name(path): leaf.sharding.spec.index("fsdp")
            for path, leaf in jax.tree.leaves_with_path(many["params"]["denoiser"]["blocks"])
            if "fsdp" in leaf.sharding.spec
        }
        assert split == {
            **{f"{name}/kernel/a": 1 for name in ("attention/qkv", "mlp/gate", "mlp/up")},
            **{f"{name}/kernel/b": 2 for name in ("attention/out", "mlp/down")},
        }


@pytest.mark.slow
def test_eight_devices_train_as_one():
    """And what is frozen is the same to the bit after the steps, while every factor has moved."""
    program = (
        "import jax\nfrom tests import test_lora\n"
        "with jax.default_matmul_precision('highest'):\n    test_lora.compare_devices()"
    )
    environment = {**os.environ, **fake_devices(8)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_adapted(parts):
    _, adapter, network, *_ = parts
    with pytest.raises(
        UserError, match=r"config.lora.whole=colours is not a part of this model; choose from .*decoder"
    ):
        adapter.__class__(3, 1.0, ("qkv",), ("colours",)).trained_shapes(network.shapes)
    with pytest.raises(UserError, match="has no matrices text_kv"):
        adapter.__class__(3, 1.0, ("text_kv",)).trained_shapes(network.shapes)


# ---------------------------------------------------------------------------------------- as a user has it


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return two_steps(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    """A run of four steps that adapts the one of two, through configs/finetune.py."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    said = succeed(*command(pretrained), f"--workdir={folder}").stdout
    assert "factors of rank 3" in said
    return folder


def command(pretrained):
    settings = ("train.num_steps=4", "train.save_every=2", "train.log_every=1", "data.batch_size=16")
    more = ("data.source=digits", "data.num_workers=0", "model.num_classes=10", "optimizer.warmup_steps=0")
    return (
        f"--config=configs/finetune.py:{pretrained}",
        NO_SAMPLES,
        *LORA,
        *(f"--config.{setting}" for setting in (*settings, *more)),
        "--config.train.sample_every=2",
        "--config.sample.num_steps=2",
        "--config.sample.num_images=10",
        "--config.sample.batch_size=10",
    )


def merged_by_hand(run, pretrained, step: int):
    """The average of a step's checkpoint put together in NumPy, from Orbax's arrays."""
    config = config_of()
    network, mesh = network_lib.build(config.model.to_dict()), sharding.make_mesh(1, 1, jax.devices()[:1])
    base = checkpoint.load_average(checkpoint.find(str(pretrained)), network.shapes, config, mesh)
    shapes = sharding.placed_shapes(mesh, {"x": lora.adapter_of(config).trained_shapes(network.shapes)})["x"]
    trained = read._read(run / "checkpoints" / str(step) / "ema", shapes)
    expected = jax.tree.map(np.array, base)
    for group, names in (("attention", ("qkv", "out")), ("mlp", ("gate", "up", "down"))):
        for name in names:
            factors = trained["blocks"][group][name]["kernel"]
            product = np.einsum("dir,dro->dio", np.float64(factors["a"]), np.float64(factors["b"]))
            expected["blocks"][group][name]["kernel"] = expected["blocks"][group][name]["kernel"] + 6 / 3 * product
    expected["label_embed"] = trained["label_embed"]
    return config, network, mesh, expected


@pytest.mark.slow
def test_a_checkpoint_holds_what_trains_and_is_read_merged(run, pretrained):
    config, network, mesh, expected = merged_by_hand(run, pretrained, 4)
    where = checkpoint.find(str(run))
    params = checkpoint.load_average(where, network.shapes, config, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    raw = checkpoint.load_params(where, {"denoiser": network.shapes}, config, mesh)["denoiser"]
    frozen = raw["patch_embed"]["kernel"]
    np.testing.assert_array_equal(frozen, expected["patch_embed"]["kernel"])  # to the bit
    assert not np.array_equal(raw["blocks"]["mlp"]["up"]["kernel"], params["blocks"]["mlp"]["up"]["kernel"])
    small, large = (
        sum(path.stat().st_size for path in (folder / "ema").rglob("*") if path.is_file())
        for folder in (where, checkpoint.find(str(pretrained)))
    )
    assert small < 0.5 * large
    assert sorted(path.name for path in (run / "base").iterdir()) == ["checksums.json", "parameters"]


@pytest.mark.slow
def test_samples_and_exports_are_of_the_merged_model(run):
    succeed(f"--workdir={run}", "--mode=sample")
    assert (run / "samples" / "grid.png").exists()
    succeed(f"--workdir={run}", "--mode=export")
    images = [deco_jax.load(path).sample(classes=[1, 2], num_steps=2, guidance=2.0) for path in (run, run / "export")]
    np.testing.assert_array_equal(*images)
    config = config_of()
    tensors = torch_files.read_safetensors(run / "export" / "ema.safetensors")
    network, mesh = network_lib.build(config.model.to_dict()), sharding.make_mesh(1, 1, jax.devices()[:1])
    ours = checkpoint.load_average(checkpoint.find(str(run)), network.shapes, config, mesh)
    jax.tree.map(np.testing.assert_array_equal, deco.from_torch(config.model, tensors), ours)
    assert json.loads((run / "export" / "config.json").read_text())["lora"]["rank"] == 0


@pytest.mark.slow
def test_resumed_is_uninterrupted_to_the_bit_without_what_it_started_from(run, pretrained, tmp_path):
    moved = pretrained.with_name("moved")
    succeed(*command(pretrained), f"--workdir={tmp_path}", "--config.train.num_steps=2")
    pretrained.rename(moved)
    try:
        said = succeed(f"--workdir={tmp_path}", "--config.train.num_steps=4").stdout
    finally:
        moved.rename(pretrained)
    assert "resumed at step 2" in said
    for step in (3, 4):
        assert [rows(tmp_path)[step][name] for name in ("loss", "gradient_norm")] == [
            rows(run)[step][name] for name in ("loss", "gradient_norm")
        ]
    before = files(tmp_path)
    refuse(f"--workdir={tmp_path}", "--config.lora.rank=4", says="lora.rank was 3 and is 4")
    assert files(tmp_path) == before


@pytest.mark.slow
def test_an_average_of_the_run_as_the_weaker_model(pretrained, tmp_path):
    """The guided model itself as its weaker one changes nothing: training draws the same grid without guidance."""
    grids = []
    for name, settings in {"plain": ("guidance=1.0",), "led": ("guidance=3.0", "guidance_average=ema")}.items():
        options = [f"--config.sample.{setting}" for setting in settings]
        succeed(*command(pretrained), *options, f"--workdir={tmp_path / name}", "--config.train.num_steps=2")
        grids.append(np.asarray(Image.open(tmp_path / name / "samples" / "step_00000002.png"), np.int32))
    assert grids[0].std() > 10
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_local_copies_of_a_start_without_a_checkpoint_are_not_used(pretrained, tmp_path):
    """Their factors belong to frozen weights that the next start may find changed."""
    more = (f"--workdir={tmp_path / 'run'}", f"--config.train.local_copies={tmp_path / 'local'}")
    more += ("--config.train.local_copies_every=1", "--config.train.save_every=1000")
    long = (*command(pretrained), *more, "--config.train.num_steps=1000", "--config.train.sample_every=0")
    code, _ = signal_when(signal.SIGKILL, lambda said: "step 5/" in said, *long)
    assert code == -signal.SIGKILL
    assert list((tmp_path / "local").glob("*/*/*.npz"))
    said = succeed(*command(pretrained), *more, "--config.train.num_steps=2", "--config.train.sample_every=0")
    assert "a new run" in said.stdout
    assert "copies of step" not in said.stderr


@pytest.mark.slow
def test_a_base_that_is_damaged_or_missing_is_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    target = max((tmp_path / "run" / "base" / "parameters").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    refuse(f"--workdir={tmp_path / 'run'}", "--mode=sample", says="base can't be read: .*checksum differs")
    shutil.rmtree(tmp_path / "run" / "base")
    refuse(f"--workdir={tmp_path / 'run'}", "--mode=sample", says="base is missing.*copy a run's whole folder")


@pytest.mark.slow
def test_own_classes_start_from_those_of_the_same_name(pretrained, tmp_path):
    """Of three classes two are the pretrained model's; the third starts as no class."""
    config = config_of(model__num_classes=3, init_from=str(pretrained))
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    adaptation = adapted.Adaptation(config, tmp_path, "", mesh)
    adaptation.load(["seven", "7", "2"])
    shapes = network_lib.build(config_of().model.to_dict()).shapes
    rows_there = checkpoint.load_average(checkpoint.find(str(pretrained)), shapes, config_of(), mesh)
    table = np.asarray(rows_there["label_embed"]["embedding"])
    np.testing.assert_array_equal(adaptation.started["label_embed"]["embedding"], table[[10, 7, 2, 10]])
    config.lora.whole = ""
    with pytest.raises(UserError, match=r"has 10 classes, but config.model.num_classes is 3; add label_embed to"):
        adapted.Adaptation(config, tmp_path, "", mesh)
    config.init_optimizer = True
    with pytest.raises(UserError, match=r"takes over the moments of weights that config.lora.rank freezes; set it to"):
        adapted.Adaptation(config, tmp_path, "", mesh)
    config.init_from, config.init_optimizer = "", False
    with pytest.raises(UserError, match=r"config.lora.rank adapts the weights of config.init_from, which is empty"):
        adapted.Adaptation(config, tmp_path, "", mesh)


@pytest.mark.slow
def test_the_smoke_variant(tmp_path):
    succeed("--config=configs/finetune.py:smoke", f"--workdir={tmp_path}")
    succeed(f"--workdir={tmp_path}", "--mode=sample")
    succeed(f"--workdir={tmp_path}", "--mode=export")
    assert finetune.get_config("smoke").lora.rank > 0
    new = f"--workdir={tmp_path / 'x'}"
    without = ("--config=configs/finetune.py:smoke", "--config.lora.random_base=False")
    refuse(*without, new, says="adapts the weights of config.init_from, which is empty; give a run's folder")
    refuse("--config=configs/finetune.py:nothing", new, says="there is no run or variant 'nothing'")
    assert not (tmp_path / "x").exists()


def test_a_pixelgen_run_can_be_adapted(tmp_path):
    """Its perceptual losses, and what balances them, are off; its teacher is kept, which REG would need."""
    pretrained = pixelgen256.get_config("smoke")
    assert pretrained.loss.balance_start
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json(pretrained)))
    config = finetune.get_config(str(tmp_path))
    config_lib.check(config)
    assert config.teacher.to_dict() == pretrained.teacher.to_dict()


def test_what_belongs_to_the_pretrained_runs_data_is_left_behind(tmp_path, monkeypatch):
    """Its prompts, stored features and further averages; a ~ after the colon is the home folder, as elsewhere."""
    pretrained = pixelgen256.get_config("smoke")
    pretrained.sample.prompts, pretrained.sample.images_per_prompt = "prompts.txt", 4
    pretrained.sample.average = pretrained.sample.guidance_average = "short"
    pretrained.text.features = pretrained.text.validation_features = "features"
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json(pretrained)))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    config = finetune.get_config(f"~/{tmp_path.name}")
    config_lib.check(config)
    assert (config.sample.average, config.sample.guidance_average) == ("ema", "")
    assert (config.text.features, config.text.validation_features) == ("", "")

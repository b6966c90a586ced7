"""The Python API: what `load` opens, and what a `Model` does, against the network by itself and plain loops."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deco_jax
from configs import quickstart, t2i_256
from deco_jax import config as config_lib
from deco_jax.convert import torch_files
from deco_jax.programs import convert
from deco_jax.run import monitor
from deco_jax.sampling.guidance import Guidance
from tests.helpers import ROOT, fake_devices, relative_error
from tests.runs import random_checkpoint

EULER = {"sampler": "euler", "shift": 1.0, "guidance": 2.0, "num_steps": 3}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("api") / "run", quickstart.get_config("smoke"), ("ema", "slow"))


@pytest.fixture(scope="module")
def model(workdir):
    return deco_jax.load(workdir)


def test_importing_starts_nothing():
    program = (
        "import sys, deco_jax; deco_jax.__version__, deco_jax.UserError, dir(deco_jax); "
        "print(sorted({'jax', 'numpy', 'flax', 'orbax', 'grain', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_such_attribute():
    with pytest.raises(AttributeError, match="'deco_jax' has no attribute 'sample'"):
        deco_jax.sample  # noqa: B018


def test_what_load_opens(workdir, model):
    """A workdir, its checkpoint, what it exports and the official file have the same weights, and settings."""
    pytest.importorskip("torch")
    config = quickstart.get_config("smoke")
    convert.export_checkpoint(config, str(workdir))
    paths = (workdir / "checkpoints" / "1", workdir / "export", workdir / "export" / "deco.ckpt")
    for path in paths:
        other = deco_jax.load(path)
        assert config_lib.model_differences(other.config.model.to_dict(), config.model.to_dict()) == []
        jax.tree.map(np.testing.assert_array_equal, other.params, model.params)
    slow = [deco_jax.load(path, average="slow").params for path in (workdir, paths[1])]
    jax.tree.map(np.testing.assert_array_equal, *slow)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.875 * b, rtol=1e-6), slow[0], model.params)
    with pytest.raises(deco_jax.UserError, match="has no average 'fast'; it has ema, slow"):
        deco_jax.load(paths[1], average="fast")
    assert deco_jax.load(paths[1]).config.sample.to_dict() == model.config.sample.to_dict()
    assert deco_jax.load(paths[2], config=config).config.sample.num_steps == 4
    assert repr(model) == f"<deco_jax.Model deco, 10 classes, 16×16, from {paths[0]}>"
    assert (model.num_classes, model.image_size, model.class_names) == (10, (16, 16), None)


def test_what_load_does_not_open(workdir, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "ema.safetensors").touch()
    (tmp_path / "notes.ckpt").write_text("nothing")
    cases = [
        ((tmp_path,), {}, "there is no checkpoint in"),
        ((tmp_path / "export",), {}, "has no config.json beside its weights"),
        ((workdir,), {"average": "fast"}, "no average 'fast'"),
        ((workdir,), {"config": quickstart.get_config("smoke")}, "has its own config; leave out config="),
        ((tmp_path / "notes.ckpt",), {}, "notes.ckpt"),
    ]
    for name, content, says in (
        ("config.json", "[]", "config.json can't be read"),
        ("measured.npz", "no archive", "measured.npz can't be read"),
        ("classes.json", "{", "classes.json can't be read"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = config_lib.to_json(quickstart.get_config("smoke"))
        (folder / "config.json").write_text(json.dumps(config))
        torch_files.write_safetensors(folder / "ema.safetensors", {"x": np.zeros(1, np.float32)}, {})
        (folder / name).write_text(content)
        cases.append(((folder,), {}, says))
    for arguments, options, says in cases:
        with pytest.raises(deco_jax.UserError, match=says) as error:
            deco_jax.load(*arguments, **options)
        assert "\n" not in str(error.value)


def test_one_program_for_all_settings(model):
    """Images are the last of the stream's; other classes, scales, steps, shift and seeds compile nothing."""
    images = model.sample(classes=[3, 7], **EULER, seed=4)
    assert (images.shape, images.dtype) == ((2, 16, 16, 3), np.uint8)
    snapshots = list(model.stream(classes=[3, 7], **EULER, seed=4))
    assert [(s.step, s.num_steps) for s in snapshots] == [(i, 3) for i in range(4)]
    np.testing.assert_allclose([s.time for s in snapshots], [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_array_equal(snapshots[-1].images, images)
    with monitor.CompileWatch() as compilations:
        others = [
            model.sample(classes=["5", 7], **EULER, seed=4),
            model.sample(classes=[3, 7], **{**EULER, "guidance": 6.0}, seed=4),
            model.sample(classes=[3, 7], **EULER, seed=np.int64(5), guidance_interval=[0.5, 1.0]),
            model.sample(classes=np.array([3, 7]), guidance=3.0, num_steps=7, sampler="sde", shift=2.0),
        ]
        *_, last = model.stream(classes=[1, 2], guidance=1.2, num_steps=5, sampler="euler")
        assert compilations.unexpected == 0
    for other in (*others, last.images):
        assert np.abs(other.astype(int) - images).max() > 2
    np.testing.assert_array_equal(others[0][1], images[1])  # the other class of the first changes nothing


def test_the_batch_size_changes_nothing(model):
    whole = model.sample(classes=[3, 7, 1], **EULER)
    parts = model.sample(classes=[3, 7, 1], **EULER, batch_size=2)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_velocity(model):
    network = model.denoiser.network
    x = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    t = jnp.asarray([0.1, 0.5, 0.9])
    labels = np.asarray([2, 4, 4], np.int32)
    expected = jax.jit(network.apply)(model.params, x, t, labels)[0]
    assert relative_error(model.velocity(x, t, [2, 4, 4]), expected) < 1e-6
    assert relative_error(model.velocity(np.asarray(x), t, labels)[1:], expected[1:]) < 1e-6
    everywhere = jax.jit(network.apply)(model.params, x, jnp.full(3, 0.5), np.full(3, 4, np.int32))[0]
    assert relative_error(model.velocity(x, 0.5, "4"), everywhere) < 1e-6

    clean = x + (1 - t[:, None, None, None]) * expected  # of a v-prediction on the straight path
    assert relative_error(model.denoise(x, t, [2, 4, 4]), clean) < 1e-6

    # Differentiable, also where a caller jits around it: against a central difference.
    direction = jax.random.normal(jax.random.key(2), x.shape)

    def energy(x):
        return jnp.mean(jnp.square(model.velocity(x, t, labels)))

    slope = jnp.vdot(jax.jit(jax.grad(energy))(x), direction)
    step = 1e-2
    difference = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    assert relative_error(slope, difference) < 2e-2


def test_invert(model):
    """Against fine steps of a fourth-order method in float64, and back again."""
    labels = [2, 6]
    images = model.sample(classes=labels, sampler="heun", guidance=1.0, num_steps=40, shift=1.0)
    noise, context = model.invert(images, labels, num_steps=40, shift=1.0)
    assert (noise.shape, noise.dtype, context.tolist()) == ((2, 16, 16, 3), np.float32, labels)

    def velocity(x, t):
        return np.asarray(model.velocity(x.astype(np.float32), t, labels), np.float64)

    x, steps = images.astype(np.float64) / 127.5 - 1, 40
    for i in range(steps, 0, -1):
        t, h = i / steps, -1 / steps
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert relative_error(noise, x) < 0.02
    again = model.sample(context=context, noise=noise, sampler="heun", guidance=1.0, num_steps=40, shift=1.0)
    assert np.abs(again.astype(int) - images).mean() < 1
    with pytest.raises(deco_jax.UserError, match="'sde' is stochastic and can't go backwards"):
        model.invert(images, labels, sampler="sde")


def test_another_guidance_rule(model):
    """A rule of one's own, without touching the package."""

    @jax.tree_util.register_dataclass
    class Swapped(Guidance):
        def combine(self, conditional, unconditional):
            return super().combine(unconditional, conditional)

    # An average of the run as the weaker model is taken from the settings: here it is the model itself.
    led = {**EULER, "guidance": Guidance(5.0), "guidance_average": "ema"}
    plain = model.sample(classes=[3], **{**EULER, "guidance": 1.0})
    assert np.abs(model.sample(classes=[3], **led).astype(int) - plain).max() <= 1
    swapped = model.sample(classes=[3], **{**EULER, "guidance": Swapped(2.0)}, guidance_interval=(0.0, 0.5))
    same = model.sample(classes=[3], **{**EULER, "guidance": Guidance(1.0 - 2.0, (0.0, 0.5))})
    assert np.abs(swapped.astype(int) - same).max() <= 1


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m.sample(), "this model draws classes; give classes=..."),
        (lambda m: m.sample(prompts="a cat"), "give classes=..., not prompts"),
        (lambda m: m.sample(classes=[1], context=np.array([1])), "not classes and context"),
        (lambda m: m.sample(classes=[]), "no classes are given"),
        (lambda m: m.sample(classes=[10]), "there is no class 10; choose one from 0 to 9"),
        (lambda m: m.sample(classes="cat"), "there is no class 'cat'"),
        (lambda m: m.sample(classes=1, negative_prompt="x"), "a negative prompt is for text-to-image"),
        (lambda m: m.sample(classes=1, num_steps=0), "num_steps=0 must be"),
        (lambda m: m.sample(classes=1, num_steps=2.5), "num_steps=2.5 must be of type int"),
        (lambda m: m.sample(classes=1, sampler="ddim"), "sampler='ddim' must be one of"),
        (lambda m: m.sample(classes=1, guidance=float("nan")), "guidance=nan"),
        (lambda m: m.sample(classes=1, guidance_interval=(1, 0)), "guidance_interval=(1, 0)"),
        (lambda m: m.sample(classes=1, shift=0), "shift=0"),
        (lambda m: m.sample(classes=1, seed=-1), "seed=-1"),
        (lambda m: m.sample(classes=1, size=16.0), "size=16.0 must be one side or (height, width)"),
        (lambda m: m.sample(classes=jnp.asarray([3, 11])), "there is no class 11; choose one from 0 to 9"),
        (lambda m: m.sample(classes=1, guidance=2.0, guidance_model="~/no such run"), "there is no checkpoint in /"),
        (lambda m: m.velocity(np.zeros((1, 16, 16, 3)), 0.5, np.asarray([11])), "other labels than 0 to 10 (no class)"),
        (lambda m: m.velocity(np.zeros((1, 16, 16, 3)), 0.5, np.asarray(["cat"])), "there is no class 'cat'"),
        (lambda m: m.sample(classes=1, size=18), "patch_size=4 does not divide the image, 18x18"),
        (lambda m: m.sample(classes=1, steps=3), "there is no setting 'steps'; choose from"),
        (lambda m: m.sample(classes=1, batch_size=-1), "batch_size=-1 must be at least 1"),
        (lambda m: m.sample(classes=1, noise=np.zeros((1, 8, 8, 3))), "the noise has shape (1, 8, 8, 3)"),
        (lambda m: m.sample(classes="²"), "there is no class '²'"),
        (lambda m: m.sample(classes=[None]), "there is no class None"),
        (lambda m: m.sample(context=np.array([11])), "other labels than 0 to 10 (no class)"),
        (lambda m: m.sample(context=np.array([0.5])), "other labels than 0 to 10"),
        (lambda m: m.sample(context=np.zeros((0,), int)), "the context has shape (0,); give labels [n]"),
        (lambda m: m.sample(context=np.zeros((1, 3, 3))), "the context has shape (1, 3, 3)"),
        (lambda m: m.sample(classes=1, guidance=Guidance(2.0), guidance_rule="zero_star"), "leave out guidance_rule"),
        (lambda m: m.sample(classes=1, guidance=Guidance(2.0), guidance_model="/none"), "there is no checkpoint in"),
        (lambda m: next(m.stream(classes=[11])), "there is no class 11"),
        (lambda m: m.velocity(np.zeros((1, 16, 16)), 0.5, 1), "states have shape (1, 16, 16)"),
        (lambda m: m.velocity(np.zeros((1, 18, 16, 3)), 0.5, 1), "with sides that 4 divides"),
        (lambda m: m.velocity(np.zeros((2, 16, 16, 3)), np.zeros(3), 1), "times have shape (3,)"),
        (lambda m: m.velocity(np.zeros((3, 16, 16, 3)), 0.5, [1, 2]), "2 conditions for 3 states"),
        (lambda m: m.invert(np.zeros((16, 16, 3)), 1), "images have shape (16, 16, 3)"),
    ],
)
def test_what_cannot_be(model, call, says):
    with pytest.raises(deco_jax.UserError) as error:
        call(model)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_of_labels(model):
    """As a user has them at hand; where guidance is written around `velocity`, also the label of no class."""
    settings = {**EULER, "num_steps": 1}
    images = model.sample(classes=[3, 7], **settings)
    for classes in (np.asarray([3, 7]), jnp.asarray([3, 7]), np.asarray(["3", "7"])):
        np.testing.assert_array_equal(model.sample(classes=classes, **settings), images)
    for one in (np.asarray(3), jnp.int32(3)):
        np.testing.assert_array_equal(model.sample(classes=one, **settings)[0], model.sample(classes=3, **settings)[0])
    state = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    conditional, null = (np.asarray(model.velocity(state, 0.0, np.asarray(c))) for c in ([3, 7], [10, 10]))
    drawn = model.sample(classes=[3, 7], noise=state, **{**settings, "guidance_interval": (-1.0, 1.0)})
    by_hand = np.clip(127.5 * (state + null + 2.0 * (conditional - null) + 1), 0, 255)
    assert np.abs(drawn - by_hand).max() <= 1


def test_settings_of_a_later_version_are_left_out(tmp_path):
    folder = random_checkpoint(tmp_path / "run", quickstart.get_config("smoke"))
    (place,) = folder.glob("checkpoints/*/config/metadata")
    values = json.loads(place.read_text())
    values["loss"]["edge_weight"] = 0.5
    place.write_text(json.dumps(values))
    assert deco_jax.load(folder).sample(classes=1, **EULER).shape == (1, 16, 16, 3)
    values["model"]["colour"] = 3
    place.write_text(json.dumps(values))
    with pytest.raises(deco_jax.UserError, match=r"has settings of the model deco .* model.colour; use the version"):
        deco_jax.load(folder)


def test_a_run_with_cudnns_attention_opens_on_any_machine(tmp_path):
    config = quickstart.get_config("smoke")
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    model = deco_jax.load(random_checkpoint(tmp_path / "run", config))
    assert model.sample(classes=1, **EULER).shape == (1, 16, 16, 3)


def test_text_to_image(tmp_path):
    model = deco_jax.load(random_checkpoint(tmp_path / "run", t2i_256.get_config("smoke")))
    settings = {**EULER, "guidance": 9.0, "size": (32, 16), "seed": 3}
    both = model.sample(prompts=["a cat", " a dog"], **settings)
    assert both.shape == (2, 32, 16, 3)
    np.testing.assert_array_equal(model.sample(prompts=["a cat", "a dog"], **settings), both)
    for changes in ({"prompts": ["a cat", "a hen"]}, {"prompts": ["a cat", "a dog"], "negative_prompt": "a cow"}):
        assert np.abs(model.sample(**settings, **changes)[1].astype(int) - both[1]).max() > 2
    with pytest.raises(deco_jax.UserError, match="negative_prompt has no effect where"):
        model.sample(prompts="a cat", negative_prompt="a cow", guidance_average="ema", **settings)
    v = model.velocity(np.zeros((2, 32, 16, 3)), 0.5, ["a cat", "a dog"])
    assert not np.array_equal(v[0], v[1])
    with pytest.raises(deco_jax.UserError, match=r"draws prompts; give prompts=\.\.\., not classes"):
        model.sample(classes=[1])
    with pytest.raises(deco_jax.UserError, match="a prompt is empty"):
        model.sample(prompts=["a cat", " "])


@pytest.mark.slow
def test_eight_devices(workdir, model, tmp_path):
    """Three images and states, which eight devices don't divide."""
    program = f"""
import numpy as np, jax, deco_jax
model = deco_jax.load({str(workdir)!r})
assert model.mesh.size == 8
x = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
images = model.sample(classes=[3, 7, 1], sampler="euler", shift=1.0, guidance=2.0, num_steps=3)
np.savez({str(tmp_path / "eight.npz")!r}, images=images, velocity=model.velocity(x, 0.3, [1, 2, 3]))
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env={**os.environ, **fake_devices(8)})
    with np.load(tmp_path / "eight.npz") as eight:
        assert np.abs(eight["images"].astype(int) - model.sample(classes=[3, 7, 1], **EULER)).max() <= 1
        x = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
        assert relative_error(eight["velocity"], model.velocity(x, 0.3, [1, 2, 3])) < 1e-5

"""Guidance by a weaker model through the command line: another average, another checkpoint; one device or eight."""

from __future__ import annotations

import numpy as np
import pytest

import deco_jax
from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.run import sharding
from deco_jax.sampling.weaker import load_other
from tests.helpers import fake_devices, run_main
from tests.runs import SMOKE, random_checkpoint, succeed

RULE = {"guidance": 2.5, "guidance_interval": (-1.0, 1.0), "guidance_rescale": 0.5, "guidance_rule": "zero_star"}
FLAGS = [f"--config.sample.{name}={value}" for name, value in RULE.items()]
AVERAGE = "--config.sample.guidance_average=short"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps whose grids are guided by its own shorter average, with the checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("weaker") / "run"
    rate = ("--config.optimizer.learning_rate=0.05", "--config.optimizer.warmup_steps=0")
    averages = ("--config.optimizer.averages=short=0.1", "--config.optimizer.ema_decay=0.5")
    succeed(SMOKE, f"--workdir={workdir}", *averages, *rate, *FLAGS, AVERAGE)
    assert (workdir / "samples" / "step_00000004.png").is_file()
    return workdir


def samples(workdir, *arguments, **options) -> np.ndarray:
    succeed(SMOKE, f"--workdir={workdir}", "--mode=sample", "--config.sample.npz=True", *FLAGS, *arguments, **options)
    with np.load(workdir / "samples" / "samples.npz") as file:
        return file["arr_0"].astype(int)


@pytest.mark.slow
def test_another_average(run):
    drawn = samples(run, AVERAGE)
    split = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    spread = samples(run, AVERAGE, *split, env=fake_devices(8))
    assert np.abs(spread - drawn).max() <= 1
    model = deco_jax.load(run)
    np.testing.assert_array_equal(model.sample(classes=range(10), **RULE, guidance_average="short"), drawn)
    assert np.abs(model.sample(classes=range(10), **RULE, guidance_average="") - drawn).max() > 2
    # The same average as the model's own leads nowhere: c + w(c − c), and a = 1.
    itself = model.sample(classes=range(10), **RULE | {"guidance_rule": "plain"}, guidance_average="ema")
    assert np.abs(itself.astype(int) - model.sample(classes=range(10), guidance=1.0)).max() <= 1


@pytest.mark.slow
def test_another_checkpoint(run):
    weaker = run / "checkpoints" / "2"
    model = deco_jax.load(run)
    drawn = model.sample(classes=range(10), **RULE, guidance_model=weaker, guidance_average="")
    np.testing.assert_array_equal(samples(run, f"--config.sample.guidance_model={weaker}"), drawn)
    other = model.sample(classes=range(10), **RULE, guidance_model=weaker, guidance_average="short")
    assert np.abs(other.astype(int) - drawn).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"guidance_average": "long"}, "choose from ema, short"),
        ({"guidance_model": "/nowhere"}, "no checkpoint in /nowhere"),
        ({"guidance_rule": "minus"}, "one of plain, zero_star"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
    ],
)
def test_what_can_t_be_is_one_line(run, settings, words):
    with pytest.raises(UserError, match=words):
        deco_jax.load(run).sample(classes=[1], **settings)


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"path.noise_scale": 2.0}, "path.noise_scale is 1.0 there and 2.0 here"),
        ({"path.name": "energy"}, "path.name is linear there and energy here"),
        ({"model.class_token": 8}, "model.class_token is 0 there and 8 here"),
    ],
)
def test_a_model_with_other_states(tmp_path, setting, words):
    run = random_checkpoint(tmp_path / "run", quickstart.get_config("smoke"))
    config = quickstart.get_config("smoke")
    config.sample.guidance_model = str(run)
    config.update_from_flattened_dict(setting)
    with pytest.raises(UserError, match=words):
        load_other(config, sharding.make_mesh(1, 1))


@pytest.mark.slow
def test_a_training_refuses_before_it_writes(tmp_path):
    result = run_main(SMOKE, f"--workdir={tmp_path / 'new'}", "--config.sample.guidance_average=long")
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "'long' is not an average" in result.stderr
    assert not (tmp_path / "new").exists()

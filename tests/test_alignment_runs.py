"""The configs of the ways to align: each trains, samples and resumes through the command line."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import lpips_files
from tests.runs import rows, steps, succeed
from tests.test_bad_input import refuse
from tests.test_failing_hosts import run_changed


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """VGG16's file by random weights, as the setting of a teacher."""
    setting = next(s for s in lpips_files(tmp_path_factory.mktemp("vgg")) if s.startswith("--config.lpips.vgg="))
    return setting.replace("config.lpips.vgg", "config.teacher.path")


def train_and_resume(config, workdir, *more):
    """Two steps with a grid of samples, then two more."""
    arguments = (f"--config=configs/{config}", f"--workdir={workdir}", *more)
    succeed(*arguments, "--config.train.num_steps=2")
    assert (workdir / "samples" / "step_00000002.png").exists()
    said = succeed(*arguments, "--config.train.sample_every=0").stdout
    assert "resumed at step 2" in said
    assert steps(workdir)[-1] == "4"
    found = rows(workdir)
    assert sorted(found) == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in found.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "cifar10.py:deco_repa-smoke",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "cifar10.py:dit_repa-smoke",
                "cifar10.py:jit_repa-smoke",
                "cifar10.py:no_frequency_repa-smoke",
                "irepa256.py:deco-smoke",
                "irepa256.py:jit-smoke",
                "irepa256.py:pixelrepa-smoke",
            )
        ),
    ],
)
def test_trains_samples_and_resumes(config, vgg, tmp_path):
    found = train_and_resume(config, tmp_path, vgg)
    assert all(0 < row["alignment"] < 2 for row in found.values())
    if config == "cifar10.py:deco_repa-smoke":
        says = "was trained with config.loss.repa_projector=mlp, but here it is conv, which its projector doesn't fit"
        refuse(f"--workdir={tmp_path}", "--config.loss.repa_projector=conv", "--config.train.num_steps=9", says=says)


NAMING = """
from deco_jax.programs import train
lower = train.lower_train_step
def naming(networks, optimizer, config, observe, mesh, state, batch, frozen, start):
    print("frozen:", *frozen, flush=True)
    return lower(networks, optimizer, config, observe, mesh, state, batch, frozen, start)
train.lower_train_step = naming
"""


@pytest.mark.slow
def test_an_alignment_that_ends(vgg, tmp_path):
    """Resumed where it ends or run through: the same weights; from then on there is no alignment."""
    found = train_and_resume("irepa256.py:haste-smoke", tmp_path / "resumed", vgg)
    assert ["alignment" in found[step] for step in range(1, 5)] == [True, True, False, False]
    done = run_changed(
        NAMING, "--config=configs/irepa256.py:haste-smoke", f"--workdir={tmp_path / 'whole'}", vgg,
        "--config.train.sample_every=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    with_teacher, without = [line.split() for line in said.splitlines() if line.startswith("frozen:")]
    assert set(with_teacher) - set(without) == {"teacher"}  # whose memory is free from then on
    assert said.count("compiling the training step") == 2
    assert "compiling the training step without alignment" in said
    whole = rows(tmp_path / "whole")
    for step in range(1, 5):
        assert whole[step]["loss"] == found[step]["loss"], step
    saved = [tmp_path / name / "checkpoints" / "4" / "params" for name in ("resumed", "whole")]
    with ocp.StandardCheckpointer() as reader:
        ours, theirs = map(reader.restore, saved)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_without_repa_starts_from_one_with_it(vgg, tmp_path):
    """The projector is left out, and the denoiser is the checkpoint's."""
    source = tmp_path / "aligned"
    one_step = ("--config.train.num_steps=1", "--config.train.sample_every=0")
    succeed("--config=configs/cifar10.py:deco_repa-smoke", f"--workdir={source}", vgg, *one_step)
    command = ["--config=configs/cifar10.py:deco-smoke", f"--workdir={tmp_path / 'plain'}", *one_step]
    command += [f"--config.init_from={source}", "--config.optimizer.learning_rate=1e-12"]
    refuse(*command, "--config.init_optimizer=True", says="its moments can't be; set config.init_optimizer=False")
    assert "has a REPA projector, which is left out" in succeed(*command).stdout
    with ocp.StandardCheckpointer() as reader:
        ours, theirs = (reader.restore(run / "checkpoints" / "1" / "params") for run in (tmp_path / "plain", source))
    assert (set(theirs), set(ours)) == ({"denoiser", "projector"}, {"denoiser"})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), ours["denoiser"], theirs["denoiser"])

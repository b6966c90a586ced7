"""Checkpoints: exact, atomic, tied to their model, readable in part."""

from __future__ import annotations

import gc
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from configs import quickstart, t2i_256
from deco_jax.errors import UserError
from deco_jax.method.optimizer import make_optimizer
from deco_jax.models import network as network_lib
from deco_jax.run import checkpoint, sharding
from deco_jax.run.best import Best
from deco_jax.run.state import create_state, state_shapes

# When one read of a damaged checkpoint fails, Orbax leaves its sibling reads unawaited.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine '.*_get_array_metadatas' was never awaited:RuntimeWarning")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Collects what Orbax left here, not in a later test."""
    yield
    gc.collect()


def make(**optimizer):
    config = quickstart.get_config("smoke")
    config.optimizer.update(optimizer)
    mesh = sharding.make_mesh(1, 1)
    networks = {"denoiser": network_lib.build(config.model.to_dict())}
    return config, networks, make_optimizer(config.optimizer), mesh


@pytest.fixture(scope="module")
def state():
    """A state in which no two leaves are alike, at step 5."""
    _, networks, optimizer, mesh = make()
    state = create_state(0, networks, optimizer, mesh)
    counter = iter(range(1000))

    def filled(leaf):
        if leaf.dtype != np.float32:
            return leaf + 5
        return jax.device_put(np.random.default_rng(next(counter)).normal(size=leaf.shape).astype(np.float32))

    return jax.tree.map(filled, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A workdir with the steps 3 and 5 of `state`."""
    workdir = tmp_path_factory.mktemp("saved")
    config, *_ = make()
    checkpoints = checkpoint.Checkpoints(workdir, keep=3)
    for step in (3, 5):
        checkpoints.save(step, state, config)
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir, **optimizer):
    config, networks, optimizer_, mesh = make(**optimizer)
    checkpoints = checkpoint.Checkpoints(workdir, keep=3)
    try:
        return checkpoints.restore(state_shapes(networks, optimizer_, mesh), config)
    finally:
        checkpoints.close()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Without and with what needs a state of its own in optax: a run may be resumed with other settings.
@pytest.mark.parametrize("optimizer", [{}, {"clip_norm": 1.0}, {"warmup_steps": 0}, {"weight_decay": 0.1}])
def test_restored_to_the_bit(saved, state, optimizer):
    assert_same(restore(saved, **optimizer), state)


def test_a_text_model_without_refine_blocks(tmp_path):
    """Has no array without an element, which no checkpoint could hold."""
    config = t2i_256.get_config("smoke")
    config.model.text_depth = 0
    mesh, optimizer = sharding.make_mesh(1, 1), make_optimizer(config.optimizer)
    networks = {"denoiser": network_lib.build(config.model.to_dict())}
    state = create_state(0, networks, optimizer, mesh)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(0, state, config)
    checkpoints.wait()
    assert_same(checkpoints.restore(state_shapes(networks, optimizer, mesh), config), state)
    checkpoints.close()
    model = config.model
    features = np.ones((1, model.text_length, model.text_width), np.float32)
    image = np.ones((1, 16, 16, 3), np.float32)
    output, _ = networks["denoiser"].apply(state["params"]["denoiser"], image, np.ones(1, np.float32), features)
    assert output.shape == image.shape


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_a_workdir_with_letters_of_patterns(tmp_path, state):
    folder = tmp_path / "[brackets]*?"
    config, *_ = make()
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    for step in (1, 2):
        checkpoints.save(step, state, config)
    checkpoints.wait()
    checkpoints.close()
    assert checkpoint.complete_steps(folder) == [2]
    assert_same(restore(folder), state)


def test_keeps_the_newest(tmp_path, state):
    config, *_ = make()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, state, config)
    checkpoints.save(10, state, config)  # again: nothing to do
    checkpoints.wait()
    assert checkpoints.steps() == checkpoint.complete_steps(tmp_path) == [2, 10]
    checkpoints.set_aside_after(2)
    assert checkpoints.steps() == checkpoint.complete_steps(tmp_path) == [2]
    checkpoints.save(10, state, config)  # as the run that goes on does
    checkpoints.wait()
    checkpoints.set_aside_after(2)
    checkpoints.close()
    assert checkpoint.complete_steps(tmp_path) == [2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10.damaged", "2"]
    assert restore(tmp_path) is not None


def test_milestones_are_kept_beside_the_newest(tmp_path, state):
    config, *_ = make()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(step, state, config)
    checkpoints.wait()
    checkpoints.close()
    assert checkpoint.complete_steps(tmp_path) == [4, 8, 10]


def test_the_best_is_kept_and_a_resumed_run_knows_it(tmp_path, state):
    """Beside the newest and milestones; scores come after their step is saved, and what isn't finite is none."""
    config, *_ = make()
    config.train.keep_best = "fid"
    scores = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 3.5, 6: 2.0, 7: 9.0, 8: 8.0}
    told = []
    for first, last in ((1, 5), (6, 8)):
        best = Best(config, ["fid", "kid"])
        best.read(tmp_path, first - 1)
        checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, keep_every=4, best=best)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            for step in range(first, last + 1):
                checkpoints.save(step, state, config)
                if best.add(step, {"fid": scores[step]}, {*checkpoints.steps(), step}):
                    told.append(step)
                value = scores[step] if np.isfinite(scores[step]) else None
                file.write(json.dumps({"step": step, "fid": value}) + "\n")
            file.write(json.dumps({"step": 100, "fid": 0.1}) + "\n" if last == 5 else "")  # done again
        checkpoints.wait()
        checkpoints.close()
        assert checkpoint.complete_steps(tmp_path) == ([2, 4, 5] if last == 5 else [4, 6, 8])
    assert told == [1, 2, 6]
    with pytest.raises(UserError, match=r"keep_best=fid is not measured during training: none is; set config.evaluate"):
        Best(config, [])
    config.train.keep_best = "precision"
    more = Best(config, ["precision"])
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.6)):
        more.add(step, {"precision": value}, [step])
    assert more.step([1, 2, 3]) == 2
    assert more.step([9]) is None


def test_scores_that_were_measured_otherwise_are_not_compared(tmp_path):
    """More samples give a lower FID. The best of before is kept as well."""
    config, *_ = make()
    config.train.keep_best = "fid"
    fids = {1: 9.0, 2: 7.0, 3: 8.0, 4: 5.0, 5: 6.0}
    lines = [json.dumps({"step": step, "fid": fid}) + "\n" for step, fid in fids.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    changes = [(1, "train.log_every"), (3, "evaluate.during_training_images"), (4, "train.save_every")]
    lines = [json.dumps({"step": step, "changed": {name: [1, 2]}}) + "\n" for step, name in changes]
    (tmp_path / "config_history.jsonl").write_text("".join(lines))

    def kept(changed, scores):
        best = Best(config, ["fid"])
        best.read(tmp_path, 5, changed)
        for step, fid in scores.items():
            best.add(step, {"fid": fid}, range(1, step + 1))
        steps = range(1, 8)
        found = best.should_preserve([types.SimpleNamespace(step=step) for step in steps], context=None)
        return [step for step, keep in zip(steps, found, strict=True) if keep]

    assert kept([], {6: 5.5, 7: 6.0}) == [2, 4]
    assert kept([], {6: 5.5, 7: 4.0}) == [2, 7]
    assert kept(["train.num_steps"], {}) == [2, 4]
    assert kept(["sample.guidance_interval"], {6: 99.0, 7: 88.0}) == [2, 4, 7]


def test_half_written_ones_are_passed_over_and_removed(workdir, state):
    """What a kill in the middle of a save leaves."""
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / "7.orbax-checkpoint-tmp")
    assert checkpoint.complete_steps(workdir) == [3, 5]
    assert checkpoint.find(workdir).name == "5"
    assert_same(restore(workdir), state)
    assert [path.name for path in sorted((workdir / "checkpoints").iterdir())] == ["3", "5"]


@pytest.mark.parametrize("item", ["counters", "params", "ema", "optimizer", "config"])
def test_damage_anywhere_leads_to_the_one_before(workdir, state, item, caplog):
    broken = 0
    for file in (workdir / "checkpoints" / "5" / item).rglob("*"):
        if file.is_file() and (file.parent.name == "d" or item == "config"):
            file.write_bytes(b"")
            broken += 1
    assert broken
    with caplog.at_level("ERROR"):
        assert_same(restore(workdir), state)
    assert f"{workdir}/checkpoints/5 is damaged and passed over" in caplog.text
    shutil.rmtree(workdir / "checkpoints" / "3" / "params")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"):
        restore(workdir)


@pytest.mark.parametrize("item", ["params", "ema", "optimizer"])
def test_one_changed_byte_is_found(workdir, state, item, caplog):
    """In the middle of an array's bytes, which Orbax reads as other weights or an unreadable chunk."""
    path = workdir / "checkpoints" / "5"
    largest = max((path / item).rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level("ERROR"):
        assert_same(restore(workdir), state)
    assert f"5 is damaged and passed over: its file {largest.relative_to(path)} isn't what was written" in caplog.text
    config, networks, _, mesh = make()
    if item == "ema":
        with pytest.raises(UserError, match=r"can't be read: its file ema/.* isn't what was written"):
            checkpoint.load_average(path, networks["denoiser"].shapes, config, mesh)
    else:  # what isn't read is not looked at
        checkpoint.load_average(path, networks["denoiser"].shapes, config, mesh)


def test_checkpoints_without_checksums_are_read(workdir, state):
    """Those of the first versions, and of a run that was killed between the two."""
    for step in ("3", "5"):
        (workdir / "checkpoints" / step / "checksums.json").unlink()
    assert_same(restore(workdir), state)


def test_a_lost_optimizer_state_is_not_made_up(workdir, state, caplog):
    """The one before goes on; where there is none, the weights alone are offered, and nothing trains."""
    path = workdir / "checkpoints" / "5"
    (path / "checksums.json").unlink()
    shutil.rmtree(path / "optimizer")
    with caplog.at_level("ERROR"):
        assert_same(restore(workdir), state)
    assert "5 is damaged and passed over: its optimizer state is missing" in caplog.text
    shutil.rmtree(workdir / "checkpoints" / "3")
    with pytest.raises(UserError, match=rf"another --workdir to start again, with --config\.init_from={path}"):
        restore(workdir)


def test_another_teacher(saved):
    """Its features are of another width, which is no damage."""
    config, *_ = make()
    path = saved / "checkpoints" / "5"
    checkpoint.check_projector(path, config)
    config.teacher.size = "L"
    checkpoint.check_projector(path, config)  # without REPA it is not read
    stored = checkpoint.load_config(path)
    stored["loss"]["repa_weight"] = config.loss.repa_weight = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.folder, "load_config", lambda _: stored)
        with pytest.raises(UserError, match=r"teacher.size=B, but here it is L, which its projector"):
            checkpoint.check_projector(path, config)
        config.teacher.size = "B"
        config.loss.repa_mask = 0.2
        with pytest.raises(UserError, match=r"mask=0.0, but here it is 0.2; .* only has a vector for hidden tokens"):
            checkpoint.check_projector(path, config)


def test_another_model(saved):
    config, networks, optimizer, mesh = make()
    config.model.depth = 3
    path = checkpoint.find(saved)
    for attempt in (
        lambda: checkpoint.check_model(path, config),
        lambda: checkpoint.find(saved, config=config),
        lambda: checkpoint.load_average(path, networks["denoiser"].shapes, config, mesh),
        lambda: checkpoint.Checkpoints(saved, 3).restore(state_shapes(networks, optimizer, mesh), config),
    ):
        with pytest.raises(UserError, match=r"another model \(depth: 2 there, 3 here\)"):
            attempt()
    # How it is computed is no part of the model.
    config.model.depth, config.model.remat, config.model.dtype = 2, "full", "bfloat16"
    checkpoint.check_model(path, config)


def test_sampling_reads_the_average_alone(workdir, state):
    config, networks, _, mesh = make()
    path = checkpoint.find(workdir)
    for item in ("params", "optimizer", "counters"):
        shutil.rmtree(path / item)
    assert_same(checkpoint.load_average(path, networks["denoiser"].shapes, config, mesh), state["averages"]["ema"])
    with pytest.raises(UserError, match=r"can't be read: .*; choose another"):
        checkpoint.load_params(path, {"denoiser": networks["denoiser"].shapes}, config, mesh)


def test_names_of_a_checkpoint(saved, tmp_path, monkeypatch):
    """A workdir, its folder of checkpoints or one of them; relative ones too."""
    newest = saved / "checkpoints" / "5"
    for named in (saved, saved / "checkpoints", newest):
        assert checkpoint.find(tmp_path, str(named)) == newest
    assert checkpoint.find(tmp_path, str(saved / "checkpoints" / "3")).name == "3"
    monkeypatch.chdir(saved.parent)
    assert checkpoint.find(saved.name) == newest
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"there is no checkpoint in .*; train first"):
            checkpoint.find(str(missing))


def test_config_inside(saved):
    config, *_ = make()
    stored = checkpoint.load_config(checkpoint.find(saved))
    assert stored["model"] == config.model.to_dict()
    assert stored["optimizer"]["learning_rate"] == config.optimizer.learning_rate

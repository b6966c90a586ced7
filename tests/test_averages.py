"""Averages of the weights by name: how they decay, train, are stored, and are chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from deco_jax.errors import UserError
from deco_jax.method import training
from deco_jax.method.averages import parse_averages, update_average
from deco_jax.method.optimizer import make_optimizer
from deco_jax.run import checkpoint, sharding
from deco_jax.run.state import create_state, state_shapes
from tests.helpers import run_main
from tests.runs import NO_SAMPLES, SMOKE, succeed


@pytest.mark.parametrize(
    "name, entry, batch",
    [("ema", "", 64), ("short", "short=0.9", 64), ("k1", "k1=1.5kimg", 64), ("k2", "k2=0.1kimg", 8)],
)
def test_decays(name, entry, batch):
    """500 updates of one number against float64."""
    average = parse_averages(0.99, entry)[name]
    values = np.random.default_rng(0).normal(size=500)
    ours, expected = jnp.float32(2.0), 2.0
    for i, value in enumerate(values):
        ours = update_average(ours, jnp.float32(value), average.decay(jnp.float32((i + 1) * batch), batch))
        kept = reference_decay(entry, (i + 1) * batch, batch)
        expected = kept * expected + (1 - kept) * value
    assert float(ours) == pytest.approx(expected, rel=1e-4)


def reference_decay(entry: str, images: int, batch: int) -> float:
    if entry.endswith("kimg"):
        kimg = float(entry.partition("=")[2].removesuffix("kimg"))
        return 0.5 ** (batch / min(1000 * kimg, 0.05 * images))
    return {"": 0.99, "short=0.9": 0.9}[entry]


@pytest.mark.parametrize(
    "entry, said",
    [
        ("short", "'short' is not an average; write a name of small letters and a value, such as short=0.9996"),
        ("short=1.5", "not an average"),
        ("short=fast", "such as short=0.9996 or k500=500kimg"),
        ("short=kimg", "not an average"),
        ("short=0kimg", "not an average"),
        ("Bad Name=0.9", "not an average"),
        ("a=0.9,a=0.8", "names 'a' twice"),
        ("ema=0.5", "set the decay of that one by config.optimizer.ema_decay"),
    ],
)
def test_what_is_no_average(entry, said):
    with pytest.raises(UserError, match=said):
        parse_averages(0.999, entry)


def test_each_is_trained_stored_and_restored(tmp_path):
    """Sharded like the parameters; from a checkpoint without it, a new one starts as "ema"."""
    config = quickstart.get_config("smoke")
    config.optimizer.averages = "short=0.5,still=1"
    config.optimizer.ema_decay, config.optimizer.warmup_steps = 0.9, 0
    mesh = sharding.make_mesh(1, 1)
    networks, observe, _ = training.abstract_networks(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    names = ("ema", "short", "still")
    state = create_state(0, networks, optimizer, mesh, names)
    first = jax.tree.map(np.asarray, state["params"]["denoiser"])
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8),
        "label": draw.integers(0, 10, 16, dtype=np.int32),
    }
    step = training.lower_train_step(
        networks, optimizer, config, observe, mesh, state, sharding.place_batch(mesh, batch), {}
    ).compile()
    expected = {name: first for name in names}
    for _ in range(3):
        state, _ = step(state, sharding.place_batch(mesh, batch), {})
        params = jax.tree.map(np.asarray, state["params"]["denoiser"])
        for name, kept in {"ema": 0.9, "short": 0.5, "still": 1.0}.items():
            expected[name] = jax.tree.map(lambda a, p, k=kept: k * a + (1 - k) * p, expected[name], params)
    for name in names:
        for ours, theirs in zip(jax.tree.leaves(state["averages"][name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=name)

    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    checkpoints.save(3, state, config)
    checkpoints.wait()
    path = checkpoint.find(str(tmp_path))
    assert checkpoint.average_names(path) == ["ema", "short", "still"]
    restored = checkpoints.restore(state_shapes(networks, optimizer, mesh, names), config)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    changed = checkpoints.restore(state_shapes(networks, optimizer, mesh, ("ema", "new")), config)
    checkpoints.close()
    assert changed["averages"].keys() == {"ema", "new"}
    jax.tree.map(np.testing.assert_array_equal, changed["averages"]["new"], state["averages"]["ema"])
    config.sample.average = "short"
    shapes = networks["denoiser"].shapes
    loaded = checkpoint.load_average(path, shapes, config, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, state["averages"]["short"])
    config.sample.average = "new"
    with pytest.raises(UserError, match=r"has no average 'new' of the weights; choose .* from ema, short, still"):
        checkpoint.load_average(path, shapes, config, mesh)


def test_through_the_command_line(tmp_path):
    """Train with a second average, resume to the bit, draw from either; an unknown one is one line."""
    command = [SMOKE, NO_SAMPLES, "--config.optimizer.averages=short=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*command, f"--workdir={whole}")
    succeed(*command, f"--workdir={parts}", "--config.train.num_steps=2")
    succeed(*command, f"--workdir={parts}")
    drawn = {}
    for workdir in (whole, parts):
        for name in ("ema", "short"):
            succeed(
                *command, f"--workdir={workdir}", "--mode=sample", f"--config.sample.average={name}",
                "--config.sample.npz=True",
            )  # fmt: skip
            with np.load(workdir / "samples" / "samples.npz") as file:
                drawn[workdir, name] = file["arr_0"]
    np.testing.assert_array_equal(drawn[whole, "short"], drawn[parts, "short"])
    np.testing.assert_array_equal(drawn[whole, "ema"], drawn[parts, "ema"])
    assert not np.array_equal(drawn[whole, "short"], drawn[whole, "ema"])

    failed = run_main(*command, f"--workdir={whole}", "--mode=sample", "--config.sample.average=k500")
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].endswith("choose --config.sample.average from ema, short")
    assert "Traceback" not in failed.stderr
    failed = run_main(SMOKE, f"--workdir={tmp_path / 'none'}", "--config.sample.average=k500")
    assert failed.returncode == 1
    assert "is not an average that this run keeps" in failed.stderr
    assert not (tmp_path / "none").exists()

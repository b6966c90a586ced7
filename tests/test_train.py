"""The training step against formulas in float64, and what a step may never do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import quickstart
from deco_jax.method import training
from deco_jax.method.averages import update_average
from deco_jax.method.objective import make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.step import Draws, Observed
from deco_jax.models.network import Network
from deco_jax.run import monitor, sharding
from deco_jax.run.state import create_state
from tests.helpers import relative_error


def small_config(**optimizer) -> ml_collections.ConfigDict:
    config = quickstart.get_config("smoke")
    config.optimizer.update(optimizer)
    return config


def random_batch(size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "image": draw.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        "label": draw.integers(0, 10, size, dtype=np.int32),
    }


class Run:
    """Everything of a training run but its loop."""

    def __init__(self, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation | None = None):
        self.mesh = sharding.make_mesh(1, 1)
        self.networks, self.observe, _ = training.abstract_networks(config, self.mesh)
        self.optimizer = optimizer or make_optimizer(config.optimizer)
        self.state = create_state(config.seed, self.networks, self.optimizer, self.mesh)
        self.batch = sharding.place_batch(self.mesh, random_batch(config.data.batch_size))
        self.compiled = training.lower_train_step(
            self.networks, self.optimizer, config, self.observe, self.mesh, self.state, self.batch, {}
        ).compile()

    def step(self) -> dict[str, jax.Array]:
        self.state, metrics = self.compiled(self.state, self.batch, {})
        return metrics


@pytest.fixture(scope="module")
def run():
    """One compilation for the tests that need no setting of their own."""
    with jax.default_matmul_precision("highest"):
        return Run(small_config(warmup_steps=0, ema_decay=0.9, learning_rate=1e-3))


def on_host(tree):
    return jax.tree.map(np.array, tree)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------------- the step


def test_state_after_steps(run):
    """The step counter, the EMA of each step's weights, donation, no compilation, nothing moved from or to hosts."""
    params, average = on_host(run.state["params"]["denoiser"]), on_host(run.state["averages"]["ema"])
    assert_equal_trees(params, average)
    first = int(run.state["step"])
    before = run.state
    run.step()  # what JAX prepares at a first call
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for _ in range(3):
        average = jax.tree.map(
            lambda a, p: 0.9 * a.astype(np.float64) + 0.1 * p, average, on_host(run.state["params"]["denoiser"])
        )
        with jax.transfer_guard("disallow"), monitor.CompileWatch() as compilations:
            metrics = jax.block_until_ready(run.step())
        assert compilations.unexpected == 0
    average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, on_host(run.state["params"]["denoiser"]))
    assert int(run.state["step"]) == first + 4
    assert int(metrics["skipped"]) == 0
    assert_close_trees(run.state["averages"]["ema"], average, 1e-6)
    assert (
        relative_error(params["blocks"]["attention"]["qkv"]["kernel"], average["blocks"]["attention"]["qkv"]["kernel"])
        > 1e-4
    )


def assert_close_trees(a, b, bound: float):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert relative_error(x, y) < bound, (path, relative_error(x, y))


def test_a_step_that_is_not_finite_changes_nothing(run):
    run.step()
    bias = run.state["params"]["denoiser"]["patch_embed"]["bias"]
    good = on_host(bias)
    run.state["params"]["denoiser"]["patch_embed"]["bias"] = jnp.full_like(bias, jnp.nan, device=bias.sharding)
    before = on_host(run.state)
    for count in (1, 2):
        metrics = run.step()
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(run.state["skipped"]) == count
    after = on_host(run.state)
    for name in ("params", "averages", "opt_state"):
        assert_equal_trees(after[name], before[name])
    assert after["step"] == before["step"] + 2

    run.state["params"]["denoiser"]["patch_embed"]["bias"] = jax.device_put(good, bias.sharding)
    assert np.isfinite(run.step()["loss"])
    assert int(run.state["skipped"]) == 0


def test_loss_goes_down_on_one_batch():
    run = Run(small_config(warmup_steps=0, learning_rate=2e-3))
    losses = [float(run.step()["loss"]) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:20])


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradient_is_the_whole_batch_s(parts):
    """With plain gradient descent at rate 1, the change of the weights is the gradient."""
    chance = np.random.default_rng(1)
    noise = None

    def gradient(accumulate: int):
        nonlocal noise
        run = Run(small_config(accumulate_steps=accumulate), optax.sgd(1.0))
        # Away from the start, where zeroed modulations keep most gradients at zero.
        noise = noise or jax.tree.map(lambda p: chance.normal(0, 0.2, p.shape).astype(p.dtype), run.state["params"])
        run.state["params"] = jax.tree.map(lambda p, n: jax.device_put(p + n, p.sharding), run.state["params"], noise)
        before = on_host(run.state["params"])
        metrics = run.step()
        return jax.tree.map(lambda old, new: old - new, before, on_host(run.state["params"])), metrics

    whole, expected = gradient(1)
    summed, metrics = gradient(parts)
    # Weights of size 1 keep 1e-7 of their change.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), summed, whole)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(whole))
    for name in ("loss", "pixel", "frequency", "gradient_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(whole)))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)


# ---------------------------------------------------------------------------------------- what is drawn


def test_draws():
    """Of the asked shapes and rates, reproducible, and new with each key."""
    config = small_config()
    config.loss.label_dropout = 0.2
    method = make_method(config)
    draws = method.draw(jax.random.key(1), (20_000, 2, 2, 3))
    dropped = np.asarray(draws.dropped)
    assert dropped.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 20_000))
    noise = np.asarray(draws.noise, np.float64)
    assert noise.shape == (20_000, 2, 2, 3)
    assert noise.mean() == pytest.approx(0, abs=4 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(1, abs=4 / np.sqrt(2 * noise.size))
    times = np.asarray(draws.times, np.float64)
    logits = np.log(times / (1 - times))
    assert logits.mean() == pytest.approx(0, abs=0.03)
    assert logits.std() == pytest.approx(1, abs=0.03)
    # Independent of each other.
    assert abs(np.corrcoef(dropped, times)[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, 0, 0, 0], times)[0, 1]) < 0.03

    again = method.draw(jax.random.key(1), (20_000, 2, 2, 3))
    assert_equal_trees(tuple(draws[:3]), tuple(again[:3]))
    assert jnp.array_equal(draws.keys, again.keys)
    other = method.draw(jax.random.key(2), (20_000, 2, 2, 3))
    assert not np.array_equal(draws.times, other.times)
    for rate in (0.0, 1.0):
        config.loss.label_dropout = rate
        assert np.asarray(make_method(config).draw(jax.random.key(1), (100, 2, 2, 3)).dropped).mean() == rate


def test_dropped_labels_become_the_null_class():
    """The denoiser sees the class after the last one; images become x_t at their own times."""
    config = small_config()
    seen = {}

    def apply(params, x_t, times, labels, aligned_layer, keys):
        seen.update(x_t=x_t, times=times, labels=labels)
        return jnp.zeros_like(x_t), {}

    batch = random_batch(4)
    draws = Draws(
        noise=jax.random.normal(jax.random.key(0), (4, 16, 16, 3)),
        times=jnp.asarray([0.1, 0.4, 0.6, 0.9]),
        dropped=jnp.asarray([True, False, True, False]),
    )
    network = Network(lambda key: {}, apply, {})
    known = Observed(batch["label"], jnp.int32(10))
    loss, parts = make_method(config).objective(
        {"denoiser": {}}, batch["image"], draws, known, networks={"denoiser": network}
    )
    np.testing.assert_array_equal(seen["labels"], [10, batch["label"][1], 10, batch["label"][3]])
    x, noise = batch["image"] / 127.5 - 1, np.asarray(draws.noise, np.float64)
    t = np.asarray([0.1, 0.4, 0.6, 0.9])[:, None, None, None]
    np.testing.assert_allclose(seen["x_t"], t * x + (1 - t) * noise, atol=1e-6)
    assert float(parts["pixel"]) == pytest.approx(np.mean((x - noise) ** 2), rel=1e-5)
    assert float(loss) == pytest.approx(float(parts["pixel"] + parts["frequency"]), rel=1e-6)


def test_each_step_draws_anew(run):
    """The same weights and batch give another loss at another step, and the same at the same."""
    step = jax.jit(
        lambda state: training.make_train_step(run.networks, run.optimizer, small_config(), run.observe)(
            state, run.batch, {}
        )[1]
    )
    losses = [float(step({**run.state, "step": jnp.int32(i)})["loss"]) for i in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


# ---------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("decay, clip, warmup", [(0.0, 0.0, 0), (0.1, 0.5, 3), (0.0, 1e6, 1)])
def test_adamw_in_float64(decay, clip, warmup):
    settings = small_config(learning_rate=0.01, weight_decay=decay, clip_norm=clip, warmup_steps=warmup).optimizer
    draw = np.random.default_rng(0)
    params = {"a": draw.normal(size=(5, 3)), "b": draw.normal(size=7)}
    optimizer = make_optimizer(settings)
    ours = jax.tree.map(jnp.float32, params)
    state = optimizer.init(ours)
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for step in range(1, 8):
        grads = {k: draw.normal(size=p.shape) for k, p in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        scale = min(1, clip / norm) if clip else 1
        rate = 0.01 * min(1, step / warmup) if warmup else 0.01
        for k, g in grads.items():
            m[k] = 0.9 * m[k] + 0.1 * scale * g
            v[k] = 0.999 * v[k] + 0.001 * (scale * g) ** 2
            direction = (m[k] / (1 - 0.9**step)) / (np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8)
            params[k] = params[k] - rate * (direction + decay * params[k])
            assert relative_error(ours[k], params[k]) < 2e-6


def test_adamw_is_torch_s():
    torch = pytest.importorskip("torch")
    settings = small_config(learning_rate=0.01, weight_decay=0.05, warmup_steps=0).optimizer
    draw = np.random.default_rng(1)
    start = draw.normal(size=(4, 6)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.05)
    optimizer, ours = make_optimizer(settings), jnp.asarray(start)
    state = optimizer.init(ours)
    for _ in range(5):
        grad = draw.normal(size=(4, 6)).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        reference.step()
        updates, state = optimizer.update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
        assert relative_error(ours, theirs.detach().numpy()) < 1e-6


def test_average_of_the_first_value_never_fades_by_itself():
    """1,000 steps at the paper's rate against the closed form."""
    average, params = jnp.float32(1.0), jnp.float32(3.0)
    for _ in range(1000):
        average = update_average(average, params, 0.9999)
    assert float(average) == pytest.approx(3 - 2 * 0.9999**1000, rel=1e-4)

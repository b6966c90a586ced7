"""The pseudo-Huber loss, against its formula in float64, and in a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deco_jax.method.losses.pixel import flow_matching_loss
from deco_jax.method.losses.pseudo_huber import pseudo_huber
from tests.helpers import relative_error
from tests.runs import NO_SAMPLES, SMOKE, rows, succeed

fast = pytest.mark.fast


@fast
@pytest.mark.parametrize("scale", [5e-4, 0.03, 1.0])
def test_the_formula(scale):
    """Of errors from 1e-5 to 1e2, where the plain difference of float32 numbers would be rounding alone."""
    error = np.random.default_rng(0).normal(size=(8, 6, 5, 3)) * np.logspace(-5, 2, 8)[:, None, None, None]
    error = error.astype(np.float32)
    square = (error.astype(np.float64) ** 2).mean(axis=(1, 2, 3))
    loss = jax.jit(lambda e: pseudo_huber(flow_matching_loss(e), scale))(error)
    np.testing.assert_allclose(loss, np.sqrt(square + scale**2) - scale, rtol=1e-5)


@fast
def test_it_is_song_and_dhariwals_by_the_root_of_the_size():
    error = np.random.default_rng(1).normal(size=(4, 6, 5, 3)).astype(np.float32)
    size, c = 6 * 5 * 3, 0.00054 * np.sqrt(6 * 5 * 3)
    theirs = np.sqrt((error.astype(np.float64) ** 2).sum(axis=(1, 2, 3)) + c**2) - c
    assert relative_error(pseudo_huber(flow_matching_loss(error), 0.00054), theirs / np.sqrt(size)) < 1e-6


@fast
def test_its_gradient():
    """Finite at 0, and by finite differences elsewhere."""

    def loss(error):
        return pseudo_huber(flow_matching_loss(error), 0.03)[0]

    assert not np.any(jax.grad(loss)(jnp.zeros((1, 2, 2, 3))))
    error = np.random.default_rng(2).normal(size=(1, 2, 2, 3)).astype(np.float32)
    gradient, step = np.asarray(jax.grad(loss)(error)), np.zeros_like(error)
    step[0, 1, 0, 2] = 1e-2
    slope = (loss(error + step) - loss(error - step)) / 2e-2
    assert slope == pytest.approx(gradient[0, 1, 0, 2], rel=1e-2)


def test_in_a_run(tmp_path):
    """A term of its own in the sum, which the terms in metrics.jsonl add up to."""
    command = [SMOKE, NO_SAMPLES, f"--workdir={tmp_path}", "--config.train.num_steps=2", "--config.train.log_every=2"]
    succeed(*command, "--config.loss.pseudo_huber_weight=0.5", "--config.loss.pseudo_huber_scale=0.1")
    row = rows(tmp_path)[2]
    assert row["pseudo_huber"] > 0
    assert row["loss"] == pytest.approx(row["pixel"] + row["frequency"] + 0.5 * row["pseudo_huber"], rel=1e-5)

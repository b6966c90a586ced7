"""Schedules by hand, clipping by stages, and Muon on stacked blocks against optax on each block by itself."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import quickstart
from deco_jax import config as config_lib
from deco_jax.config import default_config
from deco_jax.errors import UserError
from deco_jax.method import optimizer


def section(**settings) -> ml_collections.ConfigDict:
    config = default_config().optimizer
    config.update(settings)
    return config


def rates(steps: list[int], **settings) -> list[float]:
    rate = optimizer.learning_rate(section(learning_rate=1.0, **settings))
    return [float(rate(step)) for step in steps]


def test_schedules_by_hand():
    assert rates([0, 10**6]) == [1.0, 1.0]
    assert rates([0, 1, 3, 4], warmup_steps=4) == [0.25, 0.5, 1.0, 1.0]
    falls = {"decay_start": 10, "decay_end": 20, "final_learning_rate": 0.2}
    np.testing.assert_allclose(rates([5, 10, 15, 20, 99], schedule="linear", **falls), [1, 1, 0.6, 0.2, 0.2], rtol=1e-6)
    cosine = [0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2 for done in (0, 0.3, 1)]
    np.testing.assert_allclose(rates([10, 13, 20], schedule="cosine", **falls), cosine, rtol=1e-6)
    np.testing.assert_allclose(rates([4, 5, 8, 9], stages="5:0.1, 9:0.01:0.5"), [1, 0.1, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize("stages", ["5", "5:x", "9:0.1,5:0.1", "5:0.1:0.5:1"])
def test_stages_that_cannot_be_read(stages):
    with pytest.raises(UserError, match="is not a stage; write STEP:LEARNING_RATE"):
        optimizer.parse_stages(stages)


@pytest.mark.parametrize("start, end", [(0, 0), (1000, 500)])
def test_a_decay_that_ends_before_it_begins_is_refused(start, end):
    config = quickstart.get_config("smoke")
    config.optimizer.update({"decay_start": start, "decay_end": end})
    config_lib.check(config)
    config.optimizer.schedule = "cosine"
    with pytest.raises(UserError, match=rf"decay_start={start} to decay_end={end}, which must be later"):
        config_lib.check(config)


def test_clipping_by_stage_is_optax_s_with_each_norm():
    """Steps 0 and 1 are clipped to 2, those from 2 on to 0.5; the state is that of a run without stages."""
    params, gradient = {"w": jnp.zeros(3)}, {"w": jnp.asarray([0.0, 3.0, 4.0])}
    staged = optimizer.make_optimizer(section(clip_norm=2.0, stages="2:1e-4:0.5", eps=1.0))
    plain = optimizer.make_optimizer(section(eps=1.0))
    state, expected = staged.init(params), plain.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for norm in (2.0, 2.0, 0.5, 0.5):
        update, state = staged.update(gradient, state, params)
        clipped = {"w": gradient["w"] * norm / 5}
        by_hand, expected = plain.update(clipped, expected, params)
        np.testing.assert_allclose(update["w"], by_hand["w"], rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_counted(name):
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    made = optimizer.make_optimizer(section(name=name))
    state = made.init(params)
    for number in range(3):
        assert int(optimizer.updates_done(state)) == number
        _, state = made.update(params, state, params)


def test_a_stage_without_clipping():
    params, gradient = {"w": jnp.zeros(3)}, {"w": jnp.asarray([0.0, 3.0, 4.0])}
    staged = optimizer.make_optimizer(section(clip_norm=2.0, stages="1:1e-4:0", eps=1.0))
    plain = optimizer.make_optimizer(section(eps=1.0, stages="1:1e-4"))
    state, expected = staged.init(params), plain.init(params)
    for norm in (2.0, 5.0):
        update, state = staged.update(gradient, state, params)
        by_hand, expected = plain.update({"w": gradient["w"] * norm / 5}, expected, params)
        np.testing.assert_allclose(update["w"], by_hand["w"], rtol=1e-5)


def test_muon_orthogonalises_lora_s_factors():
    params = {"blocks": {"qkv": {"a": jnp.ones((3, 6, 2)), "b": jnp.ones((3, 2, 4))}, "bias": jnp.ones((3, 4))}}
    found = optimizer.matrices(params)["blocks"]
    assert found["qkv"]["a"] == found["qkv"]["b"] == optax.contrib.MuonDimensionNumbers(1, 2)
    assert found["bias"] is None


def test_muon_takes_each_block_of_a_stack_by_itself():
    """Against optax's own Muon on unstacked matrices; vectors and embeddings go with AdamW."""
    keys = iter(jax.random.split(jax.random.key(0), 12))
    params = {
        "blocks": {"kernel": jax.random.normal(next(keys), (3, 6, 4)), "bias": jnp.ones((3, 4))},
        "label_embed": {"embedding": jax.random.normal(next(keys), (5, 4))},
    }
    settings = section(name="muon", learning_rate=1e-2, b2=0.95, weight_decay=0.1)
    ours = optimizer.make_optimizer(settings)
    state = ours.init(params)
    alone = [optax.contrib.muon(1e-2, weight_decay=0.1) for _ in range(3)]
    alone_states = [each.init(params["blocks"]["kernel"][i]) for i, each in enumerate(alone)]
    adamw = optax.adamw(1e-2, b2=0.95, weight_decay=0.1, nesterov=True)
    rest = {"bias": params["blocks"]["bias"], "embedding": params["label_embed"]["embedding"]}
    rest_state = adamw.init(rest)
    for _ in range(3):
        gradient = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
        update, state = ours.update(gradient, state, params)
        for i, each in enumerate(alone):
            matrix, alone_states[i] = each.update(
                gradient["blocks"]["kernel"][i], alone_states[i], params["blocks"]["kernel"][i]
            )
            np.testing.assert_allclose(update["blocks"]["kernel"][i], matrix, rtol=1e-4, atol=1e-6)
        both = {"bias": gradient["blocks"]["bias"], "embedding": gradient["label_embed"]["embedding"]}
        expected, rest_state = adamw.update(both, rest_state, rest)
        np.testing.assert_allclose(update["blocks"]["bias"], expected["bias"], rtol=1e-5)
        np.testing.assert_allclose(update["label_embed"]["embedding"], expected["embedding"], rtol=1e-5)

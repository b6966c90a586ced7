"""An image depends on the seed, its index and its class alone, and is what a plain loop would draw."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from deco_jax.conditioning.requests import Requests, class_requests, even_labels
from deco_jax.method.predictions import make_prediction
from deco_jax.models import network as network_lib
from deco_jax.run import sharding
from deco_jax.sampling import generate


@pytest.fixture(scope="module")
def setup():
    config = quickstart.get_config("smoke")
    config.sample.sampler, config.sample.num_steps, config.sample.shift = "euler", 4, 1.0
    config.sample.guidance = 2.0
    config.sample.guidance_interval = (0.3, 1.0)
    network = network_lib.build(config.model.to_dict())
    params = network.init(jax.random.key(0))
    # Away from the start, where the output is zero for every label.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    params["label_embed"]["embedding"] *= 20
    mesh = sharding.make_mesh(1, 1)
    return config, network, params, mesh


def class_labels(count, num_classes):
    return even_labels(count, range(num_classes))


def draw(setup, labels, batch_size, start=0, **settings):
    config, network, params, mesh = setup
    changed = config.copy_and_resolve_references()
    changed.sample.update(settings)
    generator = generate.make_generator(network, changed, mesh)
    requests = Requests(len(labels), labels.__getitem__, np.int32(10))
    batches = list(generate.generate_images(generator, params, requests, batch_size, mesh, start))
    assert all(batch.dtype == np.uint8 and len(batch) <= batch_size for batch in batches)
    return np.concatenate(batches)


@pytest.mark.parametrize(
    "count, classes, expected",
    [(6, 3, [0, 0, 1, 1, 2, 2]), (4, 10, [0, 2, 5, 7]), (5, 2, [0, 0, 0, 1, 1]), (3, 1, [0, 0, 0]), (2, 0, [0, 0])],
)
def test_labels_in_class_order(count, classes, expected):
    labels = class_labels(count, classes)
    assert labels.dtype == np.int32
    assert labels.tolist() == expected


def test_a_grid_of_many_images_shows_all_classes():
    few = class_requests(even_labels(10_000, range(10)), 10).spread(100)
    assert few.context(np.arange(few.count)).tolist() == class_labels(100, 10).tolist()
    named = Requests(7, np.arange(7).__getitem__, np.int32(0), list("abcdefg")).spread(3)
    assert (named.names, named.context(np.arange(3)).tolist()) == (["a", "c", "e"], [0, 2, 4])


def test_fifty_thousand_labels_are_balanced():
    np.testing.assert_array_equal(np.bincount(class_labels(50_000, 1000)), np.full(1000, 50))


def test_batches_and_starting_point_change_nothing(setup):
    labels = class_labels(10, 10)
    whole = draw(setup, labels, 10)
    assert whole.shape == (10, 16, 16, 3)
    assert len(np.unique(whole.reshape(10, -1), axis=0)) == 10
    # Another size is another compilation, which may round to the next level; a last batch is filled up.
    for batch_size, start in [(4, 0), (4, 3), (100, 0)]:
        images = draw(setup, labels, batch_size, start)
        assert images.shape == (10 - start, 16, 16, 3)
        assert np.abs(images.astype(int) - whole[start:]).max() <= 1


def test_seed_class_and_guidance_matter(setup):
    labels = class_labels(10, 10)
    whole = draw(setup, labels, 10).astype(int)
    for changed in (
        draw(setup, labels, 10, seed=1),
        draw(setup, labels[::-1].copy(), 10),
        draw(setup, labels, 10, guidance=1.0),
        draw(setup, labels, 10, guidance_interval=(0.0, 1.0)),
        draw(setup, labels, 10, shift=2.0),
    ):
        assert np.abs(changed - whole).max() > 2


def test_against_a_plain_loop(setup):
    """Euler in float64 around the network, guided where lo < t ≤ hi, with the noise of each index."""
    config, network, params, _ = setup
    labels = np.asarray([3, 7], np.int32)
    noise = [
        jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0), (16, 16, 3)) for i in (0, 1)
    ]
    x = np.asarray(jnp.stack(noise), np.float64)
    apply = jax.jit(lambda x, t, y: network.apply(params, x, t, y)[0])
    for t in (0.0, 0.25, 0.5, 0.75):
        times = jnp.full(2, t)
        conditional = np.asarray(apply(jnp.float32(x), times, labels), np.float64)
        velocity = conditional
        if 0.3 < t <= 1.0:
            null = np.asarray(apply(jnp.float32(x), times, np.full(2, 10, np.int32)), np.float64)
            velocity = null + config.sample.guidance * (conditional - null)
        x = x + 0.25 * velocity
    expected = np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    drawn = draw(setup, labels, 2)
    assert np.mean((expected > 0) & (expected < 255)) > 0.2  # not all clipped
    assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("sampler, evaluations", [("euler", 4), ("heun", 7), ("sde", 4)])
def test_looking_on_changes_nothing(setup, sampler, evaluations):
    config, network, params, mesh = setup
    settings = config.sample.copy_and_resolve_references()
    settings.sampler, settings.seed = sampler, 3
    labels = np.asarray([1, 7], np.int32)
    requests = Requests(2, labels.__getitem__, np.int32(10))
    watcher = generate.Watcher(network, make_prediction(config), mesh)
    looks = list(watcher(params, requests, settings, (16, 16)))
    assert [look.done for look in looks] == list(range(evaluations + 1))
    assert {look.total for look in looks} == {evaluations}
    pictures = [look.images for look in looks if look.images is not None]
    assert len(pictures) == 5  # the noise, then a state a step
    at_once = draw(setup, labels, 2, sampler=sampler, seed=3)
    # Compiled in another way, a value may round to the neighbour.
    assert np.abs(pictures[-1].astype(int) - at_once.astype(int)).max() <= 1
    for a, b in itertools.pairwise(pictures):
        assert (a != b).any()

    compiled = watcher._evaluate._cache_size()
    settings.seed, settings.guidance, settings.num_steps, settings.shift = 4, 1.5, 7, 2.0
    assert len(list(watcher(params, requests, settings, (16, 16)))) == 1 + (13 if sampler == "heun" else 7)
    assert watcher._evaluate._cache_size() == compiled

"""An image depends on the seed, its index and its class alone, and is what a plain loop would draw."""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from deco_jax.conditioning.requests import Requests, class_requests, even_labels
from deco_jax.models import network as network_lib
from deco_jax.run import monitor, sharding
from deco_jax.sampling import generate
from deco_jax.sampling.guidance import Functions, Guidance, Weaker
from deco_jax.sampling.settings import Sampling
from deco_jax.sampling.weaker import Guide


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
    return config, network, params, generate.Generator(generate.make_denoiser(config), sharding.make_mesh(1, 1))


def class_labels(count, num_classes):
    return even_labels(count, range(num_classes))


def draw(setup, labels, batch_size, start=0, **settings):
    config, _, params, generator = setup
    changed = config.copy_and_resolve_references()
    changed.sample.update(settings)
    requests = Requests(len(labels), labels.__getitem__, np.int32(10))
    batches = list(generator.images(params, requests, Sampling.of(changed), batch_size, start))
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


@pytest.mark.parametrize("sampler", ["euler", "heun", "heun_reuse", "adams3", "sde"])
def test_looking_on_changes_nothing(setup, sampler):
    """The states on the way end in the images that are drawn at once."""
    config, _, params, generator = setup
    settings = config.copy_and_resolve_references()
    settings.sample.sampler, settings.sample.seed = sampler, 3
    sampling = Sampling.of(settings)
    labels = np.asarray([1, 7], np.int32)
    batch = {"index": jnp.arange(2), "context": jnp.asarray(labels)}
    states = [np.asarray(state) for state in generator.states(params, batch, np.int32(10), sampling)]
    assert len(states) == len(sampling.times) == 5  # the noise, then a state a step
    at_once = draw(setup, labels, 2, sampler=sampler, seed=3)
    np.testing.assert_array_equal(generator.on_host(jnp.asarray(states[-1])), at_once)
    for a, b in itertools.pairwise(states):
        assert (a != b).any()


def test_settings_are_data_of_one_program(setup):
    """Other classes, steps, times, guidance, interval and seed, and a sampler of as many velocities: no compilation."""
    generator = generate.Generator(setup[3].denoiser, sharding.make_mesh(1, 1))
    fresh = (*setup[:3], generator)
    labels = np.asarray([1, 7, 2], np.int32)
    draw(fresh, labels, 3, sampler="euler", guidance=2.0)
    with monitor.CompileWatch() as compilations:
        for settings in (
            {"sampler": "euler", "guidance": 3.5},
            {"sampler": "euler", "guidance": 3, "guidance_interval": (0.2, 0.6)},
            {"sampler": "sde", "num_steps": 9, "shift": 2.0, "seed": 2**40},
        ):
            draw(fresh, labels[::-1].copy(), 3, **settings)
        assert compilations.unexpected == 0
        draw(fresh, labels, 2, sampler="euler")
        assert compilations.unexpected > 0  # another batch size is another program


def test_without_guidance_nothing_is_doubled(setup):
    """In the compiled program: no array of twice the rows, unless guidance asks for it; nor with a weaker model."""
    config, _, params, generator = setup
    changed = config.copy_and_resolve_references()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    batch = {"index": jax.ShapeDtypeStruct((5,), np.int32), "context": jax.ShapeDtypeStruct((5,), np.int32)}

    def doubled(**settings) -> bool:
        changed.sample.update(settings)
        sampling = Guide(changed.sample, generator.denoiser, None)(Sampling.of(changed), lambda name: shapes)
        compiled = generator.lower(shapes, batch, np.int32(10), sampling).compile()
        # Of 5 images: twice their 16 tokens, or twice their 256 pixels.
        return re.search(r"f32\[(160|2560),", compiled.as_text()) is not None

    assert doubled(guidance=2.0, guidance_interval=(0.1, 1.0))
    assert not doubled(guidance=1.0)
    assert not doubled(guidance=2.0, guidance_interval=(1.0, 1.0))
    assert not doubled(guidance_interval=(0.1, 1.0), guidance_average="ema")


def test_guided_by_itself_is_unguided(setup):
    """c + w(c − c) = c: the weaker model has the same weights."""
    labels, sample = np.asarray([1, 7], np.int32), Sampling.of(setup[0])
    generator, params = setup[3], setup[2]
    weaker = Weaker(Functions(generator.denoiser.velocity, generator.denoiser.network.whole), params)
    batch = {"index": jnp.arange(2), "context": jnp.asarray(labels)}

    def pictures(rule):
        return np.asarray(generator.draw(params, batch, np.int32(10), dataclasses.replace(sample, guidance=rule)))

    guided = pictures(Guidance(3.0, (0.0, 1.0), weaker=weaker))
    assert np.abs(guided.astype(int) - pictures(Guidance(1.0))).max() <= 1
    assert np.abs(guided.astype(int) - pictures(Guidance(3.0, (0.0, 1.0)))).max() > 2

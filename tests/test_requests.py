"""What is to be drawn: classes by number and by name, their noise, their order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deco_jax.conditioning.classes import Classes
from deco_jax.conditioning.requests import class_requests, data_requests, even_labels, find_classes, images_per_class
from deco_jax.config import default_config
from deco_jax.errors import UserError

pytestmark = pytest.mark.fast

NAMES = ["cat", "Dog", "2", "grey wolf, timber wolf"]


@pytest.mark.parametrize(
    "chosen, labels",
    [
        (0, [0]),
        ([0, 3, 0], [0, 3, 0]),
        (np.array([1, 0]), [1, 0]),
        ("cat", [0]),
        ("dog, 3,1", [1, 3, 1]),
        ("2", [2]),  # a name goes before a number
        (["grey wolf, timber wolf", 1], [3, 1]),
        ([], []),
    ],
)
def test_classes_by_number_and_name(chosen, labels):
    assert find_classes(chosen, 4, NAMES) == labels


@pytest.mark.parametrize(
    "chosen, says",
    [
        ("4", "there is no class 4; choose one from 0 to 3"),
        ([-1], "there is no class -1; choose one from 0 to 3"),
        ("cta", "there is no class 'cta'; did you mean 'cat'?"),
        ([1.5], "there is no class 1.5"),
        ("cat,,x", "there is no class 'x'"),
        ([True], "there is no class True"),
    ],
)
def test_classes_that_are_not_there(chosen, says):
    with pytest.raises(UserError) as error:
        find_classes(chosen, 4, NAMES)
    assert says in str(error.value)


def test_names_that_are_not_known():
    assert find_classes("3, 1", 4) == [3, 1]
    with pytest.raises(UserError, match=r"there is no class 'cat' \(this run's class names are not known\)"):
        find_classes("cat", 4)


def test_classes_without_a_name_are_refused():
    """Not class 0, as where a script's variables are empty: --config.sample.classes="$A,$B"."""
    config = default_config()
    config.sample.classes = ","
    with pytest.raises(UserError, match="names no class; leave it out to draw all"):
        data_requests(config.sample, Classes(4, NAMES), 4)


def test_same_noise_for_every_class():
    requests = class_requests([5, 5, 7, 7, 9, 9], 10, same_noise=True)
    assert requests.batch(0, 6)["index"].tolist() == [0, 1, 0, 1, 0, 1]
    assert requests.batch(4, 4)["index"].tolist() == [0, 1, 1, 1]  # filled up with the last
    own = class_requests([5, 5, 7, 7, 9, 9], 10).batch(2, 3)
    assert (own["index"].tolist(), own["context"].tolist()) == ([2, 3, 4], [7, 7, 9])
    assert own["index"].dtype == np.int32


def test_some_of_the_requests_keep_what_they_start_from():
    chosen = class_requests([5, 5, 5, 5, 7, 7, 7, 7], 10, same_noise=True).spread(4).batch(0, 4)
    assert (chosen["index"].tolist(), chosen["context"].tolist()) == ([0, 1, 0, 1], [5, 5, 7, 7])
    states = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1)
    started = dataclasses.replace(class_requests([5] * 8, 10), start=states).spread(2).batch(0, 2)
    assert started["start"].ravel().tolist() == [0, 4]


@pytest.mark.parametrize(
    "labels, each",
    [([0, 0, 4, 4], 2), ([4, 0], 1), ([1, 2, 1, 2], None), ([1, 1, 2], None), ([], None), ([3, 3, 3], 3)],
)
def test_images_per_class(labels, each):
    assert images_per_class(np.asarray(labels, np.int32)) == each


def test_even_labels_of_chosen_classes():
    assert even_labels(5, [207, 360]).tolist() == [207, 207, 207, 360, 360]

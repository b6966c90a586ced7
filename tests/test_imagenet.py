"""ImageNet's class names: facts that a reader can check."""

from __future__ import annotations

import pytest

from deco_jax.data import imagenet

pytestmark = pytest.mark.fast


def test_the_names_stand_in_the_order_of_the_labels():
    names = imagenet.class_names()
    assert len(names) == len(set(names)) == 1000
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 360: "otter", 817: "sports car", 999: "toilet tissue"}
    assert {label: names[label] for label in known} == known


def test_only_wordnet_numbers_are_replaced():
    names = ["n01440764", "cats", "n02099601", "n00000000"]
    assert imagenet.readable(names) == ["tench", "cats", "golden retriever", "n00000000"]
    assert list(imagenet._names()) == sorted(imagenet._names())  # folders sort as the labels do

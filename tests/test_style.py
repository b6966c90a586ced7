"""What tells curves apart."""

from __future__ import annotations

import itertools

import pytest

from deco_jax.report import style

pytestmark = pytest.mark.fast


def test_neighbouring_curves_differ_in_colour_and_in_dash():
    curves = [style.curve(i, markers=True) for i in range(8)]
    for one, next_one in itertools.pairwise(curves):
        assert all(one[key] != next_one[key] for key in ("color", "linestyle", "marker"))
    assert len({str(curve) for curve in curves}) == 8


@pytest.mark.parametrize(
    "names, short",
    [
        (["variant=deco-cpu_seed=0", "variant=dit-cpu_seed=0"], ["deco-cpu", "dit-cpu"]),
        (["learning_rate=1e-4_seed=0", "learning_rate=1e-4_seed=1"], ["0", "1"]),
        (["variant=no_frequency_seed=0", "variant=dit_seed=0"], ["no_frequency", "dit"]),
        (
            ["variant=deco-cpu_lpips_weight=0.1_seed=0", "variant=deco-cpu_seed=0", "variant=dit-cpu_seed=0"],
            ["deco-cpu, lpips_weight=0.1", "deco-cpu", "dit-cpu"],
        ),
        (["run"], ["run"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_labels_are_the_values_that_differ(names, short):
    assert style.in_words(names) == short

"""How curves are told apart in pictures: by colour, dash and marker, on white."""

from __future__ import annotations

import re
from typing import Any

from deco_jax.config.sections import SECTIONS

# Okabe and Ito's palette, whose colours people with any kind of colour vision tell apart; its yellow is too faint.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"

# Between two settings of a name: names of settings and values have underscores too, so only known names divide it.
_KEYS = {key.rpartition(".")[2] for section in SECTIONS.values() for key in section}
_BETWEEN = re.compile(rf"_(?=(?:variant|{'|'.join(sorted(_KEYS, key=len, reverse=True))})=)")


def curve(i: int, markers: bool = False) -> dict[str, Any]:
    """Return matplotlib's options for the i-th curve of a picture."""
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
    return style | ({"marker": MARKERS[i % len(MARKERS)], "markersize": 5} if markers else {})


def in_words(names: list[str]) -> list[str]:
    """Shorten the names of a sweep's runs, such as "variant=deco-cpu_seed=0", to the values in which they differ.

    A setting that not all of the runs give stands with its name: "deco-cpu, lpips_weight=0.1".
    """
    parts = [dict(part.split("=", 1) for part in _BETWEEN.split(name) if "=" in part) for name in names]
    keys = list(dict.fromkeys(key for part in parts for key in part))
    differing = [key for key in keys if len({part.get(key) for part in parts}) > 1]
    everywhere = {key for key in differing if all(key in part for part in parts)}
    short = [
        ", ".join(part[key] if key in everywhere else f"{key}={part[key]}" for key in differing if key in part)
        for part in parts
    ]
    return short if all(short) and len(set(short)) == len(names) else names

"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that `name` may be a misspelling of; none if none is close.

    The last part of a dotted name is compared; in another section it has to be closer. If several sections have a
    setting of exactly that name, all of them are returned, unless the name's own section has a setting that contains it
    as a word. Otherwise the best match is returned.
    """
    names = list(names)
    section, _, last = name.rpartition(".")
    best, best_score = "", 0.0
    for candidate in names:
        their_section, _, their_last = candidate.rpartition(".")
        alike = _ratio(last, their_last)
        sections_alike = 1.0 if section == their_section else _ratio(section, their_section)
        score = alike + 0.2 * sections_alike
        if alike >= 0.85 - 0.25 * sections_alike and score > best_score:
            best, best_score = candidate, score
    exact = [candidate for candidate in names if candidate.rpartition(".")[2] == last]
    if exact and (best not in exact or _ratio(section, best.rpartition(".")[0]) < 0.7):
        # "sample.steps" may mean evaluate.steps, or be short for sample.num_steps.
        longer = [c for c in names if c.rpartition(".")[0] == section and last in c.rpartition(".")[2].split("_")]
        return [max(longer, key=lambda c: _ratio(name, c))] if longer else exact
    return [best] if best else []


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def suggestion(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean A or B?", or "" if nothing is close."""
    close = [f"{prefix}{candidate}" for candidate in nearest(name, names)]
    return f"did you mean {' or '.join(close)}?" if close else ""

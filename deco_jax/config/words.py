"""What was probably meant by a name that isn't there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.7  # of difflib's ratio: a letter or two off


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that `name` is a misspelling of, or "".

    Dotted names are near where the whole is, or where their last parts are: "model.batch_size" is "data.batch_size" in
    the wrong section.
    """
    names = list(names)
    whole = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if whole:
        return whole[0]
    section, _, last = name.rpartition(".")
    best, best_score = "", 0.0
    for candidate in names:
        their_section, _, their_last = candidate.rpartition(".")
        score = difflib.SequenceMatcher(None, last, their_last).ratio()
        if score < NEAR:
            continue
        score += 0.1 * difflib.SequenceMatcher(None, section, their_section).ratio()  # decides between equals
        if score > best_score:
            best, best_score = candidate, score
    return best

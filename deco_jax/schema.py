"""Declares settings: a frozen dataclass for each section, each field with a default, a rule and a line of help.

    @dataclasses.dataclass(frozen=True)
    class FrequencySettings:
        frequency_weight: float = setting(1.0, "Weight of the frequency-aware loss; 0 turns it off.", at_least(0))

`deco_jax.config` turns such classes into ConfigDicts, checks, `--help` and docs/settings.md. A model or a loss declares
its own settings in its own file. This module imports nothing from the package, so every file can use it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_INT32 = 2**31 - 1


class Rule(NamedTuple):
    """A condition on a value, as a test and in words."""

    test: Callable[[Any], bool]
    words: str


def at_least(low: float, most: float | None = None) -> Rule:
    """Allow finite numbers from `low` on, up to `most` if it is given."""
    return Rule(
        lambda value: math.isfinite(value) and value >= low and (most is None or value <= most),
        f"at least {low}{_and_most(most)}",
    )


def above(low: float, most: float | None = None) -> Rule:
    """Allow finite numbers above `low`, up to `most` if it is given."""
    return Rule(
        lambda value: math.isfinite(value) and value > low and (most is None or value <= most),
        f"above {low}{_and_most(most)}",
    )


def between(low: float, high: float) -> Rule:
    """Allow numbers from `low` to `high`, both included."""
    return Rule(lambda value: low <= value <= high, f"from {low} to {high}")


def one_of(*names: str) -> Rule:
    """Allow only these words."""
    return Rule(lambda value: value in names, f"one of {', '.join(names)}")


ANYTHING = Rule(lambda value: True, "")


def _and_most(most: float | None) -> str:
    return "" if most is None else f" and at most {most:,}"


class Setting(NamedTuple):
    """A field of a section."""

    kinds: tuple[type, ...]  # the types that a value may have
    default: Any
    help: str
    rule: Rule
    computed: bool  # for a model's setting: it only says how the model is computed and doesn't affect its parameters
    was: str  # its dotted name in earlier versions; "": the same
    convert: Callable[[Any], Any]  # converts a value stored under that earlier name


def setting(
    default: Any,
    help: str,
    rule: Rule = ANYTHING,
    *,
    computed: bool = False,
    was: str = "",
    convert: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Declare a field of a section.

    Saved configs of older versions get the default, too. A new setting of a model must therefore default to what the
    model did before it had the setting.

    Args:
        default: also determines the type of the values.
        help: one or two sentences, shown by --help and in docs/settings.md.
        rule: which values are allowed.
        computed: see `Setting`; such settings may differ between a checkpoint and the config that reads it.
        was: an earlier dotted name, such as "optimizer.ema_decay", which still works and prints a notice.
        convert: converts a value of the earlier setting.
    """
    details = {"help": help, "rule": rule, "computed": computed, "was": was, "convert": convert}
    return dataclasses.field(default=default, metadata=details)


def settings(section: type) -> dict[str, Setting]:
    """Return the settings that a section's dataclass declares, by name."""
    hints = typing.get_type_hints(section)
    return {
        field.name: Setting(_kinds(hints[field.name]), field.default, **field.metadata)
        for field in dataclasses.fields(section)
    }


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the types that isinstance accepts for an annotation; integers count as floats, too."""
    if isinstance(hint, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    kind = typing.get_origin(hint) or hint
    return (int, float) if kind is float else (kind,)


def wrong(name: str, value: Any, declared: Setting) -> str:
    """Return what is wrong with a value, in one line that starts with its name; "" if nothing is."""
    kinds, rule = declared.kinds, declared.rule
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        return f"{name}={value!r} must be of type {expected}" + (f", {rule.words}" if rule.words else "")
    try:
        allowed = rule.test(value)
    except (TypeError, OverflowError):  # an element of a pair; a number beyond float64
        allowed = False
    return "" if allowed else f"{name}={value!r} must be {rule.words}"

"""Checks of the annotated shapes at every call, for jaxtyping's import hook in conftest.py."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

# The modules whose annotations are checked: mathematics and networks.
CHECKED = ("deco_jax.images", "deco_jax.method", "deco_jax.models", "deco_jax.resize", "deco_jax.sampling")


def check(function: Callable) -> Callable:
    """Check the arrays among a function's arguments and results; other annotations are mypy's work.

    Annotations are resolved at the first call: they may name what the module defines further down.
    """

    @functools.cache
    def checked() -> Callable:
        hints = typing.get_type_hints(function)
        function.__annotations__ = {name: hint if has_shape(hint) else Any for name, hint in hints.items()}
        return beartype(function)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return checked()(*arguments, **options)

    return call


def has_shape(hint: Any) -> bool:
    """Return whether an annotation is a jaxtyping one, or a union or tuple with such parts."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, typing.get_args(hint)))

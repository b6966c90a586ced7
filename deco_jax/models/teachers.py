"""The frozen encoders whose features a denoiser is aligned with, by name.

All of them see the clean images and have a feature vector for each of the denoiser's tokens: an image is resized so
that the encoder's grid is the denoiser's. A new one is a file beside this one with `make` and the FrozenNetwork that it
returns, and a line in `TEACHERS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from deco_jax.errors import UserError
from deco_jax.models import dinov2, dinov3, siglip2, vgg
from deco_jax.models.network import FrozenNetwork


class Teacher(NamedTuple):
    """An encoder for a denoiser.

    network: images [batch, height, width, 3], uint8 or in [0, 1], to float32 `View`.
    width: channels of its features.
    """

    network: FrozenNetwork
    width: int


class Kind(NamedTuple):
    """A family of encoders.

    sizes: the names that config.teacher.size may have.
    width: (size) → channels of the features.
    make: (size, path of the weights, dtype, patch size of the denoiser) → the network.
    """

    sizes: tuple[str, ...]
    width: Callable[[str], int]
    make: Callable[[str, str, str, int], FrozenNetwork]


TEACHERS: dict[str, Kind] = {
    "dinov2": Kind(tuple(dinov2.SIZES), lambda size: dinov2.sizes(size)[0], dinov2.teacher),
    "dinov2_reg": Kind(
        tuple(dinov2.SIZES),
        lambda size: dinov2.sizes(size)[0],
        functools.partial(dinov2.teacher, registers=dinov2.REGISTERS),
    ),
    "dinov3": Kind(tuple(dinov3.SIZES), lambda size: dinov3.SIZES[size].width, dinov3.teacher),
    "siglip2": Kind(tuple(siglip2.SIZES), lambda size: siglip2.SIZES[size].width, siglip2.teacher),
    "vgg": Kind(tuple(vgg.TAPS), lambda tap: vgg.TAPS[tap], vgg.teacher),
}
SIZES = tuple(dict.fromkeys(size for kind in TEACHERS.values() for size in kind.sizes))


def make_teacher(config: Any) -> Teacher:
    """Build the teacher of config.teacher for the tokens of config.model.

    Raises:
        UserError: it has no such size.
    """
    teacher = config.teacher
    width, kind = features_width(teacher.name, teacher.size), TEACHERS[teacher.name]
    return Teacher(kind.make(teacher.size, teacher.path, teacher.dtype, config.model.patch_size), width)


def features_width(name: str, size: str) -> int:
    """Look up the channels of a teacher's features.

    Raises:
        UserError: there is no such teacher, or it has no such size.
    """
    if name not in TEACHERS:
        raise UserError(f"config.teacher.name={name!r} is not a teacher; choose one of {', '.join(TEACHERS)}")
    sizes = TEACHERS[name].sizes
    if size not in sizes:
        raise UserError(f"config.teacher.size={size!r} is not a size of {name}; choose one of {', '.join(sizes)}")
    return TEACHERS[name].width(size)

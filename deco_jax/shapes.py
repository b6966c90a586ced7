"""Named array shapes: annotations that the tests check at every call.

An axis that two arguments of a function share has the same length in both. Mathematical functions accept NumPy and JAX
arrays, and return JAX arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

if TYPE_CHECKING:
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray

Images = Float[AnyArray, "batch height width 3"]
Maps = Shaped[AnyArray, "batch height width channels"]  # images, uint8 or float, or feature maps
Pixels = UInt8[AnyArray, "*batch height width 3"]
PerExample = Float[AnyArray, " batch"]
Times = Float[AnyArray, "#batch"] | Float[AnyArray, ""]  # one for each example, or one for all
Tokens = Float[AnyArray, "batch tokens features"]
Features = Float[AnyArray, "batch _ _"]  # [batch, tokens, features], for functions that compare shapes themselves
Hidden = Float[AnyArray, "batch tokens width"]
Patches = Shaped[AnyArray, "batch tokens pixels channels"]
Heads = Float[AnyArray, "batch tokens heads head_width"]
Angles = Float[AnyArray, "tokens pairs"]
Labels = Int[AnyArray, " batch"]
Text = Float[AnyArray, "batch length text_width"]
Tiles = Float[AnyArray, "batch rows columns block block channels_out"]
FrequencyWeights = Float[AnyArray, "3 8 8"]
State = Float[AnyArray, "batch *state"]  # what samplers integrate: images, usually
Grid = Float[np.ndarray, " times"]  # sampling times, float64, one more than there are steps
Scalar = Float[AnyArray, ""] | float
Basis = Float[AnyArray, "values rank"]  # of patches, columns orthonormal
Gram = Float[np.ndarray, "values values"]
Vectors = Float[np.ndarray, "values rank"]
GridPositions = Float[np.ndarray, "tokens width"]
GridAngles = Float[np.ndarray, "tokens pairs"]
Guided = Bool[np.ndarray, " _"]  # a sampler's steps
Halves = Float[AnyArray, "2 batch *state"]
Picture = Shaped[np.ndarray, "_ _ channels"]
AnyBytes = UInt8[AnyArray, "*shape"]
AnyFloats = Float[AnyArray, "*shape"]
Sheet = Shaped[np.ndarray, "height width channels"]  # one picture, such as a grid of others
Pictures = Shaped[np.ndarray, "count height_each width_each channels"]

"""The shapes of arrays, by name: annotations that the tests check at every call.

An axis that two arguments of a function share has the same length in both. Functions of the mathematics take NumPy
arrays as well as JAX's, and return JAX's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

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
Features = Float[AnyArray, "batch _ _"]  # [batch, tokens, features] that a function compares with others itself
Patches = Shaped[AnyArray, "batch tokens pixels channels"]
Heads = Float[AnyArray, "batch tokens heads head_width"]
Angles = Float[AnyArray, "tokens pairs"]
Labels = Int[AnyArray, " batch"]
Text = Float[AnyArray, "batch length text_width"]
Tiles = Float[AnyArray, "batch rows columns block block channels_out"]
FrequencyWeights = Float[AnyArray, "3 8 8"]

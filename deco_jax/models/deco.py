"""DeCo: a transformer for the low frequencies, a pixel decoder for the high ones.

Source: DeCo (arXiv 2511.19365).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from deco_jax.convert.mapping import VECTOR, Row
from deco_jax.models.architecture import Architecture
from deco_jax.models.decoder import POSITION_FEATURES, PixelDecoder
from deco_jax.models.official_names import linear_rows, trunk_rows
from deco_jax.models.trunk import RULES, Trunk, TrunkSettings, trunk_flops
from deco_jax.schema import MAX_INT32, at_least, one_of, setting
from deco_jax.shapes import Images


@dataclasses.dataclass(frozen=True)
class DeCoSettings(TrunkSettings):
    """The settings of DeCo."""

    decoder_width: int = setting(32, "Channels of the pixel decoder.", at_least(1, 4096))
    decoder_depth: int = setting(3, "Blocks of the pixel decoder.", at_least(1, 256))
    decoder_patch_size: int = setting(1, "Side of the decoder's tokens, in pixels; the paper uses 1.", at_least(1, 512))
    decoder_interaction: str = setting(
        "adaln", "How the transformer's condition enters the decoder.", one_of("adaln", "add")
    )
    decoder_chunk: int = setting(
        0,
        "Tokens that the decoder computes at a time; 0: all at once, on TPUs by our own kernel. On a CPU a few "
        "thousand are fastest.",
        at_least(0, MAX_INT32),
        computed=True,
    )


class DeCo(Trunk):
    """Frequency-decoupled pixel diffusion.

    Args:
        decoder_width, decoder_depth: of the pixel decoder.
        decoder_patch_size: pixels a side that the decoder treats as one token (1 in the paper's model).
        decoder_interaction: how the decoder takes the condition, "adaln" or "add".
        decoder_chunk: queries the decoder works on at a time; see `decoder.PixelDecoder`.
        trunk: see `trunk.Trunk`.
    """

    def __init__(
        self,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_patch_size: int = 1,
        decoder_interaction: str = "adaln",
        decoder_chunk: int = 0,
        rngs: nnx.Rngs,
        **trunk: Any,
    ) -> None:
        super().__init__(**trunk, rngs=rngs)
        options: dict[str, Any] = {
            "width": decoder_width,
            "depth": decoder_depth,
            "patch_size": self.patch_size,
            "query_size": decoder_patch_size,
            "interaction": decoder_interaction,
            "chunk": decoder_chunk,
            "rotary": self.with_text,
            "dtype": self.dtype,
            "remat": self.remat,
            "forward_mode": self.mean_velocity,
        }
        self.decoder = PixelDecoder(self.width, **options, rngs=rngs)
        if self.mean_velocity:
            self.velocity_decoder = PixelDecoder(self.width, **options, rngs=rngs)

    def head(
        self, images: Images, h: jax.Array, time: jax.Array, condition: jax.Array, second: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        features = jax.nn.silu(time[:, None] + h)
        decoder = self.velocity_decoder if second else self.decoder
        return decoder(images, features), features


def flops(model: Mapping[str, Any], height: int, width: int) -> dict[str, float]:
    """Count the multiply-adds of a forward pass on one image, by part."""
    patch, inner, query = model["patch_size"], model["decoder_width"], model["decoder_patch_size"]
    queries, values = height * width // query**2, 3 * query**2
    modulation = 3 * inner**2 if model["decoder_interaction"] == "adaln" else 0
    return trunk_flops(model, height, width) | {
        "condition": height * width // patch**2 * model["width"] * (patch // query) ** 2 * inner,
        "pixel_embed": queries * ((values + POSITION_FEATURES) * inner + inner**2),
        "pixel_blocks": queries * model["decoder_depth"] * (modulation + 2 * inner**2),
        "pixel_output": queries * inner * values,
    }


def table(model: Mapping[str, Any]) -> list[Row]:
    """Return the rows of DeCo's official checkpoints."""
    block, many = "dec_net.res_blocks.{i}", {"count": model["decoder_depth"]}
    rows = [
        *linear_rows("x_embedder.embedder.0", "decoder.pixel_embed"),
        *linear_rows("dec_net.cond_embed", "decoder.condition"),
        *linear_rows("dec_net.input_proj", "decoder.input"),
        Row(f"{block}.in_ln.weight", "decoder.blocks.norm.scale", VECTOR, **many),
        Row(f"{block}.in_ln.bias", "decoder.blocks.norm.bias", VECTOR, **many),
        *linear_rows(f"{block}.mlp.0", "decoder.blocks.mlp_in", **many),
        *linear_rows(f"{block}.mlp.2", "decoder.blocks.mlp_out", **many),
        *linear_rows("dec_net.final_layer.linear", "decoder.output"),
    ]
    if model.get("decoder_interaction", "adaln") == "adaln":
        rows += linear_rows(f"{block}.adaLN_modulation.1", "decoder.blocks.modulation", **many)
    return trunk_rows(model, "s_embedder.proj") + rows


ARCHITECTURE = Architecture(
    DeCo,
    DeCoSettings,
    flops,
    (
        (r"decoder/condition/kernel$", -2),
        (r"decoder/(pixel_embed|condition|input|output)/", None),  # the pixel decoder's own layers: some kilobytes
        (r"decoder/blocks/(norm|modulation|mlp_in|mlp_out)/", None),
        *RULES,
    ),
    table,
    "decoder/output/kernel",
)

"""model.dtype=float32 means float32: what the lowered programs ask of GPUs and TPUs, whose own choice is coarser."""

from __future__ import annotations

import re

import jax
import pytest

from configs import imagenet256, t2i_256
from deco_jax.conditioning.condition import abstract_condition
from deco_jax.method import training
from deco_jax.method.optimizer import make_optimizer
from deco_jax.programs import compile as compile_lib
from deco_jax.run import sharding
from deco_jax.run.state import state_shapes
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling


def products(program: str) -> list[str]:
    """Lines of matrix products and convolutions."""
    return [line for line in program.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]


def lower(module, dtype: str) -> tuple[str, str]:
    """The training step with its frozen networks, and the sampler, without any setting of the precision around them."""
    config = module.get_config("smoke")
    config.model.dtype = config.teacher.dtype = config.text.dtype = dtype
    if module is imagenet256:
        config.loss.repa_weight, config.loss.repa_layer = 0.5, 1
        config.teacher.size = "S"
    else:
        config.text.encoder, config.text.path = "qwen3", ""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    condition = abstract_condition(config, mesh)
    networks, observe, frozen = training.abstract_networks(config, mesh, condition)
    optimizer = make_optimizer(config.optimizer)
    state = state_shapes(networks, optimizer, mesh)
    batch = compile_lib.batch_shapes(config, mesh, condition)
    with jax.default_matmul_precision("default"):
        step = training.lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen).as_text()
        if module is not imagenet256:
            return step, step
        index = jax.ShapeDtypeStruct((8,), "int32", sharding=sharding.batch_sharding(mesh))
        generator = generate.Generator(generate.make_denoiser(config), mesh)
        request = {"index": index, "context": index}
        average = state["averages"]["ema"]
        null = jax.ShapeDtypeStruct((), "int32")
        return step, generator.lower(average, request, null, Sampling.of(config)).as_text()


@pytest.mark.parametrize("module", [imagenet256, t2i_256])
def test_every_product_of_float32_is_exact(module):
    """Forwards and backwards, of the trained networks, the teacher and the text encoder, and of the sampler."""
    for program in lower(module, "float32"):
        lines = products(program)
        assert len(lines) > 10
        coarse = [line for line in lines if "HIGHEST" not in line]
        assert coarse == []


def test_bfloat16_asks_for_no_more_than_it_is():
    step, sampler = lower(imagenet256, "bfloat16")
    for program in (step, sampler):
        fast = [line for line in products(program) if "bf16" in line]
        assert len(fast) > 10
        assert not any("HIGHEST" in line for line in fast)

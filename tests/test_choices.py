"""What the program decides by itself: remat=auto and attention=auto."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet256, quickstart
from deco_jax.conditioning.condition import abstract_condition
from deco_jax.config import default_config
from deco_jax.errors import UserError
from deco_jax.method import training
from deco_jax.programs import compile as compile_lib
from deco_jax.programs import train
from deco_jax.run import choices, hardware, sharding
from tests.runs import SMOKE, rows, succeed


@pytest.mark.parametrize(
    "name, dtype, platform, chosen",
    [
        ("auto", jnp.bfloat16, "gpu", "cudnn"),
        ("auto", jnp.float32, "gpu", "xla"),
        ("auto", jnp.bfloat16, "tpu", "flash"),
        ("auto", jnp.float32, "tpu", "flash"),
        ("auto", jnp.bfloat16, "cpu", "xla"),
        ("auto", jnp.bfloat16, None, "xla"),
        ("xla", jnp.bfloat16, "gpu", "xla"),
        ("cudnn", jnp.bfloat16, "cpu", "cudnn"),
    ],
)
def test_attention(name, dtype, platform, chosen):
    assert choices.attention(name, dtype, 72, platform) == chosen


# JAX refuses other widths with an exception; up to 256 it takes on Hopper and later.
@pytest.mark.parametrize("head_width, taken", [(36, False), (72, True), (128, True), (136, False), (288, False)])
def test_cudnns_attention_is_for_head_widths_that_it_takes(head_width, taken):
    assert (choices.attention("auto", jnp.bfloat16, head_width, "gpu") == "cudnn") == taken


@pytest.mark.parametrize(
    "capability, narrow, wide",
    [("7.5", False, False), ("8.0", True, False), ("9.0", True, True), ("gfx90a", False, False), ("10.3", True, True)],
)
def test_gpus_without_cudnns_attention_use_xlas(capability, narrow, wide, monkeypatch):
    """A T4, an A100, an H100, an AMD."""
    gpu = types.SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    assert (choices.attention("auto", jnp.bfloat16, 72) == "cudnn") == narrow
    assert choices.attention("auto", jnp.bfloat16, 192) == "xla"  # "auto" only takes what every GPU that has it does
    for width, has in ((72, narrow), (192, wide)):
        model = types.SimpleNamespace(attention="cudnn", width=2 * width, num_heads=2)
        if has:
            hardware.check_attention(model)
        else:
            with pytest.raises(UserError, match=rf"cudnn for heads of {width} channels needs .*, not a GPU; use auto"):
                hardware.check_attention(model)


def program(peak: float, cycles: int = 0):
    """As if a compiled program needed so many bytes, and a TPU's compiler expected it to take so many cycles."""
    sizes = {"argument": peak, "output": 0, "alias": 0, "temp": 0, "generated_code": 0}
    analysis = types.SimpleNamespace(**{f"{name}_size_in_bytes": value for name, value in sizes.items()})
    config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    text = f"ENTRY %main () -> f32[] {{\n  ROOT %a = f32[] constant(0), {config}\n}}\n"
    return types.SimpleNamespace(memory_analysis=lambda: analysis, as_text=lambda: text)


NEEDS = {"none": program(30.0), "dots": program(20.0), "attention": program(15.0), "full": program(10.0)}


@pytest.mark.parametrize(
    "memory, platform, chosen, tried",
    [
        (40, "tpu", "none", ["none"]),
        (30, "tpu", "none", ["none"]),
        (30, "gpu", "dots", ["none", "dots"]),  # cuDNN's workspaces aren't in the compiler's count
        (16, "gpu", "full", ["none", "dots", "attention", "full"]),
        (12, "tpu", "full", ["none", "dots", "attention", "full"]),
        (5, "tpu", "full", ["none", "dots", "attention", "full"]),
        (None, "cpu", "none", []),
    ],
)
def test_the_cheapest_policy_that_fits(memory, platform, chosen, tried):
    compiled = []

    def compile_with(name):
        compiled.append(name)
        return NEEDS[name]

    choice = choices.remat(compile_with, memory, platform)
    assert (choice.name, compiled) == (chosen, tried)
    assert choice.compiled is (NEEDS[chosen] if tried else None)
    assert choice.note.startswith(f"remat {chosen}")
    assert ("too large" in choice.note) == (memory == 5)


def test_a_policy_that_the_compiler_refuses_is_passed_over():
    refused = {**NEEDS, "none": choices.Refused("RESOURCE_EXHAUSTED", None), "dots": choices.Refused("", 2.0**35)}
    choice = choices.remat(refused.__getitem__, 30, "tpu")
    assert choice.name == "attention"
    assert "none does not compile, dots needs 32.00" in choice.note
    nothing = {name: choices.Refused("", None) for name in NEEDS}
    assert choices.remat(nothing.__getitem__, 30, "tpu").compiled is None


@pytest.mark.parametrize(("memory", "chosen"), [(40, "dots"), (22, "attention"), (12, "full"), (5, "full")])
def test_on_a_tpu_the_fewest_estimated_cycles_decide(memory, chosen):
    """Keeping everything is not the fastest there: what isn't computed again is read from memory."""
    cycles = {"none": 900, "dots": 700, "attention": 800, "full": 850}
    estimated = {name: program(30 - 5 * i, cycles[name]) for i, name in enumerate(cycles)}
    estimated["full"] = program(10, 850)
    choice = choices.remat(estimated.__getitem__, memory, "tpu")
    assert choice.name == chosen
    assert choice.compiled is estimated[chosen]
    assert all(f"{name} needs" in choice.note for name in cycles)
    assert "at 700 cycles" in choice.note


def test_a_step_is_compiled_with_the_policy_that_fits_its_device(monkeypatch):
    """Between the bytes of "full" and of "none", which this machine's compiler says."""
    config = quickstart.get_config("smoke")
    config.model.depth, config.model.width, config.model.num_heads = 6, 64, 4
    config.data.batch_size = 64
    mesh = sharding.make_mesh(1, 1)
    peak = {}
    for name in ("none", "dots", "full"):
        report = compile_lib.compile_report(compile_lib.with_settings(config, {"model.remat": name}), mesh)
        peak[name] = report["bytes"]["peak"]
    assert peak["full"] < peak["dots"] < peak["none"]

    config.model.remat = "auto"
    condition = abstract_condition(config, mesh)
    for name, memory in {"full": peak["full"], "dots": peak["dots"], "none": peak["none"]}.items():
        monkeypatch.setattr(hardware, "device_memory", lambda device, mesh, memory=memory: memory)
        settled, choice = training.choose_remat(config, mesh, condition)
        assert settled.model.remat == choice.name == name
    assert config.model.remat == "auto"  # saved as it was given: another machine may choose otherwise
    monkeypatch.setattr(compile_lib, "device_memory", lambda device, mesh: peak["dots"])
    assert compile_lib.compile_report(config, mesh)["remat"] == "dots"


def test_what_names_a_policy_is_left_alone():
    config = imagenet256.get_config("smoke")
    config.model.remat = "dots"
    mesh = sharding.make_mesh(1, 1)
    assert training.choose_remat(config, mesh, abstract_condition(config, mesh)) == (config, None)


def test_both_are_the_default():
    assert (default_config().model.remat, default_config().model.attention) == ("auto", "auto")


def test_training_by_a_chosen_policy_compiles_once(tmp_path, monkeypatch):
    """The step that was compiled for its bytes is the one that runs; its losses are those of a given policy."""
    from deco_jax.run import distributed

    monkeypatch.setattr(hardware, "device_memory", lambda device, mesh: 1e12)
    stages = []
    original = distributed.stage

    def stage(name, *rest):
        stages.append(name)
        return original(name, *rest)

    monkeypatch.setattr(distributed, "stage", stage)
    config = quickstart.get_config("smoke")
    config.train.num_steps, config.train.sample_every, config.model.remat = 2, 0, "auto"
    config.optimizer.averages = "short=0.9"  # the step is compiled for this run's state
    train.train(config, str(tmp_path / "auto"))
    assert "choosing what to recompute in the backward pass" in stages
    assert "compiling the training step" not in stages
    override = ("--config.train.num_steps=2", "--config.train.sample_every=0", "--config.model.remat=none")
    succeed(SMOKE, f"--workdir={tmp_path / 'none'}", *override)
    ours, theirs = (rows(tmp_path / name)[2] for name in ("auto", "none"))
    assert ours["loss"] == theirs["loss"]

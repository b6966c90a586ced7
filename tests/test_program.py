"""What is read off a compiled program, on excerpts written by hand and on small programs whose answers are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from deco_jax.run import program as program_lib
from deco_jax.run import slices
from tests.helpers import ROOT, fake_devices

pytestmark = pytest.mark.fast

# A loop of 28 rounds on 16 chips. The bound of the second loop is among the values that it carries.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

FileNames
1 "/home/me/deco_jax/models/dit.py"
2 "/usr/lib/python3/site-packages/flax/nnx/linear.py"

FunctionNames
1 "Block.__call__"
2 "Linear.__call__"
3 "Attention.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=110 end_line=110 column=48 end_column=48}
2 {file_name_id=1 function_name_id=3 line=70 end_line=70 column=4 end_column=9}
3 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%fused (p0: bf16[64,32]) -> bf16[64,32] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %inner = f32[4096,4096]{1,0:T(8,128)} broadcast(%p0), dimensions={0,1}
  ROOT %product = bf16[64,32]{1,0} slice(%inner), metadata={op_name="jit(step)/jvp(decoder)/norm/mul"}
}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[4,32] {
  %input = bf16[64,32]{1,0} parameter(0)
  %all-reduce.147 = bf16[64,32]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  %id = u32[] partition-id()
  ROOT %slice.9 = bf16[4,32]{1,0} dynamic-slice(%all-reduce.147, %id, %id), dynamic_slice_sizes={4,32}
}

%start (p: bf16[8,32]) -> (bf16[8,32], bf16[128,32]) {
  %p = bf16[8,32]{1,0} parameter(0)
  %all-gather.280 = bf16[128,32]{1,0} all-gather(%p), channel_id=138, replica_groups=mesh['data'=2,'fsdp'=8] {'data','fsdp'}, dimensions={0}, frontend_attributes={chain_id="4"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.22 = (bf16[8,32], bf16[128,32]) custom-call(%all-gather.280), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[8,32]) -> bf16[128,32] {
  %q = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.281 = bf16[128,32]{1,0} all-gather(%q), channel_id=138, replica_groups=mesh['data'=2,'fsdp'=8] {'data','fsdp'}, dimensions={0}, frontend_attributes={chain_id="4"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%body (carry: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %carry = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %h = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %fusion.5 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%h), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp()/while/body/blocks/attention/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"1000","x":"1"}}
  %copy.7 = bf16[64,32]{0,1} copy(%fusion.5), backend_config={"window_config":{"estimated_cycles":"50"}}
  %permute = (bf16[64,32], bf16[64,32], u32[], u32[]) collective-permute-start(%copy.7), channel_id=20, source_target_pairs={{0,1},{1,0}}
  %permuted = bf16[64,32]{1,0} collective-permute-done(%permute)
  ROOT %out = (s32[], bf16[64,32]) tuple(%next, %permuted)
}

%condition (c: (s32[], bf16[64,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %c = (s32[], bf16[64,32]) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body.2 (carry.2: (s32[], s32[])) -> (s32[], s32[]) {
  %carry.2 = (s32[], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%carry.2), index=0
  %limit.2 = s32[] get-tuple-element(%carry.2), index=1
  %fusion.9 = bf16[64,32]{1,0} fusion(%i.2), kind=kLoop, calls=%fused, metadata={op_name="convert.10"}, backend_config={"estimated_cycles":"7"}
  %next.2 = s32[] add(%i.2, %i.2)
  ROOT %out.2 = (s32[], s32[]) tuple(%next.2, %limit.2)
}

%condition.2 (c.2: (s32[], s32[])) -> pred[] {
  %c.2 = (s32[], s32[]) parameter(0)
  %at.2 = s32[] get-tuple-element(%c.2), index=0
  %limit.3 = s32[] get-tuple-element(%c.2), index=1
  ROOT %lt.2 = pred[] compare(%at.2, %limit.3), direction=LT
}

ENTRY %main (a: bf16[64,32], w: bf16[8,32]) -> bf16[4,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %w = bf16[8,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %gather.1 = (bf16[8,32], bf16[128,32]) fusion(%w), kind=kCustom, calls=%start, metadata={op_name="jit(step)/optimizer/add"}
  %gather.2 = bf16[128,32]{1,0} fusion(%w), kind=kCustom, calls=%done
  %first = (s32[], bf16[64,32]) tuple(%zero, %a)
  %while.1 = (s32[], bf16[64,32]) while(%first), condition=%condition, body=%body
  %three = s32[] constant(3)
  %second = (s32[], s32[]) tuple(%zero, %three)
  %while.2 = (s32[], s32[]) while(%second), condition=%condition.2, body=%body.2
  %h.9 = bf16[64,32]{1,0} get-tuple-element(%while.1), index=1
  ROOT %scattered = bf16[4,32]{1,0} fusion(%h.9), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp())/blocks/mlp/dot_general" stack_frame_id=2}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def tpu():
    return program_lib.parse(TPU)


def test_loops_and_how_often_they_run(tpu):
    loops = {e.instruction.name: (e.instruction, e.computation) for e in program_lib.executions(tpu)}
    assert [program_lib.trip_count(tpu, where, loop) for loop, where in (loops["while.1"], loops["while.2"])] == [28, 3]
    times = {e.instruction.name: e.times for e in program_lib.executions(tpu)}
    assert (times["copy.7"], times["fusion.9"], times["scattered"]) == (28, 3, 1)
    assert "inner" not in times  # within a fusion


def test_a_loop_that_runs_until_something_happens():
    text = TPU.replace("constant(28)", "parameter(1)")
    program = program_lib.parse(text)
    loop = program.computations["main"]["while.1"]
    assert program_lib.trip_count(program, "main", loop) is None


def tpu_with(loop: str) -> program_lib.Program:
    return program_lib.parse(TPU.replace("body=%body\n", f"body=%body, backend_config={{{loop}}}\n"))


def test_a_trip_count_that_is_written_down():
    program = tpu_with('"known_trip_count":{"n":"12"}')
    assert program_lib.trip_count(program, "main", program.computations["main"]["while.1"]) == 12


def test_estimated_cycles(tpu):
    costs = program_lib.costs(tpu)
    assert [(c.name, c.total) for c in costs] == [("fusion.5", 28_000), ("copy.7", 1_400), ("fusion.9", 21)]
    assert costs[0].source == "dit.py:70 Attention.__call__ < dit.py:110 Block.__call__"
    # A name that XLA made up gives way to one within the fusion.
    assert [program_lib.part(cost) for cost in costs] == ["attention", "copies", "decoder"]
    whole = 28_000 + 1_400 + 21
    assert program_lib.shares(costs) == {"attention": 28_000 / whole, "copies": 1_400 / whole, "decoder": 21 / whole}


KERNEL = """
ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %kernel.1 = (bf16[4,8]{1,0}, f32[4]{0}) custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"estimated_cycles":"2056"
}}, metadata={op_name="jit(step)/blocks/attention/pallas_call"}, backend_config={"custom_call_config":{"body":"TUw"}}
  %silent.1 = bf16[4,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={}}
  ROOT %out.1 = bf16[4,8]{1,0} get-tuple-element(%kernel.1), index=0, frontend_attributes={kernel_metadata={
"estimated_cycles":"2056"
}}
}
"""  # noqa: E501


def test_a_kernel_says_its_own_cycles():
    """Over several lines, as libtpu prints it, and also of what only picks one of its results."""
    (cost,) = program_lib.costs(program_lib.parse(KERNEL))
    assert (cost.name, cost.cycles, program_lib.part(cost)) == ("kernel.1", 2056, "attention")


BRANCHES = """
%cheap (a: f32[4]) -> f32[4] {
  ROOT %fusion.1 = f32[4]{0} add(%a, %a), backend_config={"estimated_cycles":"10"}
}

%dear (b: f32[4]) -> f32[4] {
  %fusion.2 = f32[4]{0} add(%b, %b), backend_config={"estimated_cycles":"70"}
  ROOT %fusion.3 = f32[4]{0} add(%fusion.2, %b), backend_config={"estimated_cycles":"30"}
}

ENTRY %main (p: pred[], x: f32[4]) -> f32[4] {
  %p = pred[] parameter(0)
  %x = f32[4]{0} parameter(1)
  ROOT %conditional.1 = f32[4]{0} conditional(%p, %x, %x), true_computation=%cheap, false_computation=%dear
}
"""


def test_the_dearest_branch_counts():
    """Transfers and arrays are those of all branches."""
    program = program_lib.parse(BRANCHES)
    assert [(cost.name, cost.total) for cost in program_lib.costs(program)] == [("fusion.2", 70), ("fusion.3", 30)]
    assert {"fusion.1", "fusion.2"} <= {made.instruction.name for _, made in program_lib.arrays(program)}


def test_collectives_of_a_tpu(tpu):
    gather, permute, scatter = program_lib.collectives(tpu)
    # [8, 32] bfloat16 of each of 16 chips; spread over two fusions, but one transfer.
    assert (gather.kind, gather.bytes, gather.devices, gather.times, gather.loops) == (
        "all-gather",
        16 * 8 * 32 * 2,
        16,
        1,
        (),
    )
    assert gather.sent == 15 * 8 * 32 * 2
    assert gather.op_name == "jit(step)/optimizer/add"
    assert (permute.kind, permute.times, permute.loops) == ("collective-permute", 28, ("while.1",))
    assert permute.sent == 64 * 32 * 2
    assert (scatter.kind, scatter.devices, scatter.bytes) == ("reduce-scatter", 4, 64 * 32 * 2)
    assert scatter.sent == 3 / 4 * 64 * 32 * 2
    assert scatter.source.startswith("dit.py:70")


def test_arrays_that_a_chip_holds(tpu):
    shapes = {str(array) for array, _ in program_lib.arrays(tpu)}
    assert "bf16[128,32]" in shapes
    assert "f32[4096,4096]" not in shapes  # never leaves its fusion
    assert [str(array) for array, _ in program_lib.largest(tpu, 2)] == ["bf16[128,32]", "bf16[64,32]"]
    assert {e.instruction.name for _, e in program_lib.leading(tpu, 128)} == {"gather.1", "gather.2"}
    assert not program_lib.leading(tpu, 128, axis=1)


@pytest.mark.parametrize(
    "groups, devices",
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[4,4]T(1,0)", 4),
        ("{}", 16),
        ("mesh['data'=2,'fsdp'=8] {'fsdp'}", 8),
        ("mesh['data'=2,'fsdp'=8] {'data','fsdp'}", 16),
        ("mesh['all'=16] {'all':(2)4}", 4),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
    ],
)
def test_who_exchanges_with_whom(groups, devices):
    text = TPU.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", f"replica_groups={groups}")
    assert program_lib.collectives(program_lib.parse(text))[-1].devices == devices


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
    ],
)
def test_the_groups_by_their_members(attributes, expected):
    assert slices.groups(attributes, 8).tolist() == expected


def test_what_libtpu_sends_to_other_slices():
    """A program of each of two slices: the sum over them is a transfer between hosts of what each has summed up."""
    text = """\
HloModule jit_step, num_partitions=8

ENTRY %main (g: f32[128,1024]) -> f32[128,1024] {
  %g = f32[128,1024]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[128,1024]{1,0}, u32[], token[]) send(%g, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sum = f32[128,1024]{1,0} all-reduce(%g), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501
    found = slices.crossing(program_lib.parse(text), 2, 16)
    assert found == {"all-reduce": {"count": 1, "bytes": 4 * 128 * 1024}}
    assert slices.crossing(program_lib.parse(text), 1, 8) == {}


@pytest.mark.parametrize(
    "array, size", [("pred[3]", 3), ("bf16[4,5]", 40), ("f32[]", 4), ("s4[8]", 4), ("f8e4m3fn[7]", 7), ("token[]", 0)]
)
def test_bytes_of_arrays(array, size):
    program = program_lib.parse(f"ENTRY %main () -> f32[] {{\n  ROOT %a = {array} parameter(0)\n}}\n")
    assert program_lib.arrays(program)[0][0].bytes == size


# ------------------------------------------------------------------------------- programs of this machine's compiler


def test_a_scan_on_one_device():
    def f(x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ h), None), x, length=7)[0]

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((24, 24), jnp.float32)).compile().as_text()
    program = program_lib.parse(text)
    counts = {
        e.times for e in program_lib.executions(program) if e.loops and e.instruction.opcode not in ("parameter",)
    }
    assert counts == {7}
    assert program_lib.largest(program, 1)[0][0] == program_lib.Array("f32", (24, 24))
    assert program_lib.collectives(program) == []
    assert program_lib.costs(program) == []  # a CPU's compiler doesn't estimate


# Five layers of 64 x 64, split over 8 devices and gathered in the scan; the gradient goes back to its owners.
SHARDED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from deco_jax.run import program

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def loss(w, x):
    def body(h, w):
        with jax.named_scope("mlp"):
            return jnp.tanh(h @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None
    return jnp.mean(jax.lax.scan(jax.checkpoint(body), x, w)[0] ** 2)

split = NamedSharding(mesh, P(None, "fsdp"))
w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
x = jax.ShapeDtypeStruct((24, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
compiled = program.parse(jax.jit(jax.grad(loss), out_shardings=split).lower(w, x).compile().as_text())
print(json.dumps({
    "collectives": [(c.kind, c.bytes, c.devices, c.times, len(c.loops), c.sliced, c.sent * c.times)
                    for c in program.collectives(compiled)],
    "batch": sorted({str(a) for a, _ in program.leading(compiled, 24)}),
    "rows": len(program.leading(compiled, 3)),
    "names": [c.op_name for c in program.collectives(compiled)],
}))
"""


def test_a_sharded_gradient():
    result = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment()
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["batch"] == []  # no device holds the activations of the whole batch
    assert found["rows"]  # but its own three rows
    size = 64 * 64 * 4
    gathers = [c for c in found["collectives"] if c[0] == "all-gather"]
    assert gathers == [["all-gather", size, 4, 5, 1, False, 5 * 3 / 4 * size]] * 2  # forwards, and under remat again
    # The gradient is summed over all devices, of which each keeps its slice; in one reduction or one an axis.
    reductions = [c for c in found["collectives"] if c[0] == "all-reduce"]
    assert reductions
    assert all(times == 5 and loops == 1 and sliced for _, _, _, times, loops, sliced, _ in reductions)
    assert 2 in {c[2] for c in reductions} or 8 in {c[2] for c in reductions}
    assert len(found["collectives"]) == len(gathers) + len(reductions)


def environment() -> dict[str, str]:
    return {**os.environ, **fake_devices(8)}

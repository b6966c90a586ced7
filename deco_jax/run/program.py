"""Reads a compiled program: what a device holds, what travels between devices, and what XLA expects each op to cost.

Everything here is a pure function of `compiled.as_text()`, XLA's optimized HLO. Only what is executed counts: the entry
computation, the bodies of its loops as often as they run, and what these call. A fusion counts as one op, because its
intermediate values never reach memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from deco_jax.run.hlo import Array, Instruction, Program, called, fused, source
from deco_jax.run.hlo import parse as parse


class Execution(NamedTuple):
    """An instruction as it is executed."""

    instruction: Instruction
    computation: str
    times: int  # per run of the program
    loops: tuple[str, ...]  # names of the `while` instructions around it, outermost first


class Collective(NamedTuple):
    """A transfer between devices."""

    kind: str  # one of COLLECTIVES
    arrays: tuple[Array, ...]  # a device's inputs
    devices: int  # in a group that exchanges data
    times: int  # a run of the program
    loops: tuple[str, ...]
    op_name: str
    source: str
    sliced: bool  # an all-reduce of which each device only keeps its slice: a reduce-scatter on other backends
    attributes: str  # of the instruction; they say which devices exchange data

    @property
    def bytes(self) -> int:
        """Size of the whole array: the result of a gather, or the input of a reduction."""
        size = sum(array.bytes for array in self.arrays)
        return size * self.devices if self.kind == "all-gather" else size

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time by a ring algorithm, which is optimal in bytes."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices


class Cost(NamedTuple):
    """What XLA expects an op to take."""

    name: str
    results: tuple[Array, ...]
    cycles: int  # once
    times: int
    op_name: str
    source: str

    @property
    def total(self) -> int:
        return self.cycles * self.times


COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These only name another instruction's result; they hold no memory of their own.
_ALIASES = ("tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "optimization-barrier")
# These pass on their operands.
_MOVES = ("bitcast", "copy", "convert", "transpose", "reshape", "get-tuple-element", "all-reduce-done")

# --------------------------------------------------------------------------------------------------- what runs


Choice = Callable[[list[str]], list[str]]  # some of the names of a conditional's branches


def executions(program: Program, choose: Choice = list, computation: str = "") -> Iterator[Execution]:
    """Yield every instruction that is executed.

    Args:
        choose: which branches of a conditional are taken; all by default.
        computation: from which to start, instead of the entry.
    """

    def walk(name: str, times: int, loops: tuple[str, ...]) -> Iterator[Execution]:
        for instruction in program.computations[name].values():
            yield Execution(instruction, name, times, loops)
            if instruction.opcode == "while":
                count = trip_count(program, name, instruction)
                (body,) = called(instruction, "body")
                yield from walk(body, times * (1 if count is None else count), (*loops, instruction.name))
            elif instruction.opcode in ("call", "async-start"):
                for inside in called(instruction, "to_apply|calls"):
                    yield from walk(inside, times, loops)
            elif instruction.opcode == "conditional":
                for branch in choose(called(instruction, "branch_computations|true_computation|false_computation")):
                    yield from walk(branch, times, loops)

    return walk(computation or program.entry, 1, ())


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """Return how often a `while` of a computation runs; None if its text doesn't say.

    XLA may write it down. If not, it is the bound in the loop's condition: JAX's scans and fori_loops count by ones,
    from 0 or another constant up to the bound.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,) = called(loop, "condition")
    inside = program.computations[condition]
    compares = [
        (body, instruction)
        for body in (inside, *(program.computations[name] for i in inside.values() for name in called(i, "calls")))
        for instruction in body.values()
        if instruction.opcode == "compare" and re.search(r"direction=(LT|GT)", instruction.attributes)
    ]
    if len(compares) != 1:
        return None
    body, compare = compares[0]
    names = compare.operands
    if body is not inside:  # a fusion of the comparison: its parameters are what the condition passes
        (fusion,) = (i for i in inside.values() if i.opcode == "fusion" and compare.name in fused(program, i))
        names = tuple(
            fusion.operands[int(body[name].arguments)] if body[name].opcode == "parameter" else name for name in names
        )
    scope = {**body, **inside}
    bounds = [_constant(program, computation, loop, scope, name) for name in names]
    found = [bound for bound in bounds if bound is not None]
    return found[0] if len(found) == 1 else None


def _constant(
    program: Program, computation: str, loop: Instruction, scope: Mapping[str, Instruction], name: str
) -> int | None:
    """Return the integer that a name in a loop's condition means, also if the loop carries it; None if it varies."""
    instruction = scope.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        instruction = scope.get(instruction.operands[0])
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    index = re.search(r"index=(\d+)", instruction.attributes)
    if instruction.opcode != "get-tuple-element" or not index:
        return None
    # The loop's counter is also a constant at the start of the loop, but its body changes it.
    body = program.computations[called(loop, "body")[0]]
    root = list(body.values())[-1]
    if root.opcode != "tuple":
        return None
    carried = body[root.operands[int(index[1])]]
    same = re.search(r"index=(\d+)", carried.attributes)
    if carried.opcode != "get-tuple-element" or not same or same[1] != index[1]:
        return None
    outside = program.computations[computation]
    start = outside[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    return _constant(program, computation, loop, outside, start.operands[int(index[1])])


# --------------------------------------------------------------------------------------------------- the questions


def arrays(program: Program) -> list[tuple[Array, Execution]]:
    """Return every array that a device holds at some time, with what makes it: the program's arguments and results."""
    return [
        (array, execution)
        for execution in executions(program)
        if execution.instruction.opcode not in _ALIASES
        and (execution.instruction.opcode != "parameter" or execution.computation == program.entry)
        for array in execution.instruction.results
    ]


def largest(program: Program, count: int = 10) -> list[tuple[Array, Execution]]:
    """Return the largest arrays that a device holds, each shape once."""
    found: dict[Array, Execution] = {}
    for array, execution in arrays(program):
        found.setdefault(array, execution)
    return sorted(found.items(), key=lambda item: -item[0].bytes)[:count]


def leading(program: Program, size: int, axis: int = 0) -> list[tuple[Array, Execution]]:
    """Return the arrays on a device with at least two axes whose axis `axis` has length `size`."""
    return [
        (array, execution)
        for array, execution in arrays(program)
        if len(array.shape) > max(axis, 1) and array.shape[axis] == size
    ]


def collectives(program: Program) -> list[Collective]:
    """Return every transfer between devices, each only once, with how often it runs.

    A collective that is split into a start and a done counts at its start, and one that a TPU spreads over several
    fusions counts once. One with a single device isn't a transfer.
    """
    found, chains = [], set()
    for execution in executions(program):
        instruction = execution.instruction
        inside = [(execution.computation, instruction)]
        if instruction.opcode == "fusion":
            inside = [(name, i) for name in called(instruction, "calls") for i in program.computations[name].values()]
        for computation, part in inside:
            kind = part.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            chain = re.search(r'chain_id="(\d+)"', part.attributes)
            if chain and '"async_collective_fusion_config"' in part.attributes:
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            scope = program.computations[computation]
            if computation.startswith("all-reduce-scatter"):  # how a TPU's program spells it
                kind = "reduce-scatter"
            put_in = tuple(a for name in part.operands if name in scope for a in scope[name].results)
            devices = 2 if kind == "collective-permute" else _group(program, part.attributes)
            named = part if part.op_name else instruction
            if devices > 1:
                found.append(
                    Collective(
                        kind,
                        put_in or part.results,
                        devices,
                        execution.times,
                        execution.loops,
                        named.op_name,
                        source(program, named),
                        kind == "all-reduce" and _sliced(program, scope, part.name),
                        part.attributes,
                    )
                )
    return found


def _group(program: Program, attributes: str) -> int:
    """Return the number of devices in a group that exchanges data, from replica_groups in any of XLA's notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"unknown notation of replica groups: {attributes[:200]}")
    return program.devices


def _sliced(program: Program, scope: Mapping[str, Instruction], name: str) -> bool:
    """Return whether all users of an array only use a slice of it that depends on the device."""
    users = [i for i in scope.values() if name in i.operands]

    def slices(user: Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in (
            "bitcast",
            "copy",
            "convert",
            "transpose",
            "reshape",
            "get-tuple-element",
            "all-reduce-done",
        ):
            return _sliced(program, scope, user.name)
        if user.opcode != "fusion":
            return False
        body = fused(program, user)
        places = {str(i) for i, operand in enumerate(user.operands) if operand == name}
        parameters = [i.name for i in body.values() if i.opcode == "parameter" and i.arguments in places]
        return all(_sliced(program, body, parameter) for parameter in parameters)

    return bool(users) and all(map(slices, users))


def costs(program: Program) -> list[Cost]:
    """Return XLA's estimate for each op, the most expensive first; empty if it gives none, as on a CPU.

    Transfers between devices have no estimate and are left out. A hand-written kernel counts with the cycles that it
    states itself (Pallas's `metadata`, "estimated_cycles"), and is left out if it states none. Of a conditional, the
    most expensive branch counts.
    """

    @functools.cache
    def total(branch: str) -> int:
        return sum(_cycles(each.instruction) * each.times for each in executions(program, dearest, branch))

    def dearest(branches: list[str]) -> list[str]:
        return [max(branches, key=total)]

    found = []
    for execution in executions(program, dearest):
        instruction = execution.instruction
        if cycles := _cycles(instruction):
            named = _named(program, instruction)
            found.append(
                Cost(
                    instruction.name,
                    instruction.results,
                    cycles,
                    execution.times,
                    named.op_name,
                    source(program, named),
                )
            )
    return sorted(found, key=lambda cost: -cost.total)


def _cycles(instruction: Instruction) -> int:
    """Return XLA's estimate for one instruction by itself; 0 if it gives none."""
    # The ops that select a kernel's results also have its attributes.
    if instruction.opcode in _ALIASES:
        return 0
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(cycles[1]) if cycles else 0


def _named(program: Program, instruction: Instruction) -> Instruction:
    """Return the instruction whose name says what an op computes; XLA names some fusions after an inner op."""
    if "/" in instruction.op_name or instruction.opcode != "fusion":
        return instruction
    inside = reversed(fused(program, instruction).values())
    return next((part for part in inside if "/" in part.op_name), instruction)


# Scopes (`jax.named_scope`) in order of precedence: the teacher's attention counts as teacher.
PARTS = (
    "teacher",
    "text_encoder",
    "optimizer",
    "noise",
    "path",
    "projector",
    "decoder",
    "attention",
    "mlp",
    "norm",
    "blocks",
    "inception",
    "loss",
)


def part(cost: Cost) -> str:
    """Return the part of the program that an op belongs to: one of PARTS, "copies", or "other"."""
    scopes = set(re.split(r"[/();]", cost.op_name))
    named = next((name for name in PARTS if name in scopes), None)
    return named or ("copies" if cost.name.startswith(("copy", "bitcast", "transpose")) else "other")


def shares(found: Iterable[Cost], key: Callable[[Cost], str] = part) -> dict[str, float]:
    """Return each part's share of all cycles, the largest first."""
    sums: dict[str, int] = {}
    for cost in found:
        sums[key(cost)] = sums.get(key(cost), 0) + cost.total
    whole = sum(sums.values())
    return {name: value / whole for name, value in sorted(sums.items(), key=lambda item: -item[1])}

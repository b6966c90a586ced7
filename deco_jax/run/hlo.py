"""Parses HLO text, which `compiled.as_text()` prints, into computations, instructions and the Python lines behind them.

These are pure functions; `run/program.py` uses them to answer questions about a program.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Array(NamedTuple):
    """The type of an array on a device; if the array is split over devices, of the device's own part."""

    dtype: str  # XLA's name: bf16, f32, u8, pred
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0  # a token has none
        return math.prod(self.shape) * width // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # for a tuple, all of its arrays
    operands: tuple[str, ...]  # names of instructions
    arguments: str  # the text in the parentheses
    attributes: str  # the text after them

    @property
    def op_name(self) -> str:
        """JAX's name for this op, with its scopes, such as "jit(train_step)/jvp(decoder)/dot_general"; "" if none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Frame(NamedTuple):
    """A place in the Python code."""

    file: str
    line: int
    function: str


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int
    stacks: dict[int, tuple[Frame, ...]]  # by stack_frame_id, innermost first


_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+\w*|c\d+)\[([^\]]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LEFT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{[^{}]*\}")  # printed on lines of its own
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")


def parse(text: str) -> Program:
    """Read `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    text = _KERNEL_METADATA.sub(lambda found: found[0].replace("\n", ""), text)
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    partitions, replicas = (re.search(rf"\b{name}=(\d+)", text) for name in ("num_partitions", "replica_count"))
    devices = int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)
    return Program(computations, entry, devices, _stacks(text))


def _instruction(line: str) -> Instruction | None:
    left = _LEFT.match(line)
    if not left:
        return None
    start = left.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close - 1]
    results = tuple(
        Array(dtype, tuple(int(side.lstrip("<=")) for side in shape.split(",") if side))
        for dtype, shape in _ARRAY.findall(line[start:end])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(left[1], opcode[1], results, operands, arguments, line[close:])


def _closing(line: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in re.finditer(r"[()]", line[start:]):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return start + place.end()
    return len(line)


def _stacks(text: str) -> dict[int, tuple[Frame, ...]]:
    def table(name: str, pattern: str) -> dict[int, tuple[str, ...]]:
        block = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return {int(row[0]): row[1:] for row in re.findall(rf"^(\d+) {pattern}", block[1] if block else "", re.M)}

    files, functions = table("FileNames", '"(.*)"()'), table("FunctionNames", '"(.*)"()')
    locations = table("FileLocations", r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    frames = {i: (int(a), int(b)) for i, (a, b) in table("StackFrames", r"\{\w+=(\d+) parent_frame_id=(\d+)").items()}
    if not frames:
        return {}
    # 0 means no frame; some versions print a parent's number, others that number plus one.
    offset = min(parent for _, parent in frames.values())
    stacks: dict[int, tuple[Frame, ...]] = {0: ()}
    for i in sorted(frames):  # parents come first
        location, parent = frames[i]
        file, function, line = (int(number) for number in locations[location])
        stacks[i] = (Frame(files[file][0], int(line), functions[function][0]), *stacks.get(parent - offset, ()))
    return stacks


def source(program: Program, instruction: Instruction, depth: int = 3) -> str:
    """Return where an instruction comes from, as "layers.py:91 Linear.__call__ < dit.py:70 Attention.__call__".

    It is "" if unknown. Frames of installed libraries are left out, unless there are no others.
    """
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    frames = program.stacks.get(int(found[1]), ()) if found else ()
    own = [frame for frame in frames if "-packages/" not in frame.file] or list(frames)
    if own:
        return " < ".join(f"{frame.file.rpartition('/')[2]}:{frame.line} {frame.function}" for frame in own[:depth])
    file, line = (re.search(rf'{key}="?([^"\s}}]+)', instruction.attributes) for key in ("source_file", "source_line"))
    return f"{file[1].rpartition('/')[2]}:{line[1]}" if file and line else ""


def called(instruction: Instruction, keys: str) -> list[str]:
    return [
        name
        for group in re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        for name in re.findall(r"[\w.\-]+", group)
    ]


def fused(program: Program, fusion: Instruction) -> dict[str, Instruction]:
    return {k: v for name in called(fusion, "calls") for k, v in program.computations[name].items()}

"""What a compiled program sends from slice to slice, over a data centre's network.

On a mesh of several slices (`sharding.make_mesh`) partitions are numbered slice by slice. On CPUs and GPUs a transfer
crosses slices if one of its groups has partitions in several of them. libtpu compiles a program for each slice and
turns the crossing transfers into transfers between hosts, after a reduction inside the slice.
"""

from __future__ import annotations

import re

import numpy as np

from deco_jax.run.program import Program, collectives, executions


def groups(attributes: str, devices: int) -> np.ndarray:
    """Return which devices exchange data: the replica groups in any of XLA's notations, int [groups, members].

    For a collective-permute, these are its pairs of source and target.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return np.array([[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        names = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])]
        order = _order(mesh[2]) if "device_ids" in mesh[2] else np.arange(devices)
        taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])
        shape: list[int] = []
        axes: list[int] = []
        for name, size in names:
            parts = [(int(before), int(inner)) for other, before, inner in taken if other == name and inner]
            if parts:  # of the axis (BEFORE)SIZE
                ((before, inner),) = parts
                axes.append(len(shape) + 1)
                shape += [before, inner, size // before // inner]
            else:
                axes += [len(shape)] if name in [other for other, _, _ in taken] else []
                shape.append(size)
        members = int(np.prod([shape[axis] for axis in axes]))
        return np.moveaxis(order.reshape(shape), axes, range(-len(axes), 0)).reshape(-1, members)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", attributes):
        return _order(iota[3]).reshape(int(iota[1]), int(iota[2]))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"unknown notation of replica groups: {attributes[:200]}")
    return np.arange(devices)[None]


def _order(text: str) -> np.ndarray:
    """Return device numbers as a flat array, from a list (3,1,2,0) or from [2,4]T(1,0): 0 to 7 as 2 × 4, transposed."""
    if sizes := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(size) for size in sizes[1].split(",")]
        order = np.arange(int(np.prod(shape))).reshape(shape)
        return (order.transpose([int(axis) for axis in sizes[2].split(",")]) if sizes[2] else order).ravel()
    return np.array([int(number) for number in re.findall(r"\d+", text)])


def crossing(program: Program, slices: int, devices: int) -> dict[str, dict[str, float]]:
    """Return the transfers between slices per run, by kind: "count", and the "bytes" that a device sends.

    The bytes are those of a ring over the slices, on which each device of a slice sends its share: an all-reduce of B
    bytes among k slices with n devices each sends 2 B/n (k − 1)/k.

    Args:
        devices: the number of devices in all slices; a program with fewer is the program of one slice.
    """
    found: dict[str, dict[str, float]] = {}

    def add(kind: str, times: int, share: float, among: int) -> None:
        row = found.setdefault(kind, {"count": 0, "bytes": 0.0})
        row["count"] += times
        row["bytes"] += times * (2 if kind == "all-reduce" else 1) * share * (among - 1) / among

    for one in collectives(program) if slices > 1 and program.devices == devices else []:
        members = groups(one.attributes, devices) // (devices // slices)
        among = max(len(set(group)) for group in members.tolist())
        if among == 1:
            continue
        if one.kind == "collective-permute":
            share = one.bytes * float((members[:, 0] != members[:, 1]).mean())
            add(one.kind, one.times, share * among / (among - 1), among)
        else:
            add(one.kind, one.times, one.bytes / (one.devices / among), among)
    for execution in executions(program):
        instruction = execution.instruction
        kind = re.search(r'_xla_megascale_transfer_type="?(\w+)', instruction.attributes)
        if instruction.opcode == "send" and kind and slices > 1:
            scope = program.computations[execution.computation]
            put_in = scope[instruction.operands[0]].results
            name = kind[1].lower().replace("_", "-")
            size = float(sum(array.bytes for array in put_in))
            add(name, execution.times, size * slices if name == "all-gather" else size, slices)
    return found

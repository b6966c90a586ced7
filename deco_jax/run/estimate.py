"""How fast a compiled program would run on a chip: XLA's own cost model, and the bytes that travel at the links' speed.

It is a model and not a measurement: it ranks programs and names their most expensive parts.
"""

from __future__ import annotations

from typing import Any

from deco_jax.run import program as program_lib
from deco_jax.run.hardware import Chip
from deco_jax.run.program import Collective, Program
from deco_jax.run.slices import crossing

DEAREST = 10  # ops that the report lists


def estimate(program: Program, chip: Chip | None, flops: float, devices: int, slices: int = 1) -> dict[str, Any]:
    """Return what a program's text says about its speed, as JSON values; None for what isn't known about the chip.

    Args:
        flops: of the model per run of the program, on all devices together.
        slices: the number of slices that the devices belong to.

    Returns:
        "cycles" and "compute_seconds" from XLA's model, which only exists for TPUs; "least_seconds", the time of the
        arithmetic at the chip's peak; "share_of_peak"; "parts" (share of the cycles) and the most expensive ops,
        "dearest"; "collectives" by kind ("count" and "bytes" that a chip sends, and the share "in_loops") with
        "link_seconds"; "between_slices" by kind, what a chip sends over the network, which no estimate of seconds
        includes; "bound": "compute" or "links"; "seconds" per run if computation hides all transfers; and the
        "largest_array" on a chip.
    """
    costs, transfers = program_lib.costs(program), program_lib.collectives(program)
    cycles = sum(cost.total for cost in costs)
    compute = cycles / chip.clock if chip and chip.clock and cycles else None
    least = flops / (chip.peak * devices) if chip and flops else None
    sent = sum(transfer.sent * transfer.times for transfer in transfers)
    links = sent / chip.links if chip else None
    known = compute if compute is not None else least
    seconds = max(compute, links) if compute is not None and links is not None else None
    array, made = program_lib.largest(program, 1)[0]
    return {
        "cycles": cycles or None,
        "compute_seconds": compute,
        "least_seconds": least,
        "share_of_peak": least / seconds if least and seconds else None,
        "parts": program_lib.shares(costs),
        "dearest": [
            {
                "share": cost.total / cycles,
                "times": cost.times,
                "part": program_lib.part(cost),
                "makes": str(cost.results[0]) if cost.results else "",
                "op": cost.op_name,
                "source": cost.source,
            }
            for cost in costs[:DEAREST]
        ],
        "collectives": by_kind(transfers),
        "between_slices": crossing(program, slices, devices),
        "link_seconds": links,
        "bound": None if known is None or links is None else ("compute" if known >= links else "links"),
        "seconds": seconds,
        "unknown_loops": [
            e.instruction.name
            for e in program_lib.executions(program)
            if e.instruction.opcode == "while" and program_lib.trip_count(program, e.computation, e.instruction) is None
        ],
        "largest_array": {
            "type": str(array),
            "bytes": array.bytes,
            "op": made.instruction.op_name,
            "source": program_lib.source(program, made.instruction),
        },
    }


def by_kind(transfers: list[Collective]) -> dict[str, dict[str, float]]:
    """Count the collectives of a run by kind: their number, the bytes that a chip sends, and those inside loops."""
    found: dict[str, dict[str, float]] = {}
    for transfer in transfers:
        row = found.setdefault(transfer.kind, {"count": 0, "bytes": 0.0, "in_loops": 0.0})
        row["count"] += transfer.times
        row["bytes"] += transfer.sent * transfer.times
        row["in_loops"] += transfer.sent * transfer.times if transfer.loops else 0.0
    return found


def words(values: dict[str, Any], chip: str | None) -> list[str]:
    """Return an estimate as readable lines."""
    lines = []
    array = values["largest_array"]
    lines.append(f"largest     {array['type']}, {array['bytes'] / 2**20:.4g} MiB, {array['source'] or array['op']}")
    for what, found in (("sends", values["collectives"]), ("sends to other slices", values["between_slices"])):
        kinds = [f"{kind} {row['count']:g} x, {row['bytes'] / 1e6:.4g} MB" for kind, row in found.items()]
        if kinds:
            lines.append(f"a chip {what} " + "; ".join(kinds))
    if values["compute_seconds"] is not None:
        share = f", {values['share_of_peak']:.1%} of peak" if values["share_of_peak"] else ""
        lines.append(
            f"estimate    {values['seconds']:.4g} s{share}, limited by {values['bound']}: "
            f"{values['compute_seconds']:.4g} s of computation, {values['link_seconds']:.4g} s on the links "
            "(XLA's model of the chip, not a measurement)"
        )
        parts = ", ".join(f"{name} {share:.1%}" for name, share in values["parts"].items())
        lines.append(f"cycles by part: {parts}")
        lines.append("the most expensive ops:")
        lines += [
            f"  {row['share']:>5.1%}  {row['times']:>4} x  {row['part']:<10} {row['makes']:<28} "
            f"{row['source'] or row['op']}"
            for row in values["dearest"]
        ]
    elif values["least_seconds"] is not None:
        lines.append(
            f"at least    {values['least_seconds']:.4g} s of arithmetic at the peak of a {chip}, "
            f"{values['link_seconds']:.4g} s on its links; XLA gives no other estimate for it"
        )
    if values["unknown_loops"]:
        lines.append(f"counted once, because their lengths are unknown: {', '.join(values['unknown_loops'])}")
    return lines

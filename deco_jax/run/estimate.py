"""How fast a compiled program would run on a chip: XLA's own cost model, and the bytes that travel at the links' speed.

It is a model and not a measurement: it ranks programs and names their dear parts.
"""

from __future__ import annotations

from typing import Any

from deco_jax.run import program as program_lib
from deco_jax.run.hardware import Chip
from deco_jax.run.program import Collective, Program
from deco_jax.run.slices import crossing

DEAREST = 10  # ops that the report lists


def estimate(program: Program, chip: Chip | None, flops: float, devices: int, slices: int = 1) -> dict[str, Any]:
    """What a program's text says of its speed, as JSON values; None for what is not known of the chip.

    Args:
        flops: of the model in a run of the program, on all devices together.
        slices: that the devices are of.

    Returns:
        "cycles" and "compute_seconds" by XLA's model, which is written for TPUs alone; "least_seconds", what the
        arithmetic takes at the chip's peak; "share_of_peak"; "parts" (share of the cycles) and "dearest" ops;
        "collectives" by kind ("count" and "bytes" sent by a chip, and "in_loops" of them) with "link_seconds";
        "between_slices" by kind, what a chip sends over the network, which is in no estimate of seconds;
        "bound": "compute" or "links"; "seconds" of a run if transfers hide behind the computation entirely; and the
        "largest_array" that a chip holds.
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
    """Collectives of a run by their kind: how many, bytes that a chip sends, and how many of these within loops."""
    found: dict[str, dict[str, float]] = {}
    for transfer in transfers:
        row = found.setdefault(transfer.kind, {"count": 0, "bytes": 0.0, "in_loops": 0.0})
        row["count"] += transfer.times
        row["bytes"] += transfer.sent * transfer.times
        row["in_loops"] += transfer.sent * transfer.times if transfer.loops else 0.0
    return found


def words(values: dict[str, Any], chip: str | None) -> list[str]:
    """An estimate as lines for people."""
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
            f"estimate    {values['seconds']:.4g} s{share}, bound by {values['bound']}: "
            f"{values['compute_seconds']:.4g} s of computation, {values['link_seconds']:.4g} s on the links "
            "(XLA's model of the chip, not a measurement)"
        )
        parts = ", ".join(f"{name} {share:.1%}" for name, share in values["parts"].items())
        lines.append(f"cycles by part: {parts}")
        lines.append("the dearest ops:")
        lines += [
            f"  {row['share']:>5.1%}  {row['times']:>4} x  {row['part']:<10} {row['makes']:<28} "
            f"{row['source'] or row['op']}"
            for row in values["dearest"]
        ]
    elif values["least_seconds"] is not None:
        lines.append(
            f"at least    {values['least_seconds']:.4g} s of arithmetic at the peak of a {chip}, "
            f"{values['link_seconds']:.4g} s on its links; XLA estimates no more for it"
        )
    if values["unknown_loops"]:
        lines.append(f"counted once, as their lengths are not known: {', '.join(values['unknown_loops'])}")
    return lines

"""Settings of training on machines that fail."""

from __future__ import annotations

import dataclasses

from deco_jax.schema import MAX_INT32, Rule, at_least, setting


@dataclasses.dataclass(frozen=True)
class FailureSettings:
    """Of a hung step, a slow disk, and copies on the hosts' own disks."""

    step_timeout: float = setting(
        0.0,
        "Seconds after which a step that hasn't ended ends the run, to be started again; compiling, saving and "
        "evaluation don't count; 0: no limit.",
        Rule(lambda value: value == 0 or 1 <= value <= 1e6, "0, or from 1 to 1,000,000"),
    )
    save_wait: float = setting(
        60.0,
        "Seconds that a save may wait for the one before, while steps wait; then it comes at the next line of metrics.",
        at_least(0, 1e6),
    )
    local_copies: str = setting(
        "", "Folder on each host's own disk for copies of the state, restored first where they are newer; empty: none."
    )
    local_copies_every: int = setting(500, "Steps between two of them.", at_least(1, MAX_INT32))

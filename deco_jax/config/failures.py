"""Settings for training on machines that fail."""

from __future__ import annotations

import dataclasses

from deco_jax.schema import MAX_INT32, Rule, at_least, setting


@dataclasses.dataclass(frozen=True)
class FailureSettings:
    """Settings for hung steps, slow disks, and copies on the hosts' own disks."""

    step_timeout: float = setting(
        0.0,
        "Seconds after which an unfinished step ends the run, so that the launcher restarts it; compiling, saving and "
        "evaluation don't count; 0: no limit.",
        Rule(lambda value: value == 0 or 1 <= value <= 1e6, "0, or from 1 to 1,000,000"),
    )
    save_wait: float = setting(
        60.0,
        "Seconds for which a save, and the steps, wait for the previous save; after that, the save is postponed to the "
        "next line of metrics.",
        at_least(0, 1e6),
    )
    local_copies: str = setting(
        "", "Folder on each host's own disk for copies of the state, restored first if they are newer; empty: none."
    )
    local_copies_every: int = setting(500, "Steps between two local copies.", at_least(1, MAX_INT32))

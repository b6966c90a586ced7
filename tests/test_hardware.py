"""The compiler flag that the program sets for itself."""

from __future__ import annotations

import os

import pytest

from deco_jax.run import hardware

pytestmark = pytest.mark.fast

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    "jaxlib, before, after",
    [
        ("0.10.2", "", f"{FLAG}=reduce"),
        ("0.12.0.1", "--xla_dump_to=here", f"--xla_dump_to=here {FLAG}=reduce"),
        ("0.10.2", f"{FLAG}=dot", f"{FLAG}=dot"),  # as the user says
        ("0.9.2", "", ""),  # XLA would end the process
        ("0.13.0", "", ""),
    ],
)
def test_only_where_it_is_known_and_not_set(monkeypatch, jaxlib, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(hardware, "version", lambda package: {"jaxlib": jaxlib}[package])
    hardware.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == after

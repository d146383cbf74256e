"""What the compiler makes of the kernel for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]


def report(*options: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.hardware.triton_compile_report", "--quick", "--json", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


def check(row: dict[str, Any]) -> None:
    """No spills, shared memory within the limit and the estimate; docs/gpu.md, "Versions", says what Triton before 3.9
    makes of the source, which stays as it was shown correct on an H100.
    """
    spills = tile = 0
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        tile = 2 * row["config"]["block_t"] * row["config"]["block_n"]
        spills = 4 if (row["arch"], row["kernel"], row["R"]) == ("sm_90", "forward", 512) else 0
    assert row["spills"] <= spills, row
    assert row["stack"] <= 2 * spills, row
    assert row["shared"] <= min(row["shared_estimate"] + tile, row["shared_limit"]), row
    assert len(row["faults"]) == (row["spills"] > 0) + (row["shared"] > row["shared_estimate"]), row


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    """Of every architecture; sm_86 is as sm_89."""
    return report("--arch", "80", "89", "90", "100", "120")


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_shipped_configurations_compile_to_matrix_instructions_without_spills(shipped, arch):
    rows = [row for row in shipped if row["arch"] == f"sm_{arch}"]
    assert {row["kernel"] for row in rows} == {"forward", "backward"}
    assert {row["config"]["slices"] > 0 for row in rows} == {False, True}, "both schedules"
    instruction = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma")
    for row in rows:
        check(row)
        assert row[instruction] > 0, row


def test_prepared_variants_compile_without_spills_and_within_their_estimate():
    """For the architecture that they are prepared for; the report compiles all of them for any."""
    rows = report("--variants", "--arch", "90")
    assert {row["kernel"] for row in rows} == {"forward", "backward"}
    assert {(row["config"]["expand_stages"], row["config"]["early"]) for row in rows} == {(None, False), (None, True)}
    for row in rows:
        check(row)

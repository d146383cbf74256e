"""What the compiler makes of the kernel for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "bench" / "compile_report.py"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_configurations_compile_to_matrix_instructions_without_spills(arch):
    """No spills, shared memory within the limit and the estimate, matrix instructions of the architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(REPORT), "--quick", "--json", "--arch", str(arch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout, run.stderr
    rows = json.loads(run.stdout)
    assert {row["kernel"] for row in rows} == {"forward", "backward"}
    assert {row["config"]["slices"] > 0 for row in rows} == {False, True}, "both schedules"
    instruction = {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
    for row in rows:
        assert not row["faults"], row
        assert (row["spills"], row["stack"]) == (0, 0), row
        assert row["shared"] <= row["shared_limit"], row
        assert row[instruction] > 0, row

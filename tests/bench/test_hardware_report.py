"""What the report says of rows, on rows made up for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verify_rows import passing, write

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
if not (ROOT / "bench" / "hardware" / "report.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

from bench.hardware import report  # noqa: E402


def test_the_command_prints_and_exits_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "bench.hardware.report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command[2:])
    assert (report.main(), capsys.readouterr().out.splitlines()[-1]) == (1, "no trial of any backend is there")
    write(tmp_path, passing("cuda"))
    right = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert right.returncode == 0, right.stdout + right.stderr
    assert "cuda: shown correct on sm_90" in right.stdout.splitlines()[-1]


def test_each_failure_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused result and a trial that came to no result both leave a row that says how the trial ended."""
    rows = passing("triton")
    refused, died = rows[1], rows[4]
    refused |= {"passed": False, "why": "y is wrong"}
    rows[2] |= {"ended": "failed", "why": "y is wrong"}
    rows[5] |= {"ended": "died", "why": "code -11"}
    rows.remove(died)
    write(tmp_path, rows)
    assert report.print_correctness(tmp_path) == ["triton"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert told == [f"FAILED {refused['trial']}: y is wrong", f"FAILED {died['trial']}: code -11"]
    assert "2 trials did not pass" in "; ".join(report.shortcomings(tmp_path, "triton"))

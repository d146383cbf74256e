"""What rows show kernels correct, and how an entry of the ledger is accepted, on rows made up for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsc_kernels import verified_hardware

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
if not (ROOT / "bench" / "hardware" / "report.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

from bench.hardware import report  # noqa: E402

Row = dict[str, Any]
FACTS = {"what": "environment", "torch": "2.11.0", "triton": "3.6.0", "source": "x", "dry_run": False}


def passing(backend: str) -> list[Row]:
    """The rows of a run in which everything went well."""
    rows: list[Row] = []
    for key, trial in report.trials([backend], dry_run=False).items():
        case = trial.payload.case
        facts = {
            "trial": key,
            "backend": backend,
            "source": verified_hardware.checkout_source(backend),
            "dry_run": False,
        }
        served = case is None or (case.dtype != "float32" and case.d_in % 8 == case.d_out % 8 == 0)
        passed = True if backend == "triton" or served else None
        row = {
            "what": trial.payload.what, "case": case and case._asdict(), "arch": "sm_90", "device": "a GPU",
            "passed": passed, "why": None if passed else "not served",
        }  # fmt: skip
        rows += [facts | {"started": 0}, facts | row, facts | {"ended": "done"}]
    return rows


def write(folder: Path, backend: str, rows: list[Row]) -> None:
    launches = {
        "trial": "l",
        "backend": backend,
        "source": verified_hardware.checkout_source(backend),
        "dry_run": False,
    }
    for name, content in (
        ("correctness", rows),
        ("launches", [launches | {"launches": 1}]),
        ("environment", [FACTS]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.mark.parametrize("backend", verified_hardware.BACKENDS)
def test_everything_passed_earns_an_entry_without_a_gpu(tmp_path: Path, backend: str) -> None:
    write(tmp_path, backend, passing(backend))
    assert report.shortcomings(tmp_path, backend) == []
    earned = report.entry(tmp_path, backend)
    assert earned["source"] == verified_hardware.checkout_source(backend)
    assert (earned["arch"], earned["torch"]) == ("sm_90", "2.11.0")
    assert earned["cases"] > 60


def change(index: int, **values: Any) -> Callable[[list[Row]], list[Row]]:
    """The row of the ``index``-th trial with other values; the rows of a trial are three."""
    return lambda rows: [row | values if i == 3 * index + 1 else row for i, row in enumerate(rows)]


def drop(rows: list[Row]) -> list[Row]:
    return rows[3:]


def cut_off(rows: list[Row]) -> list[Row]:
    return rows[:-2]


def died(rows: list[Row]) -> list[Row]:
    """Within the third trial, before it said anything."""
    return [*rows[:7], rows[8] | {"ended": "died", "why": "its process ended with code -11"}, *rows[9:]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change(4, passed=False, why="y: error 1, bound 0"), "1 trials did not pass.*y: error 1"),
        (change(4, passed=None, why="no"), "1 trials did not pass"),
        (change(4, source="another"), "of another source"),
        (change(4, dry_run=True), "of a dry run"),
        (change(4, arch="sm_100"), "several architectures"),
        (drop, "1 trials are missing, as triton accuracy T=130"),
        (cut_off, "1 trials are missing, as triton beyond_int32"),
        (died, "1 trials did not pass.*code -11"),
    ],
)
def test_less_than_everything_does_not(tmp_path: Path, spoil: Any, says: str) -> None:
    write(tmp_path, "triton", spoil(passing("triton")))
    assert any(re.search(says, line) for line in report.shortcomings(tmp_path, "triton"))


@pytest.mark.parametrize("what", ["beyond_int32", "external_streams"])
def test_what_a_machine_cannot_try_costs_nothing(tmp_path: Path, what: str) -> None:
    rows = passing("triton")
    index = next(i for i, row in enumerate(rows) if row.get("what") == what)
    rows[index] |= {"passed": None, "why": "too little memory"}
    write(tmp_path, "triton", rows)
    assert report.shortcomings(tmp_path, "triton") == []
    rows[index] |= {"passed": False}
    write(tmp_path, "triton", rows)
    assert report.shortcomings(tmp_path, "triton")


def test_two_launches_are_one_too_many(tmp_path: Path) -> None:
    write(tmp_path, "triton", passing("triton"))
    rows = [json.loads(line) | {"launches": 2} for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "launches per call: ['2']" in report.shortcomings(tmp_path, "triton")


def test_an_accepted_entry_replaces_the_backends_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "verified.json"
    monkeypatch.setattr(verified_hardware, "VERIFIED", path)
    verified_hardware.entries.cache_clear()
    try:
        old = {"backend": "cuda", "arch": "sm_90", "source": "old"}
        other = {"backend": "triton", "arch": "sm_90", "source": "t"}
        path.write_text(json.dumps([old, other]))
        report.accept({"backend": "cuda", "arch": "sm_90", "source": "new"})
        assert json.loads(path.read_text()) == [other, {"backend": "cuda", "arch": "sm_90", "source": "new"}]
        assert [p.name for p in tmp_path.iterdir()] == ["verified.json"]
    finally:
        verified_hardware.entries.cache_clear()


def test_the_command_prints_and_exits_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "bench.hardware.report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command[2:])
    assert (report.main(), capsys.readouterr().out.splitlines()[-1]) == (1, "no trial of any backend is there")
    write(tmp_path, "cuda", passing("cuda"))
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
    write(tmp_path, "triton", rows)
    assert report.print_correctness(tmp_path) == ["triton"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert told == [f"FAILED {refused['trial']}: y is wrong", f"FAILED {died['trial']}: code -11"]
    assert "2 trials did not pass" in "; ".join(report.shortcomings(tmp_path, "triton"))

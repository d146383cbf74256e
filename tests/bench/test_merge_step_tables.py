"""The table of a merge's steps says what was reached, on rows made up for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

if not (Path(__file__).resolve().parents[2] / "bench" / "merging" / "merge_step_tables.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

from bench.merging.merge_step_tables import print_merge_step


def test_the_table_of_a_merge_step(tmp_path, capsys):
    names = {"loop/triton": 100.0, "peft": 450.0, "floor": 80.0, "concatenated": 150.0}
    rows = [
        {
            "trial": "triton LLaMA-3-8B", "backend": "triton", "model": "LLaMA-3-8B", "contender": name,
            "name": name.partition("/")[0], "round": turn, "ms": ms * (1 + turn), "peak_bytes": 1e9, "objective": 0.5,
            "dry_run": False,
        }
        for turn in range(2)
        for name, ms in names.items()
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_merge_step(tmp_path / "m.jsonl")
    printed = capsys.readouterr().out
    assert "times faster than peft: 4.50, to be at least 3.00: reached" in printed
    assert "times the floor: 1.25, to be at most 1.15: missed" in printed
    assert "seconds for 500 steps: 75.00, to be at most 90.00: reached" in printed

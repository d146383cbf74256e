"""The random trials themselves, a few of each, and what becomes of one that dies."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

from bench.fuzz import kills
from bench.fuzz.campaigns import run

ROOT = Path(__file__).parents[2]


def test_the_first_kills_are_right_or_refused() -> None:
    """The other campaigns have tests of their own, in which planted faults must be found."""
    trials = list(itertools.islice(kills.trials(0), 8))
    assert [trial for trial in trials if trial.outcome == "wrong"] == []
    assert any(trial.outcome == "right" for trial in trials)


def test_a_process_that_dies_is_a_wrong_trial_and_the_campaign_goes_on(tmp_path: Path) -> None:
    counts = run({"stand-in": "tests.bench.fuzz_stand_ins"}, seed=5, seconds=60, trials=7, out=tmp_path)
    # Two before the death, the death, and four of the next seed, of which the last is wrong.
    assert counts["stand-in"] == {"right": 5, "wrong": 2}
    rows = [json.loads(line) for line in (tmp_path / "wrong.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["seed 5, trial 2", "6 3"]
    assert "status -9" in rows[0]["found"]


def test_a_campaign_that_cannot_start_is_one_wrong_trial() -> None:
    counts = run({"missing": "tests.bench.no_such_campaign"}, seed=0, seconds=60, trials=None, out=None)
    assert counts["missing"] == {"wrong": 1}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "bench.fuzz", *arguments]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_counts() -> None:
    done = command("files", "--trials", "5", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["files"]
    assert (counts["trials"], counts["wrong"]) == (5, 0)


def test_an_unknown_campaign_is_refused() -> None:
    done = command("kernels")
    assert done.returncode == 2
    assert "expected some of operator, merges, adapters, files, kills, found kernels" in done.stderr

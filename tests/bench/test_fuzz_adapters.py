"""Some adapters of random kinds, and that what is wrong is found."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

import nsc_merge
from bench.fuzz import adapters


def test_no_adapter_is_merged_wrongly() -> None:
    trials = list(islice(adapters.trials(0), 40))
    assert [trial for trial in trials if trial.outcome == "wrong"] == []
    assert {trial.outcome for trial in trials} == {"right", "refused"}


def test_a_scaling_that_is_not_pefts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nsc_merge.merge

    def faulty(*arguments: Any, scale: float, **named: Any) -> Any:
        return right(*arguments, scale=1.001 * scale, **named)

    monkeypatch.setattr(nsc_merge, "merge", faulty)
    wrong = [trial for trial in islice(adapters.trials(0), 30) if trial.outcome == "wrong"]
    assert wrong
    assert all("applied: " in trial.found for trial in wrong)


def test_a_file_that_does_not_hold_the_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = nsc_merge.MergeResult.save

    def faulty(result: Any, *arguments: Any, **named: Any) -> Any:
        return saved(result.scaled(1.001), *arguments, **named)

    monkeypatch.setattr(nsc_merge.MergeResult, "save", faulty)
    wrong = [trial for trial in islice(adapters.trials(0), 30) if trial.outcome == "wrong"]
    assert wrong
    assert all(trial.found.startswith(("lora: ", "model: ")) for trial in wrong)

"""Some random merges, and that they find what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

import nsc_merge
from bench.fuzz import merges
from nsc_merge.adapters import Factor


def outcomes(seed: int, number: int) -> Counter[str]:
    return Counter(trial.outcome for trial in islice(merges.trials(seed), number))


def test_no_merge_is_wrong() -> None:
    trials = list(islice(merges.trials(0), 150))
    assert [trial for trial in trials if trial.outcome == "wrong"] == []
    assert {trial.outcome for trial in trials} == {"right", "refused"}


def test_a_trial_comes_out_the_same_again() -> None:
    assert list(islice(merges.trials(3), 20)) == [merges.trial(3, number) for number in range(20)]


def _scaled(tasks: Any, method: str, **options: Any) -> Iterator[tuple[str, Factor]]:
    for path, factor in nsc_merge.merge_factors(tasks, method, **options):
        yield path, replace(factor, scaling=1.0001)


def _other_trimming(tasks: Any, method: str, **options: Any) -> Iterator[tuple[str, Factor]]:
    other = {"next": "floor", "floor": "next", "round": "floor", "complement": "floor"}
    options |= {"keep": other[options["keep"]]} if "keep" in options else {}
    return nsc_merge.merge_factors(tasks, method, **options)


def _of_the_first_bytes(tasks: Any, method: str, **options: Any) -> Iterator[tuple[str, Factor]]:
    """As if tensors lay without gaps."""

    def read(update: Any) -> Any:
        if not isinstance(update, tuple):
            return update
        A, B, scaling = update
        return A.as_strided(A.shape, (A.shape[1], 1), 0), B, scaling

    taken = {task: {path: read(update) for path, update in row.items()} for task, row in tasks.items()}
    return nsc_merge.merge_factors(taken, method, **options)


@pytest.mark.parametrize("fault", [_scaled, _other_trimming, _of_the_first_bytes])
def test_a_wrong_merge_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "merge_factors", fault)
    assert outcomes(0, 100)["wrong"] >= 3

"""A few hundred of the random trials of ``bench/fuzz/operator.py``, and that they find what is wrong."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from test_operator import require

import nsc_kernels as nk
from bench.fuzz import operator
from bench.fuzz.trial import Trial


def wrong(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.outcome == "wrong"]


def test_no_trial_is_wrong() -> None:
    require("cpu")
    trials = list(islice(operator.trials(7), 300))
    assert not wrong(trials), wrong(trials)[0]
    assert set(Counter(trial.outcome for trial in trials)) == {"right", "refused"}


def test_a_trial_comes_out_the_same_again() -> None:
    require("cpu")
    assert list(islice(operator.trials(3), 20)) == [operator.trial(3, number) for number in range(20)]


@pytest.mark.parametrize("fault", ["sum", "coefficient", "nan", "dtype", "written"])
def test_a_wrong_answer_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator with a fault put into it: a sum that is short, two coefficients swapped, and so on."""
    right = nk.merged_lora

    def faulty(z: torch.Tensor, bank: nk.AdapterBank, lam: torch.Tensor, base: Any = None) -> torch.Tensor:
        if fault == "coefficient":
            lam = lam.flip(-1)
        y = right(z, bank, lam, base)
        if fault == "sum":
            return y * (1 - 4 * torch.finfo(y.dtype).eps)
        if fault == "written" and base is not None and not base.requires_grad:
            base.data[..., :1] += 1
        return {"nan": y.masked_fill(y > 2, torch.nan), "dtype": y.double()}.get(fault, y)

    monkeypatch.setattr(nk, "merged_lora", faulty)
    trials = list(islice(operator.trials(7), 100))
    assert len(wrong(trials)) >= 3

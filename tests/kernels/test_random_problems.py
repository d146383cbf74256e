"""A few hundred of the random trials of ``bench/fuzz/operator.py``, and that they find what is wrong."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from test_operator import require

import nsc_kernels as nk
import nsc_kernels.module
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


def layers() -> list[int]:
    """The first trials of layers in float32."""
    found = []
    for trial in range(1000):
        rng = np.random.default_rng((7, trial))
        if rng.random() < 0.15:
            continue
        p = operator.draw(7, trial, rng)
        if p.call.startswith("layer") and (p.dtype, p.mode, p.scale) == ("f32", "eager", 0) and p.tokens != "zero":
            found += [trial] if p.d_in > 60 and p.T > 10 else []
    return found[:12]


def test_a_linear_that_rounds_otherwise_than_numpy_is_not_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one output, PyTorch's own adds one small product after another to the bias, and errs by ten units."""
    right = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *arguments: right(*arguments) * (1 + 1e-5))
    trials = [operator.trial(7, number) for number in layers()]
    assert trials
    assert not wrong(trials), wrong(trials)[0]


def test_a_layer_that_is_off_by_one_part_in_ten_thousand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch's own linear makes is no excuse for another one."""
    right = nsc_kernels.module.merged_linear

    def faulty(z: torch.Tensor, linear: Any, bank: nk.AdapterBank, lam: torch.Tensor, stats: bool) -> Any:
        found = right(z, linear, bank, lam, stats)
        y = found[0] if stats else found
        return (y * 0.9999, *found[1:]) if stats else y * 0.9999

    monkeypatch.setattr(nsc_kernels.module, "merged_linear", faulty)
    assert len(wrong([operator.trial(7, number) for number in layers()])) >= 10

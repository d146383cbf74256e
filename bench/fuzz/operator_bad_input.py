"""Calls of the operator, its bank and its layer with one thing wrong in each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nsc_kernels as nk

from .trial import Trial

SLOW = 1.0  # seconds


def refusal(seed: int, number: int, rng: np.random.Generator) -> Trial:
    """A call with one thing wrong: refused with TypeError or ValueError, in one line and before long."""
    name, call = BAD[int(rng.integers(len(BAD)))]
    case = f"bad input: seed={seed} number={number} {name}"
    start = time.perf_counter()
    try:
        call(rng)
    except (TypeError, ValueError) as error:
        said, took = f"{type(error).__name__}: {error}", time.perf_counter() - start
        fair = len(said.splitlines()) == 1 and took < SLOW
        return Trial(case, "refused" if fair else "wrong", said if fair else f"{said} (after {took:.1f} s)")
    except Exception as error:  # of another kind than is promised
        return Trial(case, "wrong", f"{type(error).__name__}: {error}")
    return Trial(case, "wrong", "no error")


def _good(rng: np.random.Generator) -> dict[str, Any]:
    """A call that is right, before something in it is made wrong. No two sizes are the same."""
    T, ranks = int(rng.integers(20, 40)), (2, 5)
    bank = nk.AdapterBank.from_factors([torch.ones(r, 11) for r in ranks], [torch.ones(13, r) for r in ranks])
    return {"z": torch.ones(T, 11), "bank": bank, "lam": torch.ones(2), "base": torch.ones(T, 13)}


def _other(rng: np.random.Generator, t: Tensor) -> Tensor:
    """``t`` with another shape, dtype or device that no call takes."""
    way = int(rng.integers(5))
    if way == 0:
        return t[..., :-1]
    if way == 1:
        return torch.cat([t, t], -1)
    if way == 2:
        return t.to((torch.float64, torch.int32, torch.bool, torch.complex64)[int(rng.integers(4))])
    return t.to("meta") if way == 3 else torch.ones(())


def _argument(name: str) -> Callable[[np.random.Generator], Any]:
    def call(rng: np.random.Generator) -> Any:
        good = _good(rng)
        wrong: list[Any] = [_other(rng, good[name])] if isinstance(good[name], Tensor) else []
        wrong += [[1.0], 0.5, "z", *([None] if name != "base" else [])]
        good[name] = wrong[0] if rng.random() < 0.7 else wrong[int(rng.integers(len(wrong)))]
        return (nk.merged_lora, nk.merged_lora_nsc)[int(rng.integers(2))](**good)

    return call


def _factor(change: Callable[[np.random.Generator, list[Any], list[Any], dict[str, Any]], Any]) -> Any:
    def call(rng: np.random.Generator) -> Any:
        A: list[Any] = [torch.ones(r, 11) for r in (2, 3)]
        B: list[Any] = [torch.ones(13, r) for r in (2, 3)]
        options: dict[str, Any] = {}
        change(rng, A, B, options)
        return nk.AdapterBank.from_factors(A, B, **options)

    return call


def _layer(change: dict[str, Any]) -> Any:
    def call(rng: np.random.Generator) -> Any:
        good = {"linear": nn.Linear(11, 13), "bank": _good(rng)["bank"], "lam": [0.5, 0.5]}
        return nk.MergedLoRALinear(**{**good, **change})

    return call


def _not_finite(rng: np.random.Generator, t: Tensor) -> None:
    t.view(-1)[int(rng.integers(t.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))


def _none(rng: np.random.Generator, A: list[Any], B: list[Any], options: dict[str, Any]) -> None:
    A.clear()
    B.clear()


def _offsets(rng: np.random.Generator) -> Any:
    wrong: list[Any] = [(0,), (), (1, 5), (0, 6), (0, 4, 2, 5), (0, 2.5, 5), (0, np.nan, 5), ("0", "5")]
    wrong += [(-1, 5), (0, 5, 5, 4)]
    return nk.AdapterBank(torch.ones(5, 11), torch.ones(5, 13), wrong[int(rng.integers(len(wrong)))])


BAD: tuple[tuple[str, Callable[[np.random.Generator], Any]], ...] = (
    *((name, _argument(name)) for name in ("z", "lam", "base", "bank")),
    ("no adapters", _factor(_none)),
    ("one B missing", _factor(lambda rng, A, B, o: B.__delitem__(1))),
    ("A of another shape, dtype, device", _factor(lambda rng, A, B, o: A.__setitem__(1, _other(rng, A[1])))),
    ("B of another shape, dtype, device", _factor(lambda rng, A, B, o: B.__setitem__(1, _other(rng, B[1])))),
    ("NaN or infinity in A", _factor(lambda rng, A, B, o: _not_finite(rng, A[int(rng.integers(2))]))),
    ("NaN or infinity in B", _factor(lambda rng, A, B, o: _not_finite(rng, B[int(rng.integers(2))]))),
    ("scaling", _factor(lambda rng, A, B, o: o.update(scaling=[1.0, (np.nan, np.inf)[int(rng.integers(2))]]))),
    ("scalings", _factor(lambda rng, A, B, o: o.update(scaling=[1.0] * (1, 3)[int(rng.integers(2))]))),
    ("rtol", _factor(lambda rng, A, B, o: o.update(rtol=(np.nan, -1.0, 1.0, np.inf, "0")[int(rng.integers(5))]))),
    ("dtype", _factor(lambda rng, A, B, o: o.update(dtype=(torch.int8, torch.bool)[int(rng.integers(2))]))),
    ("offsets", _offsets),
    ("layer: not a linear", _layer({"linear": nn.Conv1d(11, 13, 1)})),
    ("layer: sizes", _layer({"linear": nn.Linear(13, 11)})),
    ("layer: lam", _layer({"lam": [0.5]})),
    ("layer: device", _layer({"linear": nn.Linear(11, 13, device="meta")})),
)

"""How much of the adapters' updates is left in a merge: Frobenius norms, of the factors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsc_kernels.devices import with_float64
from nsc_merge.adapters import Factor
from nsc_merge.adapters.algebra.low_rank import Rows
from nsc_merge.models.bases.quantised import stored_or_dequantised
from nsc_merge.results.merged_update import MergedUpdate

# Rows of an update of full rank that are looked at at a time.
_ROWS = 1024


class Kept(NamedTuple):
    """Frobenius norms over all linears that a merge changes, without biases.

    Attributes:
        merged: of the merged update.
        own: task -> of its adapter's own update.
        along: task -> share of its own update that the merged one holds: their inner product over the square of
            ``own``. It is 1 for a merge that holds the update as it is, and others at right angles to it.
    """

    merged: float
    own: dict[str, float]
    along: dict[str, float]

    @property
    def total(self) -> float:
        """The norm of the merged update over that of all adapters' updates, as one long vector."""
        squares = sum(norm**2 for norm in self.own.values())
        return self.merged / squares**0.5 if squares else 0.0


def norm_kept(result: MergedUpdate) -> Kept:
    """What a merge keeps of its adapters; it must be of one update for all tasks."""
    tasks = result.tasks
    # Between the updates of the tasks, with the merged one at the end.
    products = torch.zeros(len(tasks) + 1, len(tasks) + 1, dtype=torch.float64, device="cpu")
    for path in result.paths:
        held = [number for number, task in enumerate(tasks) if path in result.adapters[task].factors]
        factors = [result.adapters[tasks[number]].factors[path] for number in held]
        base = functools.partial(_base_rows, result, path)
        if result.factors:
            places = torch.tensor([*held, len(tasks)], device="cpu")
            products[places[:, None], places] += inner_products([*factors, result.factors[path]], base)
            continue
        gram = inner_products(factors, base)
        shares = torch.tensor([share for share, _ in result.terms(path)], dtype=torch.float64, device="cpu")
        places = torch.tensor(held, device="cpu")
        products[places[:, None], places] += gram
        products[places, -1] += gram @ shares
        products[-1, -1] += shares @ gram @ shares
        products[-1, places] = products[places, -1]
    squares = dict(zip(tasks, products.diagonal().tolist(), strict=False))
    along = dict(zip(tasks, products[:, -1].tolist(), strict=False))
    return Kept(
        max(float(products[-1, -1]), 0.0) ** 0.5,
        {task: max(square, 0.0) ** 0.5 for task, square in squares.items()},
        {task: along[task] / square if square > 0 else 0.0 for task, square in squares.items()},
    )


def _base_rows(result: MergedUpdate, path: str, begin: int, end: int) -> Tensor:
    return stored_or_dequantised(result.model, f"{path}.weight").rows(begin, end)


def inner_products(factors: Sequence[Factor], base: Rows | None = None) -> Tensor:
    """Inner products (Frobenius) of the updates of one linear with each other, on the CPU; gains are of the weight
    whose rows ``base`` gives.

    Of low-rank updates they follow from products of the factors, no larger than the sum of the ranks: ``<B A, D C>`` is
    the sum of the entries of ``(B^T D) * (A C^T)``.
    """
    place = with_float64(factors[0].A.device)
    A = torch.cat([factor.A.to(place, torch.float64) for factor in factors])
    B = torch.cat([factor.scaling * factor.B.to(place, torch.float64) for factor in factors], 1)
    owner = torch.repeat_interleave(torch.tensor([factor.rank for factor in factors], device="cpu"))
    blocks = torch.nn.functional.one_hot(owner, len(factors)).double()
    gram = blocks.t() @ ((B.t() @ B) * (A @ A.t())).cpu() @ blocks
    single_A, single_B = A.float(), B.float()
    wide = [number for number, factor in enumerate(factors) if factor.dense is not None or factor.gain is not None]
    # In single precision, whose error is no figure of a card: it would take as long again as writing the update.
    for begin in range(0, B.shape[0] if wide else 0, _ROWS):
        end = min(begin + _ROWS, B.shape[0])
        held = {number: _rows_of_full_rank(factors[number], begin, end, base).to(place) for number in wide}
        for number, rows in held.items():
            read = (single_B[begin:end].t() @ rows).mul_(single_A).sum(1, dtype=torch.float64)
            with_low_rank = blocks.t() @ read.cpu()
            gram[number] += with_low_rank
            gram[:, number] += with_low_rank
            for other, same in held.items():
                gram[number, other] += float((rows * same).sum(dtype=torch.float64))
    return gram


def _rows_of_full_rank(factor: Factor, begin: int, end: int, base: Rows | None) -> Tensor:
    """What an update is beside its factors: its dense part, and what its gain makes of the base's rows."""
    parts = []
    if factor.dense is not None:
        parts.append(factor.dense[begin:end].float())
    if factor.gain is not None:
        assert base is not None, "a gain is of the base's weight"
        rows = base(begin, end).float()
        parts.append(factor.gain[begin:end, None].to(rows) * rows)
    return factor.scaling * sum(parts[1:], parts[0])

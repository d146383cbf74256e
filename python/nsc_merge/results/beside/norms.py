"""How much of the adapters' updates is left in a merge: Frobenius norms, of the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsc_merge.adapters import Factor
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
    products = torch.zeros(len(tasks) + 1, len(tasks) + 1, dtype=torch.float64)
    for path in result.paths:
        held = [number for number, task in enumerate(tasks) if path in result.adapters[task].factors]
        factors = [result.adapters[tasks[number]].factors[path] for number in held]
        if result.factors:
            places = torch.tensor([*held, len(tasks)])
            products[places[:, None], places] += inner_products([*factors, result.factors[path]])
            continue
        gram = inner_products(factors)
        shares = torch.tensor([share for share, _ in result.terms(path)], dtype=torch.float64)
        places = torch.tensor(held)
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


def inner_products(factors: Sequence[Factor]) -> Tensor:
    """Inner products (Frobenius) of the updates of one linear with each other, on the CPU.

    Of low-rank updates they follow from products of the factors, no larger than the sum of the ranks: ``<B A, D C>`` is
    the sum of the entries of ``(B^T D) * (A C^T)``.
    """
    place = factors[0].A.device
    A = torch.cat([factor.A.to(place, torch.float64) for factor in factors])
    B = torch.cat([factor.scaling * factor.B.to(place, torch.float64) for factor in factors], 1)
    owner = torch.repeat_interleave(torch.tensor([factor.rank for factor in factors]))
    blocks = torch.nn.functional.one_hot(owner, len(factors)).double()
    gram = blocks.t() @ ((B.t() @ B) * (A @ A.t())).cpu() @ blocks
    single_A, single_B = A.float(), B.float()
    for number, factor in enumerate(factors):
        if factor.dense is None:
            continue
        # In single precision, whose error is no figure of a card: it would take as long again as writing the update.
        for begin in range(0, B.shape[0], _ROWS):
            rows = factor.scaling * factor.dense[begin : begin + _ROWS].to(place, torch.float32)
            read = (single_B[begin : begin + _ROWS].t() @ rows).mul_(single_A).sum(1, dtype=torch.float64)
            with_low_rank = blocks.t() @ read.cpu()
            gram[number] += with_low_rank
            gram[:, number] += with_low_rank
            for other, second in enumerate(factors):
                if second.dense is not None:
                    same = second.scaling * second.dense[begin : begin + _ROWS].to(place, torch.float32)
                    gram[number, other] += float((rows * same).sum(dtype=torch.float64))
    return gram

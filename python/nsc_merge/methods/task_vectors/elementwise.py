"""What methods that look at single entries of the updates share: dense updates one module at a time, thresholds over
all modules without holding them, and the three steps of TIES.

Names of the steps: arXiv 2306.01708 (TIES-Merging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor

# (path, task) -> the tensor to merge. Called anew in every pass, so that no pass holds all modules.
Source = Callable[[str, str], Tensor]

TRIM_SCOPES = ("global", "tensor")
SIGNS = ("sum", "weighted", "count")
ZEROS = ("majority", "positive", "negative")
AGGREGATES = ("mean", "sum", "weight")

_HALF = 1 << 16


@dataclass(frozen=True)
class Ties:
    """How tensors of one shape are merged; see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`."""

    density: float
    trim_scope: str
    sign: str
    zero: str
    aggregate: str


def dense_update(factor: Factor) -> Tensor:
    """``s B A`` as a float32 matrix ``[d_out, d_in]``."""
    return (factor.scaling * factor.B.float()) @ factor.A.float()


def dense_factor(update: Tensor) -> Factor:
    """A dense update as a method returns it."""
    rows, columns = update.shape
    return Factor(update.new_empty(0, columns), update.new_empty(rows, 0), 1.0, dense=update)


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, without a stack of them."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def tasks_by_path(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> dict[str, list[str]]:
    """Path -> the tasks whose adapter touches it."""
    return {path: [task for task, adapter in adapters.items() if path in adapter.factors] for path in paths}


def thresholds(source: Source, tasks: Mapping[str, Sequence[str]], density: float) -> dict[str, float]:
    """Task -> the magnitude of the n-th largest of the N entries of all its tensors, n = density N rounded down;
    infinity if n is 0.

    Exact in float32, in two passes over the tensors, which need not exist at the same time: non-negative floats are
    ordered as their bit patterns are, so one pass counts the upper halves of the patterns and the other the lower
    halves of those that share the upper half sought.

    Args:
        source: of the tensors.
        tasks: path -> tasks that have a tensor there.
        density: above 0, at most 1.
    """
    names = list(dict.fromkeys(task for row in tasks.values() for task in row))
    upper = {task: torch.zeros(_HALF // 2, dtype=torch.int64) for task in names}
    for task, pattern in _patterns(source, tasks):
        upper[task] += torch.bincount(pattern >> 16, minlength=_HALF // 2)
    found, sought = {}, {}
    for task in names:
        wanted = int(density * int(upper[task].sum()))
        if wanted:
            sought[task] = (*_nth_from_above(upper[task], wanted), wanted)
        else:
            found[task] = float("inf")
    lower = {task: torch.zeros(_HALF, dtype=torch.int64) for task in sought}
    for task, pattern in _patterns(source, tasks):
        if task in sought:
            inside = pattern[pattern >> 16 == sought[task][0]]
            lower[task] += torch.bincount(inside & (_HALF - 1), minlength=_HALF)
    for task, (half, above, wanted) in sought.items():
        other, _ = _nth_from_above(lower[task], wanted - above)
        found[task] = float(torch.tensor([half << 16 | other], dtype=torch.int32).view(torch.float32))
    return found


def threshold(tensor: Tensor, density: float) -> float:
    """:func:`thresholds` of one tensor."""
    return thresholds(lambda path, task: tensor, {"": [""]}, density)[""]


def _patterns(source: Source, tasks: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
    for path, row in tasks.items():
        for task in row:
            yield task, source(path, task).abs().float().contiguous().view(torch.int32).flatten()


def _nth_from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th entry from above, and how many lie in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_above, wanted))
    return len(counts) - 1 - index, int(from_above[index - 1]) if index else 0


def trim(tensor: Tensor, least: float) -> Tensor:
    """``tensor`` with the entries of a magnitude below ``least`` set to zero."""
    return torch.where(tensor.abs().float() >= least, tensor, 0.0)


def elect(votes: Sequence[Tensor], zero: str) -> Tensor:
    """The sign, -1 or 1, of the sum of ``votes`` at each position.

    Args:
        votes: of one shape.
        zero: what a tie becomes: ``"positive"``, ``"negative"``, or the ``"majority"`` of the tensor's other
            positions.
    """
    elected = added(votes).sign()
    majority = elected.sum() if zero == "majority" else elected.new_tensor(1.0 if zero == "positive" else -1.0)
    return torch.where(elected == 0, torch.where(majority >= 0, 1.0, -1.0).to(elected), elected)


def disjoint(values: Sequence[Tensor], agrees: Sequence[Tensor], weights: Sequence[float], aggregate: str) -> Tensor:
    """The weighted sum of ``values`` where they agree with the elected sign, divided by how many do (``"mean"``), by
    their weights (``"weight"``) or not at all (``"sum"``).
    """
    total, divisor = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for value, agree, weight in zip(values, agrees, weights, strict=True):
        total.add_(value * agree, alpha=weight)
        divisor.add_(agree, alpha=1.0 if aggregate == "mean" else weight)
    return total if aggregate == "sum" else total.div_(divisor.masked_fill_(divisor == 0, 1.0))


def ties_merge(
    source: Source, tasks: Mapping[str, Sequence[str]], settings: Ties, weights: Mapping[str, float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Trim, elect and combine, one module in memory at a time; a task that is absent from a module has no vote there.

    Args:
        source: of the tensors; of one shape per path.
        tasks: path -> tasks that have a tensor there.
        settings: of the three steps.
        weights: task -> weight, 1 each when None.
    """
    trims = settings.density < 1
    least = thresholds(source, tasks, settings.density) if trims and settings.trim_scope == "global" else {}
    for path, row in tasks.items():
        values = [source(path, task) for task in row]
        if trims:
            for index, task in enumerate(row):
                bound = least[task] if task in least else threshold(values[index], settings.density)
                values[index] = trim(values[index], bound)
        shares = [1.0 if weights is None else weights[task] for task in row]
        votes = values
        if settings.sign == "weighted":
            votes = [share * value for share, value in zip(shares, values, strict=True)]
        signs = elect([vote.sign() for vote in votes] if settings.sign == "count" else votes, settings.zero)
        yield path, disjoint(values, [vote.sign() == signs for vote in votes], shares, settings.aggregate)

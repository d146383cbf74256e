"""What methods that look at single entries of the updates share: dense updates one module at a time, thresholds over
all modules without holding them, and the three steps of TIES.

Names of the steps: arXiv 2306.01708 (TIES-Merging).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsc_kernels.modes import without_autocast
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import CANCELS

# (path, task) -> the tensor to merge. Called anew in every pass, so that no pass holds all modules.
Source = Callable[[str, str], Tensor]

TRIM_SCOPES = ("global", "tensor")
KEEPS = ("next", "floor", "round", "complement")
SIGNS = ("sum", "weighted", "count")
ZEROS = ("majority", "positive", "negative")
AGGREGATES = ("mean", "sum", "weight")

_HALF = 1 << 16


@dataclass(frozen=True)
class Ties:
    """How tensors of one shape are merged; see :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`."""

    density: float
    trim_scope: str
    keep: str
    sign: str
    zero: str
    aggregate: str


def dense_update(factor: Factor) -> Tensor:
    """``s B A`` as a float32 matrix ``[d_out, d_in]``, or the matrix that it is."""
    if factor.dense is not None:
        return factor.scaling * factor.dense.float()
    return product(factor.scaling * factor.B.float(), factor.A.float())


def product(B: Tensor, A: Tensor) -> Tensor:
    """``B A`` in the dtype of the two, under ``torch.autocast``, too, which would round it to a narrow one."""
    with without_autocast(A.device.type):
        return B @ A


def dense_updates(adapters: Mapping[str, Adapter]) -> Source:
    """:func:`dense_update` by path and task."""
    return lambda path, task: dense_update(adapters[task].factors[path])


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, without a stack of them."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def with_sum_of(update: Tensor, kept: Tensor) -> Tensor:
    """What is ``kept`` of an update, scaled so that the sum of magnitudes is the update's (mergekit's rescaling)."""
    left = kept.abs().sum()
    return kept * torch.where(left > 0, update.abs().sum() / left, 1.0)


def weighted(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> dict[str, Adapter]:
    """Adapters with a weight in their scalings."""

    def times(weight: float, adapter: Adapter) -> Adapter:
        return adapter.with_factors(lambda _, factor: replace(factor, scaling=weight * factor.scaling))

    return {task: times(weights[task], adapter) for task, adapter in adapters.items()}


def tasks_by_path(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> dict[str, list[str]]:
    """Path -> the tasks whose adapter touches it."""
    return {path: [task for task, adapter in adapters.items() if path in adapter.factors] for path in paths}


@dataclass(frozen=True)
class Bound:
    """What trimming keeps of a tensor.

    Attributes:
        least: the least magnitude that is kept.
        first: how many of the entries of exactly that magnitude are kept, the first ones; None keeps all.
    """

    least: float
    first: int | None = None


def kept_entries(entries: int, density: float, keep: str) -> int:
    """How many of a task's ``entries`` trimming keeps; ``keep`` as in
    :class:`nsc_merge.methods.task_vectors.ties.TiesOptions`. Products are rounded as the codebases round them.
    """
    if keep == "complement":
        wanted = entries - int(entries * (1 - density)) + 1
    elif keep == "round":
        wanted = max(1, round(entries * density))
    else:
        wanted = int(entries * density) + (keep == "next")
    return min(wanted, entries)


def bounds(
    source: Source, tasks: Mapping[str, Sequence[str]], density: float, keep: str
) -> dict[tuple[str, str], Bound]:
    """Path and task -> what is kept there, of the largest among the entries of all tensors of a task.

    Exact in float32, in two passes over the tensors, which need not exist at the same time: non-negative floats are
    ordered as their bit patterns are, so one pass counts the upper halves of the patterns and the other the lower
    halves of those that share the upper half sought. A third pass only where an exact number is asked for and entries
    are equally large.

    Args:
        source: of the tensors.
        tasks: path -> tasks that have a tensor there.
        density: above 0, at most 1.
        keep: see :func:`kept_entries`.
    """
    names = list(dict.fromkeys(task for row in tasks.values() for task in row))
    upper = {task: torch.zeros(_HALF // 2, dtype=torch.int64, device="cpu") for task in names}
    for task, pattern in _patterns(source, tasks):
        upper[task] += torch.bincount(pattern >> 16, minlength=_HALF // 2).cpu()
    least, sought, spare = dict.fromkeys(names, float("inf")), {}, {}
    for task in names:
        wanted = kept_entries(int(upper[task].sum()), density, keep)
        if wanted:
            sought[task] = (*nth_from_above(upper[task], wanted), wanted)
    lower = {task: torch.zeros(_HALF, dtype=torch.int64, device="cpu") for task in sought}
    for task, pattern in _patterns(source, tasks):
        if task in sought:
            inside = pattern[pattern >> 16 == sought[task][0]]
            lower[task] += torch.bincount(inside & (_HALF - 1), minlength=_HALF).cpu()
    for task, (half, above, wanted) in sought.items():
        one = bound_within(lower[task], half, wanted - above, keep)
        least[task] = one.least
        if one.first is not None:
            spare[task] = one.first
    found = {(path, task): Bound(least[task]) for path, row in tasks.items() for task in row}
    return {**found, **_among_equals(source, found, spare)} if spare else found


def bound_within(lower: Tensor, half: int, wanted: int, keep: str) -> Bound:
    """What is kept of magnitudes that share the upper ``half`` of their bit patterns, of whose lower halves ``lower``
    counts them: the ``wanted`` largest.
    """
    other, above = nth_from_above(lower, wanted)
    least = float(torch.tensor([half << 16 | other], dtype=torch.int32, device="cpu").view(torch.float32))
    some = keep in ("floor", "round") and int(lower[other]) > wanted - above
    return Bound(least, wanted - above if some else None)


def _among_equals(
    source: Source, found: Mapping[tuple[str, str], Bound], spare: Mapping[str, int]
) -> dict[tuple[str, str], Bound]:
    """The bounds of tasks of whose entries at the bound only ``spare`` stay, the first ones."""
    left, shared = dict(spare), {}
    for (path, task), one in found.items():
        if task in left:
            equal = int((source(path, task).abs().float() == one.least).sum())
            shared[path, task] = Bound(one.least, min(equal, left[task]))
            left[task] -= min(equal, left[task])
    return shared


def bound(tensor: Tensor, density: float, keep: str) -> Bound:
    """:func:`bounds` of one tensor."""
    return bounds(lambda path, task: tensor, {"": [""]}, density, keep)["", ""]


def _patterns(source: Source, tasks: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
    for path, row in tasks.items():
        for task in row:
            yield task, source(path, task).abs().float().contiguous().view(torch.int32).flatten()


def nth_from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th entry from above, and how many lie in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_above, wanted))
    return len(counts) - 1 - index, int(from_above[index - 1]) if index else 0


def trim(tensor: Tensor, kept: Bound) -> Tensor:
    """``tensor`` with zeros in place of what is not kept."""
    magnitude = tensor.abs().float()
    stays = magnitude >= kept.least
    if kept.first is not None:
        equal = magnitude == kept.least
        stays &= ~equal | (equal.flatten().cumsum(0).view(equal.shape) <= kept.first)
    return torch.where(stays, tensor, 0.0)


def trimmed(source: Source, tasks: Mapping[str, Sequence[str]], settings: Ties) -> Source:
    """``source`` with every tensor trimmed."""
    if settings.density >= 1:
        return source
    shared = bounds(source, tasks, settings.density, settings.keep) if settings.trim_scope == "global" else None

    def one(path: str, task: str) -> Tensor:
        tensor = source(path, task)
        return trim(tensor, shared[path, task] if shared else bound(tensor, settings.density, settings.keep))

    return one


def disjoint(values: Sequence[Tensor], agrees: Sequence[Tensor], weights: Sequence[float], aggregate: str) -> Tensor:
    """The weighted sum of ``values`` where they agree with the elected sign, divided by how many do (``"mean"``), by
    their weights (``"weight"``) or not at all (``"sum"``). Weights that cancel divide by nothing.
    """
    total = torch.zeros_like(values[0])
    # What float32 leaves of a sum of 0 is some 1e-8, by which nothing must be divided.
    kind = torch.float64 if may_cancel(aggregate, weights) else total.dtype
    divisor, size = torch.zeros_like(total, dtype=kind), torch.zeros_like(total, dtype=kind)
    for value, agree, weight in zip(values, agrees, weights, strict=True):
        total.add_(value * agree, alpha=weight)
        share = 1.0 if aggregate == "mean" else weight
        divisor.add_(agree, alpha=share)
        size.add_(agree, alpha=abs(share))
    if aggregate == "sum":
        return total
    return total.div_(divisor.masked_fill_(divisor.abs() <= CANCELS * size, 1.0).to(total.dtype))


def may_cancel(aggregate: str, weights: Iterable[float]) -> bool:
    """Whether weights that values are divided by have both signs: their sum needs more than the values' own dtype."""
    return aggregate == "weight" and len({weight > 0 for weight in weights if weight}) > 1


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
    source = trimmed(source, tasks, settings)

    def ballot(path: str) -> tuple[list[Tensor], list[float], list[Tensor]]:
        values = [source(path, task) for task in tasks[path]]
        shares = [1.0 if weights is None else weights[task] for task in tasks[path]]
        if settings.sign == "weighted":
            return values, shares, [share * value for share, value in zip(shares, values, strict=True)]
        return values, shares, [value.sign() for value in values] if settings.sign == "count" else values

    @functools.cache
    def balance() -> float:
        return sum(_balance(added(ballot(path)[2]).sign()) for path in tasks)

    for path in tasks:
        values, shares, votes = ballot(path)
        signs = added(votes).sign()
        tie = -1.0 if settings.zero == "negative" else 1.0
        if settings.zero == "majority" and _cancels(signs, votes):
            # The authors' masks take what is no positive sign for a negative one, also that of no majority.
            tie = 1.0 if (balance() if settings.trim_scope == "global" else _balance(signs)) > 0 else -1.0
        signs = torch.where(signs == 0, tie, signs)
        yield path, disjoint(values, [vote.sign() == signs for vote in votes], shares, settings.aggregate)


def ties_of(tensors: Mapping[str, Tensor], settings: Ties, weights: Mapping[str, float] | None = None) -> Tensor:
    """:func:`ties_merge` of one module, given its tensor of every task."""
    ((_, merged),) = ties_merge(lambda path, task: tensors[task], {"": list(tensors)}, settings, weights)
    return merged


def _cancels(signs: Tensor, votes: Sequence[Tensor]) -> bool:
    """Whether votes other than zero add up to zero anywhere; elsewhere no tie matters."""
    tied = signs == 0
    return any(bool((tied & (vote != 0)).any()) for vote in votes)


def _balance(signs: Tensor) -> float:
    """How many more positions are positive than negative."""
    return float(signs.sum(dtype=torch.float64))

"""The methods that look at single entries, on factors: updates are formed tile by tile in :mod:`nsc_kernels.entries`.

What each function computes is defined by its namesake of :mod:`nsc_merge.methods.task_vectors.elementwise`, on dense
updates, which also serves what is no product of factors, and where the library was not built. The products of both
differ in rounding, so that of entries that only rounding tells apart another one may be trimmed; all that is done with
them is the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import entries
from nsc_kernels.entries import ALL, UPPER_BINS, Dropping, Entries, Trimming
from nsc_merge.adapters import Adapter
from nsc_merge.methods.gradient_free import present
from nsc_merge.methods.task_vectors.draws import key_of, threshold_of
from nsc_merge.methods.task_vectors.elementwise import Ties, bound_within, kept_entries, nth_from_above

# path -> the updates of the tasks that touch it, in their order. Called anew in every pass.
Layers = Callable[[str], Entries]


def serves(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> bool:
    """Whether the library is there and these modules' updates are products of factors on the CPU."""
    factors = [factor for path in paths for factor in present(adapters, path).values()]
    on_cpu = all(f.dense is None and f.A.device.type == f.B.device.type == "cpu" for f in factors)
    return on_cpu and entries.unavailable() is None


def layers_of(adapters: Mapping[str, Adapter]) -> Layers:
    """The updates of adapters."""

    def one(path: str) -> Entries:
        held = present(adapters, path).values()
        return Entries.of([f.A for f in held], [f.B for f in held], [f.scaling for f in held])

    return one


def thinned(layers: Layers, options: Any, tasks: Mapping[str, Sequence[str]]) -> Layers:
    """``layers`` with entries dropped as :func:`nsc_merge.methods.task_vectors.dare.sparsify` drops them."""
    threshold = threshold_of(options.drop)

    @functools.cache
    def rule(path: str) -> Dropping:
        keys = tuple(key_of(options.seed, task, path) for task in tasks[path])
        share = 1 / (1 - options.drop) if options.rescale == "inverse" else 1.0
        dropping = Dropping(keys, threshold, (share,) * len(keys))
        if options.rescale != "l1":
            return dropping
        sums = entries.sums(replace(layers(path), dropping=dropping))
        return replace(dropping, multipliers=tuple(float(all_ / left) if left else 1.0 for all_, left in sums))

    return lambda path: replace(layers(path), dropping=rule(path))


def weighted(layers: Layers, tasks: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> Layers:
    """``layers`` with every update times its task's weight, after it was trimmed."""
    if all(weight == 1 for weight in weights.values()):
        return layers

    def one(path: str) -> Entries:
        shares = tuple(weights[task] for task in tasks[path])
        # Nothing is dropped; what of that follows trimming are the multipliers.
        return replace(layers(path), dropping=Dropping((0,) * len(shares), threshold_of(0.0), shares))

    return one


def trimmed(layers: Layers, tasks: Mapping[str, Sequence[str]], settings: Ties) -> Layers:
    """``layers`` with every update trimmed, after what is done to them already."""
    if settings.density >= 1:
        return layers
    if settings.trim_scope == "global":
        shared = bounds(layers, tasks, settings.density, settings.keep)
        return lambda path: replace(layers(path), trimming=shared[path])

    @functools.lru_cache(maxsize=1)
    def rule(path: str) -> Trimming:
        return bounds(layers, {path: tasks[path]}, settings.density, settings.keep)[path]

    return lambda path: replace(layers(path), trimming=rule(path))


def bounds(
    layers: Layers, tasks: Mapping[str, Sequence[str]], density: float, keep: str
) -> dict[str, Trimming]:
    """Path -> what is kept there, of the largest among the entries of all updates of a task; exact in float32."""
    names = list(dict.fromkeys(task for row in tasks.values() for task in row))
    upper = _counted(tasks, lambda path: entries.upper_counts(layers(path)))
    least, sought, spare = dict.fromkeys(names, float("inf")), {}, {}
    for task in names:
        total, zeros = int(upper[task].sum()), int(upper[task][UPPER_BINS])
        wanted = kept_entries(total, density, keep)
        if wanted > total - zeros:
            # Zeros among them: nothing is trimmed that is not one.
            least[task] = 0.0
        elif wanted:
            sought[task] = (*nth_from_above(upper[task][:UPPER_BINS], wanted), wanted)
    if sought:
        halves = {task: half for task, (half, _, _) in sought.items()}
        lower = _counted(
            tasks, lambda path: entries.lower_counts(layers(path), [halves.get(task, -1) for task in tasks[path]])
        )
    for task, (half, above, wanted) in sought.items():
        bound = bound_within(lower[task], half, wanted - above, keep)
        least[task] = bound.least
        if bound.first is not None:
            spare[task] = bound.first
    found = {}
    for path, row in tasks.items():
        one = layers(path)
        magnitudes = tuple(least[task] for task in row)
        last = _last_equals(one, magnitudes, row, spare) if spare.keys() & set(row) else (ALL,) * len(row)
        found[path] = Trimming(magnitudes, last, first=one.dropping is None)
    return found


def _counted(tasks: Mapping[str, Sequence[str]], counts: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Task -> its counts, added up over paths."""
    found: dict[str, Tensor] = {}
    for path, row in tasks.items():
        for task, one in zip(row, counts(path), strict=True):
            found[task] = found[task] + one if task in found else one
    return found


def _last_equals(
    one: Entries, magnitudes: tuple[float, ...], row: Sequence[str], spare: dict[str, int]
) -> tuple[int, ...]:
    """The last entry of exactly the task's magnitude that stays, where of all only ``spare`` do, the first ones; what
    stays here is taken off ``spare``.
    """
    counts, last = entries.equals(one, magnitudes), []
    for k, task in enumerate(row):
        here = int(counts[k].sum())
        if task not in spare or here <= spare[task]:
            last.append(ALL)
            here = 0 if task not in spare else here
        elif not spare[task]:
            last.append(-1)
            here = 0
        else:
            number, before = _nth(counts[k], spare[task])
            values = entries.added(one.only(k, number))[0].abs()
            places = (values == magnitudes[k]).nonzero()[:, 0]
            last.append(number * one.shape[1] + int(places[spare[task] - before - 1]))
            here = spare[task]
        if task in spare:
            spare[task] -= here
    return tuple(last)


def _nth(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The row that holds the ``wanted``-th entry, and how many lie in the rows before it."""
    up_to = counts.cumsum(0)
    index = int(torch.searchsorted(up_to, wanted))
    return index, int(up_to[index - 1]) if index else 0


def ties_merge(
    layers: Layers, tasks: Mapping[str, Sequence[str]], settings: Ties, weights: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Path and merged update; a task that is absent from a module has no vote there."""
    layers = trimmed(layers, tasks, settings)

    def vote(path: str, tie: float, votes_only: bool = False) -> entries.Election:
        shares = [weights[task] for task in tasks[path]]
        return entries.elected(
            layers(path), shares, settings.sign, settings.aggregate, tie, votes_only=votes_only
        )

    @functools.cache
    def balance() -> int:
        return sum(vote(path, 1.0, votes_only=True).balance for path in tasks)

    for path in tasks:
        found = vote(path, -1.0 if settings.zero == "negative" else 1.0)
        if settings.zero == "majority" and found.cancelled:
            positive = balance() if settings.trim_scope == "global" else found.balance
            if positive <= 0:
                found = vote(path, -1.0)
        assert found.merged is not None
        yield path, found.merged

"""Where the null-space ratio says nothing: adapters that read the same directions, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nsc_kernels import AdapterBank
from nsc_merge.adapters.adapter import Adapter

# Two row spaces count as one if the mean squared sine of the angles between them is below this: they then look the
# same to an input up to a hundredth of its length, and adapters saved in bfloat16 agree no better.
_SAME = 1e-4


def signal_notes(adapters: Mapping[str, Adapter], scored: Sequence[str]) -> list[str]:
    """What a person should know about an objective over the inputs of the modules ``scored``, a sentence each.

    The null-space ratio (Eq. 6 of arXiv 2603.26317) of an adapter depends on the row space of A alone. If adapters
    share it at every measured module, by design as in LoRA-FA (arXiv 2308.03303) and VeRA (arXiv 2310.11454) or by
    training with a frozen A, their ratios coincide. If it is the whole input space, the ratio is always 0.
    """
    spaces: dict[str, dict[str, Tensor]] = {task: {} for task in adapters}
    for path in scored:
        for task, adapter in adapters.items():
            factor = adapter.factors.get(path)
            if factor is not None and factor.rank:
                # The bank's rows are orthonormal and as many as the numerical rank, as the objective sees them.
                bank = AdapterBank.from_factors([factor.A], [factor.B], dtype=torch.float64, device="cpu")
                spaces[task][path] = bank.A
    notes = []
    for group in _groups(spaces):
        others = "nothing" if len(group) == len(adapters) else "nothing among these"
        notes.append(
            f"{', '.join(group)}: one row space of A at every measured module (as in LoRA-FA and VeRA), so that their "
            f"null-space ratios coincide and {others} ties a coefficient to its own task"
        )
    for task, found in spaces.items():
        full = [path for path, rows in found.items() if rows.shape[0] == rows.shape[1]]
        if full:
            where = "every" if len(full) == len(found) else f"{len(full)} of {len(found)}"
            notes.append(
                f"{task}: A has the full rank {found[full[0]].shape[1]} at {where} measured "
                f"module{'s' * (where != 'every')}, where its null-space ratio is 0 for every input"
            )
    return notes


def _groups(spaces: Mapping[str, Mapping[str, Tensor]]) -> list[list[str]]:
    """Tasks that have the same row spaces, as far as there are at least two of them."""
    groups: list[list[str]] = []
    for task, own in spaces.items():
        group = next((group for group in groups if own and _same(spaces[group[0]], own)), None)
        if group is None:
            groups.append([task])
        else:
            group.append(task)
    return [group for group in groups if len(group) > 1]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        rows.shape == other[path].shape
        and float((rows @ other[path].t()).square().sum()) >= (1 - _SAME) * rows.shape[0]
        for path, rows in one.items()
    )

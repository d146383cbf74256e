"""WUDI-Merging (arXiv 2503.08099): the update that interferes least with each task's own, seen through its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import cores, in_float32
from nsc_merge.utils.option_checks import check_number


@dataclass(frozen=True)
class WudiOptions:
    """Options of ``method="wudi"``.

    Attributes:
        scale: multiplies the merged update; the authors have none, and leave biases as the base has them, which are
            averaged here.
        ridge: how closely the update is held to the sum of all, relative to the largest eigenvalue of what the inputs
            are taken to be: 0 is the least interference there is, infinitely much the sum. The authors begin at the sum
            and take 300 steps of Adam, which also stays near it; where adapters are nearly alike, as from one start,
            only so much keeps small differences from becoming large.
    """

    scale: float = 1.0
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("ridge", self.ridge, 0)


def wudi(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: WudiOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the update ``D`` of least ``sum_k |(D - D_k) D_k^T|^2 / |D_k|^2`` (arXiv 2503.08099, Eq. 13), plus
    ``ridge`` times the largest eigenvalue of ``sum_k D_k^T D_k / |D_k|^2`` times ``|D - sum_k D_k|^2``.

    A sum of squares, so solved at once, in the bases that all updates share: neither the sum nor any gradient has a
    direction outside.
    """
    for path in paths:
        common = cores(present(adapters, path))
        yield path, common.factor(options.scale * least_interference(list(common.M.values()), options.ridge))


def least_interference(updates: Sequence[Tensor], ridge: float) -> Tensor:
    """The minimiser that :func:`wudi` describes, of ``updates`` ``[p, q]`` in float64."""
    total = torch.stack(list(updates)).sum(0)
    seen = [update for update in updates if update.any()]
    grams = [update.t() @ (update / update.square().sum()) for update in seen]
    if not grams:
        return total
    # The gradient at the sum, which is taken back along every direction by what the others put there.
    excess = torch.stack([(total - update) @ gram for update, gram in zip(seen, grams, strict=True)]).sum(0)
    values, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
    held = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    values, vectors = values[held], vectors[:, held]
    return total - (excess @ vectors / (values + ridge * values[-1])) @ vectors.t()


METHODS = (
    gradient_free(
        "wudi",
        "finds the update that changes least of what each task's own does along its own rows",
        "WUDI-Merging, Cheng et al. 2025, arXiv 2503.08099",
        WudiOptions,
        in_float32(wudi),
        averages=True,
    ),
)

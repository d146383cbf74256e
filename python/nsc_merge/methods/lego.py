"""LoRA-LEGO (arXiv 2409.16167): adapters taken apart into rank-one units, which are clustered.

Written from the paper's description: clusters of minimal semantic units, and two rescalings. No code of the authors is
public, so how close this comes to theirs is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.base import check_choice, check_count, check_number, gradient_free, present
from nsc_merge.methods.factors import rounded

ITERATIONS = 10


@dataclass(frozen=True)
class LegoOptions:
    """Options of ``method="lora_lego"``.

    Attributes:
        scale: multiplies the merged update.
        rank: how many clusters, which is the merged rank; None takes the largest rank among the adapters of a module.
        rescale: bring a cluster's centre, which averaging shrinks, to the mean magnitude of its members (by the
            largest entry).
        seed: of the clusters' start (k-means++).
    """

    scale: float = 1.0
    rank: int | None = None
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        if self.rank is not None:
            check_count("rank", self.rank)
        check_choice("rescale", self.rescale, (True, False))
        check_count("seed", self.seed, 0)


def lora_lego(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: LegoOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update. Units are rows of A with the columns of B, so the result depends on how the updates are
    factored.
    """
    for path in paths:
        factors = list(present(adapters, path).values())
        ranks = [factor.rank for factor in factors]
        # A unit is as large in A as in B, whichever way the scaling was stored.
        halves = [
            torch.cat([math.sqrt(abs(factor.scaling)) * factor.A.double() for factor in factors]),
            torch.cat([_signed_root(factor.scaling) * factor.B.double().t() for factor in factors]),
        ]
        count = min(options.rank or max(ranks), sum(ranks))
        labels = _clusters(torch.cat([_normalised(half) for half in halves], 1), count, options.seed)
        A, Bt = (_centres(half, labels, count, options.rescale) for half in halves)
        # The update is a sum over units: fewer of them are scaled up, by the square root of the shares of norm.
        output = (sum(ranks) / len(ranks) / count) ** 0.5
        yield path, rounded(Factor(A, options.scale * output * Bt.t(), 1.0))


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _normalised(units: Tensor) -> Tensor:
    return units / units.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _clusters(features: Tensor, count: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    means = KMeans(count, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed)
    return torch.from_numpy(means.fit_predict(features.numpy())).long()


def _centres(units: Tensor, labels: Tensor, count: int, rescale: bool) -> Tensor:
    sizes = torch.bincount(labels, minlength=count).clamp(min=1)[:, None]
    centres = units.new_zeros(count, units.shape[1]).index_add(0, labels, units) / sizes
    if not rescale:
        return centres
    largest = units.abs().amax(1, keepdim=True)
    mean = units.new_zeros(count, 1).index_add(0, labels, largest) / sizes
    own = centres.abs().amax(1, keepdim=True)
    return torch.where(own > 0, centres * mean / own.clamp(min=1e-30), centres)


METHODS = (
    gradient_free(
        "lora_lego",
        "clusters the adapters' rank-one units and keeps the centres",
        "LoRA-LEGO, Zhao et al. 2024, arXiv 2409.16167",
        LegoOptions,
        lora_lego,
    ),
)

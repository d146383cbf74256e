"""LoRA-LEGO (arXiv 2409.16167): adapters taken apart into rank-one units, which are clustered.

A unit is a row of A with the column of B, both times the root of the scaling. Units are clustered by k-means, halves
brought to length 1; each cluster becomes the mean of its units, which ``rescale`` brings to their magnitude, and all
is multiplied by the root of the adapters' mean rank over the number of clusters.

Written from the paper's description: clusters of minimal semantic units, and two rescalings. No code of the authors is
public, so how close this comes to theirs is not known. NSC's public code has a port, from which it differs in how the
clusters start (k-means++ here, any units there) and not in what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import in_float32
from nsc_merge.utils.option_checks import check_choice, check_count, check_number

ITERATIONS = 10


@dataclass(frozen=True)
class LegoOptions:
    """Options of ``method="lora_lego"``.

    Attributes:
        scale: multiplies the merged update.
        rank: how many clusters, which is the merged rank, or as many as there are different units where these are
            fewer; None takes the largest rank among the adapters of a module.
        rescale: bring a cluster's centre, which averaging shrinks, to the mean magnitude of its members (by the
            largest entry).
        seed: of the clusters' start (k-means++), which depends on the order of the tasks, too.
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
        if self.seed >= 2**32:
            raise ValueError(f"seed: expected a whole number below 2^32, as k-means takes, found {self.seed!r}")


def lora_lego(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: LegoOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update. Units are rows of A with the columns of B, so the result depends on how the updates are
    factored.
    """
    for path in paths:
        factors = list(present(adapters, path).values())
        ranks = [factor.rank for factor in factors]
        # Both halves of a unit take the root of the scaling, and B its sign.
        downs = torch.cat([math.sqrt(abs(factor.scaling)) * factor.A.double() for factor in factors])
        ups = torch.cat([_signed_root(factor.scaling) * factor.B.double().t() for factor in factors])
        features = torch.cat([_normalised(downs), _normalised(ups)], 1)
        wanted = min(options.rank or max(ranks), sum(ranks))
        labels = _clusters(features, wanted, options.seed)
        centres = _centres(torch.cat([downs, ups], 1), labels, options.rescale)
        A, Bt = centres.split([downs.shape[1], ups.shape[1]], 1)
        # The output reweighting: fewer units than an adapter has are scaled up by the root of the ratio. Of units that
        # are found, as there are fewer clusters than wanted where units are the same.
        output = math.sqrt(sum(ranks) / len(ranks) / len(centres))
        yield path, Factor(A, options.scale * output * Bt.t(), 1.0)


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _normalised(units: Tensor) -> Tensor:
    return units / units.norm(dim=1, keepdim=True).clamp(min=torch.finfo(units.dtype).tiny)


def _clusters(features: Tensor, wanted: int, seed: int) -> Tensor:
    """Cluster of each unit, from 0 without gaps; there are fewer than wanted if there are fewer different units."""
    from sklearn.cluster import KMeans

    count = min(wanted, len(features.unique(dim=0)))
    # As many coordinates as units: the distances, which are all that counts, stay as they are.
    points = torch.linalg.qr(features.t(), mode="r").R.t()
    means = KMeans(count, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed)
    labels = torch.from_numpy(means.fit_predict(points.cpu().numpy())).long()
    return labels.unique(return_inverse=True)[1].to(features.device)


def _centres(units: Tensor, labels: Tensor, rescale: bool) -> Tensor:
    """Mean of each cluster's units ``[N, d]``, brought to the mean of their largest magnitudes if ``rescale``."""
    sizes = torch.bincount(labels)[:, None]

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(len(sizes), values.shape[1]).index_add(0, labels, values) / sizes

    centres = mean(units)
    if not rescale:
        return centres
    own = centres.abs().amax(1, keepdim=True)
    return torch.where(own > 0, centres * mean(units.abs().amax(1, keepdim=True)) / own.where(own > 0, 1.0), centres)


METHODS = (
    gradient_free(
        "lora_lego",
        "clusters the adapters' rank-one units and keeps the centres",
        "LoRA-LEGO, Zhao et al. 2024, arXiv 2409.16167",
        LegoOptions,
        in_float32(lora_lego),
        averages=True,
        of_factors=True,
    ),
)

"""Merging by singular vectors: TSV-Merge (arXiv 2412.00081), Iso-C and Iso-CTS (arXiv 2502.04959).

The authors decompose whole weights. Here as many singular vectors take part as an update of low rank has: those that
belong to values of zero, with which a dense decomposition would fill the layer, are rounding's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.low_rank.common_bases import Cores, cores, decomposed, in_float32, orthogonalised
from nsc_merge.utils.option_checks import check_choice, check_number

ROOMS = ("layer", "core")


@dataclass(frozen=True)
class TSVOptions:
    """Options of ``method="tsv"``.

    Attributes:
        scale: multiplies the merged update; the authors find 1 to be good throughout.
        share: of the singular values that there is room for, which each task keeps, the largest, and one at least; one
            over the number of tasks that change the module when None, as in the authors' code.
        room: ``"layer"``, the lesser of its two widths, of which LoRA adapters mostly have less than their share and
            keep all; or ``"core"``, the sum of the tasks' ranks where that is less (Core Space's code), so that
            adapters of more than the mean rank lose some.
    """

    scale: float = 1.0
    share: float | None = None
    room: str = "layer"

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        if self.share is not None:
            check_number("share", self.share, 0, 1, above=True)
        check_choice("room", self.room, ROOMS)


@dataclass(frozen=True)
class IsoCOptions:
    """Options of ``method="iso_c"``.

    Attributes:
        scale: multiplies the merged update, and the mean of the tasks' biases, as in the authors' code. The authors
            take the mean over all singular values that a layer has room for, those of zero too, so that of an update of
            low rank theirs is smaller: by its rank over the lesser width of the layer.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)


@dataclass(frozen=True)
class IsoCTSOptions:
    """Options of ``method="iso_cts"``.

    Attributes:
        scale: multiplies the merged update; see :class:`IsoCOptions`.
        common: the share of the directions of the summed updates that stay, those of its largest singular values. The
            others give way to directions of single tasks, as many of each that changes the module.
    """

    scale: float = 1.0
    common: float = 0.8

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("common", self.common, 0, 1)


def tsv(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: TSVOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the singular vectors of all tasks next to one another, made orthonormal, with the tasks' own singular
    values between them (arXiv 2412.00081, Algorithm 1).
    """
    for path in paths:
        factors = _moving(adapters, path)
        common = cores(factors)
        room = min(common.U.shape[0], common.V.shape[1])
        if options.room == "core":
            room = min(room, sum(factor.rank for factor in factors.values()))
        kept = max(1, room // len(factors) if options.share is None else int(options.share * room))
        parts = [decomposed(part) for part in common.M.values()]
        U = orthogonalised(torch.cat([left[:, :kept] for left, _, _ in parts], 1))
        Vt = orthogonalised(torch.cat([right[:kept] for _, _, right in parts]).t())
        sigma = torch.cat([values[:kept] for _, values, _ in parts])
        yield path, common.factor(options.scale * (U * sigma) @ Vt.t())


def iso_c(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: IsoCOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the sum of all updates with the mean of its singular values for each (arXiv 2502.04959, Algorithm 1)."""
    for path in paths:
        common = cores(present(adapters, path))
        left, sigma, right = decomposed(_total(common))
        yield path, common.factor(options.scale * _mean(sigma) * left @ right)


def iso_cts(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: IsoCTSOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and Iso-C's update with the least of its directions replaced by those that each task has besides the others,
    all of them made orthonormal (arXiv 2502.04959, Algorithm 2).
    """
    for path in paths:
        common = cores(_moving(adapters, path))
        left, sigma, right = decomposed(_total(common))
        tasks = len(common.M)
        own = min(round((len(sigma) - int(options.common * len(sigma))) / tasks), len(sigma) // tasks)
        shared = len(sigma) - tasks * own
        parts = [(left[:, :shared], sigma[:shared], right[:shared])]
        for part in common.M.values():
            beside = part - left[:, :shared] @ (left[:, :shared].t() @ part)
            # Held against the whole update: of one inside the shared directions nothing but rounding is left.
            U, values, V = decomposed(beside, float(torch.linalg.matrix_norm(part, 2)) if part.numel() else 0.0)
            parts.append((U[:, :own], values[:own], V[:own]))
        U = orthogonalised(torch.cat([part[0] for part in parts], 1))
        Vt = orthogonalised(torch.cat([part[2] for part in parts]).t())
        yield path, common.factor(options.scale * _mean(torch.cat([part[1] for part in parts])) * U @ Vt.t())


def _moving(adapters: Mapping[str, Adapter], path: str) -> dict[str, Factor]:
    """Task -> update, of the tasks whose update is not zero, as one without direction takes no share of them; of all
    where each is.
    """
    held = present(adapters, path)
    return {task: one for task, one in held.items() if one.scaling and one.A.any() and one.B.any()} or held


def _total(common: Cores) -> Tensor:
    return torch.stack(list(common.M.values())).sum(0)


def _mean(sigma: Tensor) -> Tensor:
    return sigma.mean() if len(sigma) else sigma.sum()


METHODS = (
    gradient_free(
        "tsv",
        "makes the singular vectors of all tasks orthonormal, and keeps the singular values",
        "TSV-Merge, Gargiulo et al. 2025, arXiv 2412.00081",
        TSVOptions,
        in_float32(tsv),
        averages=True,
    ),
    gradient_free(
        "iso_c",
        "adds the tasks, and makes all singular values of the sum alike",
        "Iso-C, Marczak et al. 2025, arXiv 2502.04959",
        IsoCOptions,
        in_float32(iso_c),
        # Of biases and the like, which the authors average.
        averages=True,
    ),
    gradient_free(
        "iso_cts",
        "as iso_c, with directions of single tasks in the place of the weakest of the sum",
        "Iso-CTS, Marczak et al. 2025, arXiv 2502.04959",
        IsoCTSOptions,
        in_float32(iso_cts),
        averages=True,
    ),
)

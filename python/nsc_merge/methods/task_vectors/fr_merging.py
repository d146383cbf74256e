"""FR-Merging (arXiv 2411.16815): a band of each update's two-dimensional spectrum is removed before they are added.

``scale * sum_k a_k F_k`` with ``F_k`` the update ``s_k B_k A_k`` without that band, transformed back, and
``a_k = max_j mean|F_j| / mean|F_k|`` in each module with ``align``, else 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free, present
from nsc_merge.methods.shared_options import fill
from nsc_merge.methods.task_vectors.elementwise import product
from nsc_merge.utils.option_checks import check_choice, check_number

PRESETS: dict[str, dict[str, Any]] = {
    "original": {"centre": "nyquist", "drop": "far", "cut": 0.7, "ring": True, "align": True, "scale": 0.7},
    "nsc": {"centre": "nyquist", "drop": "near", "cut": 0.1, "ring": False, "align": False, "scale": 0.3},
    "shifted": {"centre": "zero", "drop": "near", "cut": 0.1, "ring": False, "align": True, "scale": 0.7},
}

# Entries of an update, and columns of a spectrum, that are held at a time.
_ENTRIES, _COLUMNS = 1 << 19, 256


@dataclass(frozen=True)
class FROptions:
    """Options of ``method="fr"``; those that are None are the preset's.

    Attributes:
        preset: ``"original"``, the authors' code with its settings for eight tasks on ViT-B/32: its transform is not
            shifted, so that what lies far from the middle of the array is the neighbourhood of frequency zero, 0.02 %
            of a square spectrum and 68 % of one of 768 by 3072; ``"nsc"``, the code for NSC's experiments by two of its
            authors (TARA-Merge), which removes the 3 % next to the highest frequency; or ``"shifted"``, the high-pass
            that the paper describes. The authors filter the weights of attention, as CLIP stores them (q, k and v in
            one), and of MLPs; here every module that is merged is filtered.
        scale: multiplies the merged update; theirs is 0.7, NSC's chosen on validation data.
        centre: frequency that distances are measured from, ``"zero"`` or ``"nyquist"`` (the highest).
        drop: removes what is ``"near"`` the centre or ``"far"`` from it,
        cut: by this distance, as a share of the smaller side; what is near is so by a whole number of bins, the
            distance rounded down but at least 1.
        ring: count twice the bins at a distance of exactly a tenth of the smaller side, rounded down, as the authors'
            masks of middle and high frequencies do, which overlap there.
        align: scale each task's filtered update, in every module, to the largest mean magnitude (the mean over all
            entries) among the tasks' filtered ones.
    """

    preset: str = "original"
    scale: float | None = None
    centre: str | None = None
    drop: str | None = None
    cut: float | None = None
    ring: bool | None = None
    align: bool | None = None

    def __post_init__(self) -> None:
        fill(self, PRESETS)
        check_number("scale", self.scale)
        check_choice("centre", self.centre, ("zero", "nyquist"))
        check_choice("drop", self.drop, ("near", "far"))
        check_number("cut", self.cut, 0)
        check_choice("ring", self.ring, (True, False))
        check_choice("align", self.align, (True, False))


def kept_frequencies(shape: Sequence[int], options: FROptions) -> Tensor:
    """How often the bins of an unshifted transform of ``shape`` are counted: 0, 1 or, on the ring, 2. float32."""
    vertical, horizontal = (_offsets(side, options) for side in shape)
    return _counted(vertical[:, None], horizontal[None], min(shape), options)


def _offsets(side: int, options: FROptions) -> Tensor:
    """Of the bins of one dimension, from the centre."""
    offsets = torch.arange(side, device="cpu") - side // 2
    return torch.fft.ifftshift(offsets) if options.centre == "zero" else offsets


def _counted(vertical: Tensor, horizontal: Tensor, smaller: int, options: FROptions) -> Tensor:
    # In float32, as the public codes compare.
    distance = (vertical.square() + horizontal.square()).float().sqrt()
    assert options.cut is not None
    if options.drop == "far":
        kept = distance <= options.cut * smaller
    else:
        kept = distance >= (max(1, int(options.cut * smaller)) if options.cut else 0)
    counted = kept.float()
    if options.ring:
        counted += kept & (distance == smaller // 10)
    return counted


@functools.lru_cache(maxsize=4)
def removed_frequencies(shape: tuple[int, int], options: FROptions) -> tuple[Tensor, Tensor]:
    """The columns of a real transform of ``shape`` in which anything is removed or counted twice, ``[n]``, and the
    share of each of their bins that is removed, ``[n, rows]`` float32; -1 where a bin is counted twice.
    """
    vertical, horizontal = (_offsets(side, options) for side in shape)
    columns, shares = [], []
    for some in torch.arange(shape[1] // 2 + 1, device="cpu").split(_COLUMNS):
        counted = _counted(vertical, horizontal[some, None], min(shape), options)
        # Where a bin and its mirror image are not counted alike, taking the real part leaves both with the mean.
        mirrored = _counted(vertical.flip(0).roll(1), horizontal[-some, None], min(shape), options)
        removed = 1 - (counted + mirrored) / 2
        live = removed.any(1)
        columns.append(some[live])
        shares.append(removed[live])
    return torch.cat(columns), torch.cat(shares)


def filtered(A: Tensor, B: Tensor, options: FROptions) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and the real part of these rows of ``B A`` with its frequencies as often as they are counted.

    The transform of the product is the product of the factors' transforms, along one side each. So only the columns of
    the spectrum are formed in which anything is removed, and what they hold is taken off the product.
    """
    columns, removed = (tensor.to(A.device) for tensor in removed_frequencies((B.shape[0], A.shape[1]), options))
    if not A.shape[0] or not len(columns):
        yield slice(None), product(B, A)
        return
    spectrum = torch.fft.rfft(A).t()[columns] @ torch.fft.fft(B.t())
    spectrum = torch.fft.ifft(spectrum.mul_(removed))
    rows = max(1, _ENTRIES // A.shape[1])
    bins = spectrum.new_zeros(min(rows, B.shape[0]), A.shape[1] // 2 + 1)
    for begin in range(0, B.shape[0], rows):
        some = slice(begin, min(begin + rows, B.shape[0]))
        count = some.stop - begin
        bins[:count, columns] = spectrum[:, some].t()
        yield some, product(B[some], A).sub_(torch.fft.irfft(bins[:count], n=A.shape[1]))


def fr(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: FROptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    assert options.scale is not None
    for path in paths:
        factors = present(adapters, path).values()
        A, B = [factor.A.float() for factor in factors], [factor.scaling * factor.B.float() for factor in factors]
        shares = [1.0] * len(A)
        if options.align:
            means = [_mean_magnitude(*both, options) for both in zip(A, B, strict=True)]
            shares = [max(means) / mean if mean else 1.0 for mean in means]
        # The filter of a sum is the sum of what is filtered.
        together = torch.cat([options.scale * share * one for share, one in zip(shares, B, strict=True)], 1)
        update = together.new_empty(B[0].shape[0], A[0].shape[1])
        for rows, part in filtered(torch.cat(A), together, options):
            update[rows] = part
        yield path, Factor.of_matrix(update)


def _mean_magnitude(A: Tensor, B: Tensor, options: FROptions) -> float:
    # Row by row, so that the order of the sums does not depend on the number of threads.
    sums = [part.abs_().sum(1, dtype=torch.float64).sum() for _, part in filtered(A, B, options)]
    return float(torch.stack(sums).sum()) / (B.shape[0] * A.shape[1])


METHODS = (
    gradient_free(
        "fr",
        "removes a band of each update's spectrum, then adds",
        "FR-Merging (FREE-Merging), Zheng and Wang 2024, arXiv 2411.16815",
        FROptions,
        fr,
        gives="full rank",
    ),
)

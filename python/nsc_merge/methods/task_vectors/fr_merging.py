"""FR-Merging (arXiv 2411.16815): a band of each update's two-dimensional spectrum is removed before they are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import gradient_free
from nsc_merge.methods.shared_options import fill
from nsc_merge.methods.task_vectors.elementwise import added, dense_factor, dense_update, tasks_by_path
from nsc_merge.utils.option_checks import check_choice, check_number

PRESETS: dict[str, dict[str, Any]] = {
    "original": {"centre": "nyquist", "drop": "far", "cut": 0.7, "ring": True, "align": True, "scale": 0.7},
    "nsc": {"centre": "nyquist", "drop": "near", "cut": 0.1, "ring": False, "align": False, "scale": 0.3},
    "shifted": {"centre": "zero", "drop": "near", "cut": 0.1, "ring": False, "align": True, "scale": 0.7},
}


@dataclass(frozen=True)
class FROptions:
    """Options of ``method="fr"``; those that are None are the preset's.

    Attributes:
        preset: ``"original"``, the authors' code with its settings for eight tasks on ViT-B/32: its transform is not
            shifted, so that what lies far from the middle of the array is the neighbourhood of frequency zero, 0.02 %
            of a square spectrum and 68 % of one of 768 by 3072; ``"nsc"``, the code for NSC's experiments by two of its
            authors (TARA-Merge), which removes the 3 % next to the highest frequency; or ``"shifted"``, the high-pass
            that the paper describes. The authors filter attention and MLP weights only, here all that is merged.
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
    rows, columns = shape
    vertical = torch.arange(rows) - rows // 2
    horizontal = torch.arange(columns) - columns // 2
    # In float32, as the public codes compare.
    distance = (vertical[:, None].square() + horizontal[None].square()).float().sqrt()
    assert options.cut is not None
    smaller = min(rows, columns)
    if options.drop == "far":
        kept = distance <= options.cut * smaller
    else:
        kept = distance >= (max(1, int(options.cut * smaller)) if options.cut else 0)
    counted = kept.float()
    if options.ring:
        counted += kept & (distance == smaller // 10)
    return torch.fft.ifftshift(counted) if options.centre == "zero" else counted


def _filtered(update: Tensor, counted: Tensor) -> Tensor:
    """The real part of ``update`` with its frequencies as often as they are ``counted``."""
    # Where a bin and its mirror image are not counted alike, taking the real part leaves both with the mean.
    mirrored = counted.flip(0, 1).roll((1, 1), (0, 1))
    share = (counted + mirrored) / 2
    spectrum = torch.fft.rfft2(update)
    return torch.fft.irfft2(spectrum * share[:, : spectrum.shape[1]], s=update.shape)


def fr(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: FROptions
) -> Iterator[tuple[str, Factor]]:
    """Path and merged update."""
    assert options.scale is not None
    for path, tasks in tasks_by_path(adapters, paths).items():
        updates = [dense_update(adapters[task].factors[path]) for task in tasks]
        counted = kept_frequencies(updates[0].shape, options)
        filtered = [_filtered(update, counted) for update in updates]
        if options.align:
            means = [float(update.abs().mean()) for update in filtered]
            filtered = [
                update * (max(means) / mean) if mean else update for update, mean in zip(filtered, means, strict=True)
            ]
        yield path, dense_factor(options.scale * added(filtered))


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

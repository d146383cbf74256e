"""A merged update with gains as the DoRA adapter that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from nsc_merge.adapters import Factor
from nsc_merge.adapters.algebra.low_rank import rows_of, total_gain
from nsc_merge.models.bases.quantised import is_linear, stored_or_dequantised
from nsc_merge.models.merged.matrices import owner_of
from nsc_merge.results.merged_update import MergedUpdate, by_task

_CURE = "use format 'model', or merge with dora='convert'"


def has_gains(result: MergedUpdate) -> bool:
    """Whether the merge scales rows of the base's weights: if one of its adapters is DoRA, whatever the method."""
    # Not of the merged updates, which some methods compute as they are asked for.
    return any(factor.gain is not None for one in result.adapters.values() for factor in one.factors.values())


def check_as_adapter(result: MergedUpdate) -> None:
    """Refuse a merge with gains that no DoRA adapter computes.

    Raises:
        ValueError: naming the module, the reason and the way out.
    """
    if not has_gains(result):
        return
    for _, one in by_task(result):
        for path in one.paths:
            if one.is_whole(path):
                continue
            module, gain = owner_of(result.model, path), total_gain(one.terms(path))
            if not is_linear(module):
                raise ValueError(
                    f"format 'lora': {path} is {type(module).__name__}, and in a DoRA adapter every module has DoRA, "
                    f"expected linears alone; {_CURE}"
                )
            if one.bias_delta(path) is not None:
                raise ValueError(f"format 'lora': {path} has a bias (lora_bias), which PEFT has no DoRA with; {_CURE}")
            if gain is not None and not bool((gain > -1).all()):
                raise ValueError(
                    f"format 'lora': the merge turns row {int(gain.argmin())} of {path} around or makes it 0 (gain "
                    f"{float(gain.min()):.3g}, expected above -1), which no magnitude of DoRA does; {_CURE}"
                )


def as_dora(result: MergedUpdate, factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """Factors with the magnitudes of DoRA, whose layers then compute the merged update.

    With the total gain ``G`` of a module, ``(1 + G) W + B A`` is ``m (W + B' A) / norm`` where ``B' = B / (1 + G)`` and
    ``m = (1 + G) norm``, the norms being those of the rows of ``W + B' A``.

    Args:
        result: that :func:`check_as_adapter` let pass, of one update for all tasks.
        factors: module path -> its low-rank part, with a scaling of 1.
    """
    made = {}
    for path, factor in factors.items():
        gain = total_gain(result.terms(path))
        grown = torch.ones(len(factor.B), dtype=torch.float64, device="cpu") if gain is None else 1 + gain.cpu()
        # The norms are of what is written.
        plain = replace(factor, B=(factor.B.double().cpu() / grown[:, None]).float(), A=factor.A.float())
        weight = stored_or_dequantised(result.model, f"{path}.weight")
        norms = weight.row_norms(rows_of([(1.0, plain)], weight.device))
        made[path] = replace(plain, magnitude=grown * norms)
    return made

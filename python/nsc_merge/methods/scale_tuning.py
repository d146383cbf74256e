"""Chooses a method's scale on validation data, as the papers do it for methods without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_number

COARSE = tuple(round(0.1 * step, 1) for step in range(1, 11))
FINE_STEP = 0.01
FINE_STEPS = 9


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune_scale` found.

    Attributes:
        result: the merge at the best scale.
        scale: that scale.
        score: what ``evaluate`` said of it.
        trail: every scale tried and its score, in order.
    """

    result: MergeResult
    scale: float
    score: float
    trail: tuple[tuple[float, float], ...]


def tune_scale(
    unscaled: MergeResult,
    evaluate: Callable[[MergeResult], float],
    *,
    coarse: Sequence[float] = COARSE,
    fine_step: float | None = FINE_STEP,
    fine_steps: int = FINE_STEPS,
) -> Tuned:
    """The best multiple of a merged update: a coarse sweep, then a fine one around its best (Section A.3 of arXiv
    2603.26317: steps of 0.1, then of 0.01).

    Every method of the registry with ``tuned == "scale"`` is linear in it, so the merge is computed once.

    Args:
        unscaled: the merge at a scale of 1.
        evaluate: a score on validation data, higher is better; NaN is worse than any other. Say which one where you
            report the result: the papers use the loss, and the metric often chooses otherwise.
        coarse: scales of the first sweep.
        fine_step: of the second sweep; None leaves it out.
        fine_steps: how many scales to each side. 9 of 0.01 reach the neighbours of a coarse sweep by 0.1.

    Raises:
        ValueError: if ``coarse`` is empty or holds something else than finite numbers.
    """
    if not coarse:
        raise ValueError("coarse: expected at least one scale, found none")
    for scale in coarse:
        check_number("coarse", scale)
    trail = [(float(scale), evaluate(unscaled.scaled(scale))) for scale in coarse]
    best = max(trail, key=_rank)[0]
    if fine_step is not None:
        around = [round(best + fine_step * step, 10) for step in range(-fine_steps, fine_steps + 1) if step]
        trail += [(scale, evaluate(unscaled.scaled(scale))) for scale in around]
    scale, score = max(trail, key=_rank)
    return Tuned(unscaled.scaled(scale), scale, score, tuple(trail))


def _rank(pair: tuple[float, float]) -> float:
    return -math.inf if math.isnan(pair[1]) else pair[1]

"""Rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho of two columns; NaN where one does not vary or where there are fewer than three values.

    Raises:
        ValueError: if they are not equally long.
    """
    if len(first) != len(second):
        raise ValueError(f"second: expected {len(first)} values as in the first, found {len(second)}")
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)

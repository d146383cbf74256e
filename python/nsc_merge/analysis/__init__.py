"""The phenomena that NSC builds on, measured on models and adapters at hand."""

from nsc_merge.analysis.bound import check_bound
from nsc_merge.analysis.null_space_ratios import Ratios, per_sample_ratios
from nsc_merge.analysis.quartiles import by_quantile, sample_study
from nsc_merge.analysis.tracking import Tracking, find_checkpoints, read_log, track

__all__ = [
    "Ratios",
    "Tracking",
    "by_quantile",
    "check_bound",
    "find_checkpoints",
    "per_sample_ratios",
    "read_log",
    "sample_study",
    "track",
]

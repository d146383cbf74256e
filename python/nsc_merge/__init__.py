"""NSC merging: one model from separately trained LoRA adapters, without labels (arXiv 2603.26317).

>>> result = nsc_merge.merge(model, {"depth": "adapters/depth", "edge": "adapters/edge"}, calibration)
>>> result.save("merged", format="lora")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsc_merge.adapters import Adapter, Factor, load_adapter
    from nsc_merge.api import merge
    from nsc_merge.calibration.raw.reading import calibration_data
    from nsc_merge.factors import merge_factors
    from nsc_merge.models.attachment import attach
    from nsc_merge.models.families import Family
    from nsc_merge.recipes.saved_result import load_result
    from nsc_merge.results.result import MergeResult

_HOME = {
    "Adapter": "adapters",
    "Factor": "adapters",
    "Family": "models.families",
    "MergeResult": "results.result",
    "attach": "models.attachment",
    "calibration_data": "calibration.raw.reading",
    "load_adapter": "adapters",
    "load_result": "recipes.saved_result",
    "merge": "api",
    "merge_factors": "factors",
}

__all__ = [
    "Adapter",
    "Factor",
    "Family",
    "MergeResult",
    "attach",
    "calibration_data",
    "load_adapter",
    "load_result",
    "merge",
    "merge_factors",
]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `nsc-merge --help` does not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'nsc_merge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"nsc_merge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

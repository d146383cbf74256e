"""magnitude_prune: what trimming keeps of a task does not depend on the task's weight."""

from __future__ import annotations

import pytest
import torch

import nsc_merge
from nsc_merge.methods.task_vectors import tiles

WEIGHTS = {"a": 0.7, "b": -0.3, "c": 0.0}


def of_equal_entries(seed):
    """Factors of few values, so that many entries of a product are equal and weights round them apart."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randint(-8, 9, shape, generator=generator).float() / 8

    return {task: {path: (drawn(4, 16), drawn(16, 4), 1.0) for path in "qv"} for task in WEIGHTS}


@pytest.mark.parametrize("scope", ["tensor", "global", "factors"])
@pytest.mark.parametrize("native", [True, False])
def test_a_weight_multiplies_what_trimming_keeps(native, scope, monkeypatch):
    if not native:
        monkeypatch.setattr(tiles, "serves", lambda adapters, paths: False)
    options = {"density": 0.2, "trim_scope": scope}
    for seed in range(10):
        tasks = of_equal_entries(seed)
        for task in tasks:
            alone = {**{other: {} for other in tasks}, task: tasks[task]}
            found, plain = (
                dict(nsc_merge.merge_factors(alone, "magnitude_prune", weights=weights, **options))
                for weights in (WEIGHTS, None)
            )
            for path in "qv":
                expected = WEIGHTS[task] * plain[path].delta()
                torch.testing.assert_close(found[path].delta(), expected, rtol=1e-6, atol=1e-6)

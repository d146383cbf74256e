"""What mergekit is handed for one tensor, without mergekit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS

pytest.importorskip("pydantic")


@pytest.fixture(scope="module")
def one_tensor():
    """The module by its file: its package registers the methods, for which it imports mergekit."""
    file = Path(nsc_merge.__file__).parent / "integrations" / "mergekit" / "one_tensor.py"
    spec = importlib.util.spec_from_file_location("one_tensor_of_mergekit", file)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the names in annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def updates(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return Factor(torch.randn(rank, 30, generator=generator), torch.randn(20, rank, generator=generator), 0.5 + seed)


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "rank" in method.option_names])
def test_a_rank_under_parameters_is_the_method_s_own(one_tensor, name, rank):
    held = {str(seed): updates(seed) for seed in range(3)}
    base = torch.zeros(20, 30)
    merged = one_tensor.OneTensor(METHODS[name]).merge(
        "q", base, dict.fromkeys(held, base), {"rank": rank}, dict.fromkeys(held, 1.0), held
    )
    method = METHODS[name]
    adapters = {task: Adapter(task, {"q": factor}) for task, factor in held.items()}
    ((_, expected),) = method.updates(adapters, ["q"], method.options(rank=rank))
    torch.testing.assert_close(merged.double(), expected.delta(), rtol=1e-5, atol=1e-5)


def test_weights_that_cancel_divide_by_nothing(one_tensor):
    """Of a vector, by a method that does not look at single entries and averages by weight."""
    weights = dict(zip("abc", (0.1, 0.2, -0.3), strict=True))
    generator = torch.Generator().manual_seed(0)
    models = {name: torch.randn(12, generator=generator) for name in weights}
    merged = one_tensor.OneTensor(METHODS["knots_ties"]).merge(
        "norm", torch.zeros(12), models, {"aggregate": "weight", "scale": 1.0}, weights, {}
    )
    torch.testing.assert_close(merged, sum(weights[name] * value for name, value in models.items()))

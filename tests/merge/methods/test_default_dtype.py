"""torch.set_default_dtype changes no merge: what is computed in names its dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from own_cases import merge, problem_of

import nsc_merge
from nsc_merge.methods import METHODS

WITHOUT_DATA = [name for name, method in METHODS.items() if not method.needs]
BRIEF = {"steps": 2, "progress": False}
OF_DATA = {
    "regmean": {"batches": 2, "ridge": 1e-3},
    "fisher": {"batches": 2},
    "match": BRIEF,
    "distill": BRIEF,
    "nsc": BRIEF,
    "adamerging": BRIEF,
}


@pytest.fixture(autouse=True)
def restored():
    """Whatever a test leaves as the default."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def updates(result):
    """Every number of a merge, by task where each has its own."""
    each = {task: result.for_task(task) for task in result.adapters} if result.per_task else {"": result}
    return {
        (task, path): (one.delta(path), one.bias_delta(path)) for task, one in each.items() for path in one.paths
    }


def assert_same_under(dtype, merged):
    expected = merged()
    torch.set_default_dtype(dtype)
    found = merged()
    torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        for one, other in zip(found[key], pair, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype, key
                assert torch.equal(one, other), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", [name for name in WITHOUT_DATA if name != "ensemble"])
def test_methods_without_data(model, write_adapter, method, dtype):
    folders = {task: write_adapter(task, seed, lora_bias=True) for seed, task in enumerate("abc", 1)}
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    assert_same_under(dtype, lambda: updates(nsc_merge.merge(model, adapters, method=method)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", [name for name, known in METHODS.items() if known.updates])
def test_merge_factors(method, dtype):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    tasks = {
        "a": {"q": (drawn(3, 12), drawn(9, 3), 2.0), "zero": (drawn(3, 12), torch.zeros(9, 3), 1.0)},
        "b": {"q": (drawn(3, 12), drawn(9, 3), 0.5)},
    }

    def merged():
        found = nsc_merge.merge_factors(tasks, method)
        return {path: (factor.A, factor.B, factor.dense) for path, factor in found}

    assert_same_under(dtype, merged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", OF_DATA)
def test_methods_of_data(model, folders, calibration, outputs, method, dtype):
    options = dict(OF_DATA[method])
    if "outputs" in METHODS[method].option_names:
        options["outputs"] = outputs
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}

    def merged():
        return updates(nsc_merge.merge(copy.deepcopy(model), adapters, copy.deepcopy(calibration), method, **options))

    assert_same_under(dtype, merged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_of_answers_weigh_alike(tmp_path, dtype):
    problem = problem_of("llama", tmp_path)

    def merged():
        found = merge(problem, "distill", steps=2, new_tokens=4)
        return found.coefficients, [step["objective"] for step in found.history]

    expected = merged()
    torch.set_default_dtype(dtype)
    assert merged() == expected

"""Merges on a base whose linears keep codes, held against the same numbers in plain linears."""

from __future__ import annotations

import copy

import pytest
import torch
from packed_linear import packed, unpacked
from zoo import KINDS, build, outputs, write_adapter

import nsc_merge
from nsc_merge.analysis import check_bound, per_sample_ratios
from nsc_merge.evaluation.scoring import applied

SETTINGS = {"r": 4, "target_modules": ["q_proj", "v_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
METHODS = {"task_arithmetic": {"scale": {"a": 0.3, "b": 0.6}}, "ties": {}, "knots_ties": {}, "zero_shot": {}}


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def place(request, tmp_path_factory):
    """Two adapters, the base in codes, and one of the same numbers; Qwen2's linears have biases."""
    folder = tmp_path_factory.mktemp("quantised")
    settings = {**SETTINGS, **request.param}
    if request.param:
        settings["target_modules"] = ["q_proj", "v_proj"]
    for seed, task in enumerate("ab", 1):
        write_adapter(build("qwen2"), folder / task, seed, **settings)
    codes = packed(build("qwen2"))
    return {task: folder / task for task in "ab"}, codes, unpacked(copy.deepcopy(codes))


@pytest.mark.parametrize("method", METHODS)
def test_an_update_is_measured_beside_codes_as_in_plain_weights(place, method):
    adapters, codes, plain = place
    inputs = KINDS["qwen2"].inputs(0)
    before = outputs(codes, inputs)
    found = []
    for model in (codes, plain):
        result = nsc_merge.merge(model, adapters, method=method, **METHODS[method])
        with applied(model, result) as merged:
            found.append(outputs(merged, inputs))
    assert torch.equal(outputs(codes, inputs), before)
    assert (method == "zero_shot") == torch.allclose(found[0], before, atol=1e-3)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_modules_see_of_a_merge_is_measured_in_it(tmp_path):
    settings = {**SETTINGS, "target_modules": ["q_proj", "v_proj"]}
    adapters = {task: write_adapter(build("qwen2"), tmp_path / task, n, **settings) for n, task in enumerate("ab", 1)}
    codes, batches = packed(build("qwen2")), [KINDS["qwen2"].inputs(0)]
    values, bounds = [], []
    for model in (codes, unpacked(copy.deepcopy(codes))):
        result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
        values.append(per_sample_ratios(model, result, batches).values)
        bounds.append(torch.tensor([[one["tightness"], one["least"]] for one in check_bound(model, result, batches)]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*bounds, rtol=1e-3, atol=1e-4)

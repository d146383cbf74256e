"""The layer-wise merged model on factors, against what it stands for: a base plus K dense task vectors."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

pytest.importorskip("peft")
pytest.importorskip("transformers")

from fusion_bench_cases import TASKS, clip, peft_models, saved, whole
from nsc_kernels import MergedLoRALinear
from nsc_merge.integrations.fusion_bench_layerwise import LayerWiseFactors

QV = ["q_proj", "v_proj"]


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def weights_for(base: nn.Module, low: float = -0.2, high: float = 1.2) -> torch.Tensor:
    count = sum(value.requires_grad for value in base.parameters())
    return low + (high - low) * torch.rand(len(TASKS), count, generator=torch.Generator().manual_seed(8))


def densely(base, models, weight, inputs, mask=None):
    """Output of the merge that dense task vectors define; ``weight [K, L]`` is used as it is."""
    merged = {}
    for column, (name, value) in enumerate(base.named_parameters()):
        merged[name] = value.detach()
        for k, model in enumerate(models):
            share = weight[k, column] if mask is None else weight[k, column] * mask[name]
            merged[name] = merged[name] + share * (model.get_parameter(name) - value).detach()
    return functional_call(base, merged, (inputs,))[1]


def compared(found, weight_found, expected, weight_expected):
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(weight_found.grad, weight_expected.grad, rtol=1e-4, atol=1e-4)
    assert weight_expected.grad.abs().max() > 0.1


@pytest.mark.parametrize("source", ["folders", "peft", "whole"])
@pytest.mark.parametrize("setting", ["plain", "clamp", "softmax"])
def test_outputs_and_gradients_are_those_of_dense_task_vectors(source, setting, tmp_path):
    base = clip()
    adapters = peft_models(base, QV)
    dense = list(whole(adapters).values())
    models = {"folders": saved(adapters, tmp_path), "peft": adapters, "whole": whole(adapters)}
    weight = weights_for(base)
    ours = LayerWiseFactors(
        weight.clone(),
        deepcopy(base),
        list(models[source].values()),
        clamp_weights=setting == "clamp",
        normalized_merging_weights=setting == "softmax",
    )
    assert len(ours._wrapped) == 4
    assert not ours._whole
    expected = weight.clone().requires_grad_()
    used = {"plain": expected, "clamp": expected.clamp(0, 1), "softmax": expected.softmax(0)}[setting]
    compared(ours(pixels())[1], ours.merge_weight, densely(base, dense, used, pixels()), expected)
    columns = {column for column, name in enumerate(ours.layer_names) if name.removesuffix(".weight") in ours._wrapped}
    moved = set(ours.merge_weight.grad.abs().sum(0).nonzero().flatten().tolist())
    assert moved == columns


def test_what_is_of_no_low_rank_is_held_whole():
    base = clip()
    models = list(whole(peft_models(base, QV)).values())
    with torch.no_grad():
        for model in models[:2]:
            for name in ("embeddings.class_embedding", "post_layernorm.bias", "encoder.layers.0.mlp.fc1.weight"):
                value = model.get_parameter(name)
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
            # Beside the factors of the same linear.
            model.get_parameter("encoder.layers.0.self_attn.q_proj.bias").add_(0.1)
    weight = weights_for(base)
    ours = LayerWiseFactors(weight.clone(), deepcopy(base), models, clamp_weights=False)
    assert len(ours._wrapped) == 4
    assert len(ours._whole) == 4
    expected = weight.clone().requires_grad_()
    compared(ours(pixels())[1], ours.merge_weight, densely(base, models, expected, pixels()), expected)


def test_a_bias_and_dora_of_adapters():
    for settings in ({"lora_bias": True}, {"use_dora": True}):
        base = clip()
        adapters = peft_models(base, QV, **settings)
        dense = list(whole(adapters).values())
        weight = weights_for(base)
        ours = LayerWiseFactors(weight.clone(), deepcopy(base), list(adapters.values()), clamp_weights=False)
        expected = weight.clone().requires_grad_()
        compared(ours(pixels())[1], ours.merge_weight, densely(base, dense, expected, pixels()), expected)


def test_tied_and_unseen_linears_are_held_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.rows = nn.Embedding(20, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.rows.weight

        def forward(self, ids):
            hidden = self.rows(ids)
            return None, self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0])

    torch.manual_seed(0)
    base = Tied()
    models = [deepcopy(base) for _ in TASKS]
    for number, model in enumerate(models):
        for name in ("rows.weight", "attention.out_proj.weight"):
            value = model.get_parameter(name)
            value.data += torch.randn(len(value), 1) @ torch.randn(1, 16) * 0.1 * (number + 1)
    weight = weights_for(base)
    ours = LayerWiseFactors(weight.clone(), deepcopy(base), models, clamp_weights=False, tie_weights=True)
    assert not ours._wrapped
    assert set(ours._whole) == {"rows.weight", "attention.out_proj.weight"}
    expected, ids = weight.clone().requires_grad_(), torch.arange(10)[None]
    compared(ours(ids)[1], ours.merge_weight, densely(base, models, expected, ids), expected)


def test_weights_count_from_one_merge_to_the_next():
    base = clip()
    ours = LayerWiseFactors(weights_for(base, 0.2, 0.4), deepcopy(base), list(peft_models(base, QV).values()))
    before = ours(pixels())[1].detach()
    with torch.no_grad():
        ours.merge_weight.add_(0.3)
    assert torch.equal(ours(pixels())[1], before)
    ours.merge_weights()
    assert (ours(pixels())[1] - before).abs().max() > 1e-3


def test_masks_and_the_state_dictionary():
    base = clip()
    adapters = peft_models(base, QV)
    weight = weights_for(base)
    ours = LayerWiseFactors(weight.clone(), deepcopy(base), list(adapters.values()), clamp_weights=False)
    generator = torch.Generator().manual_seed(2)
    mask = {name: torch.rand(value.shape, generator=generator).round() for name, value in base.named_parameters()}
    merged = ours.merge_weights(mask)
    assert list(merged) == list(base.state_dict())
    assert len(merged.changed) == 4
    expected = weight.clone().requires_grad_()
    dense = list(whole(adapters).values())
    compared(ours(pixels())[1], ours.merge_weight, densely(base, dense, expected, pixels(), mask), expected)
    with pytest.raises(ValueError, match="task_vector_mask: expected a mask for every column, found none for 1,"):
        ours.merge_weights({name: value for name, value in mask.items() if name != "pre_layrnorm.bias"})


def test_unloading():
    base = clip()
    held = deepcopy(base)
    identity = {name: value.data_ptr() for name, value in held.named_parameters()}
    ours = LayerWiseFactors(weights_for(base), held, list(peft_models(base, QV).values()))
    assert ours.merge_weights().keys() == base.state_dict().keys()
    with torch.no_grad():
        expected = ours(pixels())[1]
        copied = ours.merge_and_unload(copy=True)
        torch.testing.assert_close(copied(pixels())[1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(pixels())[1], expected)
        assert any(isinstance(module, MergedLoRALinear) for module in held.modules())
        merged = ours.merge_and_unload()
        assert merged is held
        assert not any(isinstance(module, MergedLoRALinear) for module in held.modules())
        torch.testing.assert_close(held(pixels())[1], expected, rtol=1e-5, atol=1e-5)
    assert {name: value.data_ptr() for name, value in held.named_parameters()} == identity
    for call in (lambda: ours(pixels()), ours.merge_weights, ours.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"merge_and_unload\(\) put the merged weights into pretrained_model"):
            call()


def test_wrong_arguments_leave_the_base_alone():
    base = clip()
    adapters = list(peft_models(base, QV).values())
    weight = weights_for(base)
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=r"layer_wise_weight: expected \[3, 39\], a row for each .*, found \[2, 39\]"):
        LayerWiseFactors(weight[:2], base, adapters)
    with pytest.raises(ValueError, match=r"sparsity_ratio: expected None, found 0\.5: a pruned update"):
        LayerWiseFactors(weight, base, adapters, sparsity_ratio=0.5)
    with pytest.raises(ValueError, match=r"finetuned_models\[0\]: expected a parameter .* as the base has, found none"):
        LayerWiseFactors(weight, base, [nn.Linear(2, 2), *adapters[1:]])
    broken = whole(peft_models(base, QV))["first"]
    broken.get_parameter("pre_layrnorm.bias").data[0] = float("nan")
    with pytest.raises(ValueError, match=r"finetuned_models\[2\]: pre_layrnorm\.bias: expected finite numbers"):
        LayerWiseFactors(weight, base, [*adapters[:2], broken])
    frozen = deepcopy(base)
    frozen.encoder.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"finetuned_models\[0\]: changes 'encoder\.layers\.1\.self_attn\.q_proj\.wei"):
        LayerWiseFactors(weight[:, 1:], frozen, adapters)
    assert dict(base.named_modules()) == modules
    assert all(value.requires_grad for value in base.parameters())

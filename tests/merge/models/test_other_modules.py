"""LoRA on GPT-2's Conv1D and on convolutions: forward, gradients and both formats against PEFT in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

import nsc_merge

LAM = {"a": 0.7, "b": -0.4}


def gpt2() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = GPT2Config(vocab_size=61, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    return GPT2LMHeadModel(config).double().eval(), {"input_ids": ids}, ["c_attn", "c_proj"]


def resnet() -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    config = ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ResNetForImageClassification(config).double().eval(), {"pixel_values": pixels}, ["convolution"]


CASES = {"Conv1D": gpt2, "Conv2d": resnet}


@pytest.fixture(params=CASES, scope="module")
def case(request: Any, tmp_path_factory: Any) -> tuple[nn.Module, dict[str, Tensor], dict[str, Path]]:
    torch.manual_seed(0)
    model, inputs, targets = CASES[request.param]()
    folders = {}
    for seed, task in enumerate(LAM):
        settings = LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=request.param == "Conv1D")
        adapted = get_peft_model(copy.deepcopy(model), settings)
        generator = torch.Generator().manual_seed(seed)
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape, generator=generator).to(value) * 0.3
        folders[task] = tmp_path_factory.mktemp(request.param) / task
        adapted.save_pretrained(folders[task])
    return model, inputs, folders


def by_peft(model: nn.Module, inputs: dict[str, Tensor], folders: dict[str, Path]) -> Tensor:
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folders["a"], adapter_name="a")
    adapted.load_adapter(folders["b"], "b")
    adapted.base_model.set_adapter(list(folders))
    for layer in adapted.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {task: LAM[task] * value for task, value in layer.scaling.items()}
    return adapted.double()(**inputs).logits.detach()


def test_the_attached_forward_is_pefts_and_has_its_gradient(case: Any) -> None:
    model, inputs, folders = case
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    expected = by_peft(model, inputs, folders)
    before = dict(model.named_modules())
    with nsc_merge.attach(model, adapters, LAM) as merged:
        y = model(**inputs).logits
        torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-7)
        y.square().sum().backward()
        module = list(merged.values())[1]
        step = torch.tensor([1e-5, 0.0], dtype=module.lam.dtype)
        with torch.no_grad():
            module.lam += step
            above = model(**inputs).logits.square().sum()
            module.lam -= 2 * step
            below = model(**inputs).logits.square().sum()
        torch.testing.assert_close(module.lam.grad[0], (above - below) / 2e-5, rtol=1e-5, atol=1e-6)
    assert dict(model.named_modules()) == before


def test_both_formats_compute_what_peft_does(case: Any, tmp_path: Path) -> None:
    model, inputs, folders = case
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=LAM)
    expected = by_peft(model, inputs, folders)
    whole = type(model).from_pretrained(result.save(tmp_path / "model", "model"), dtype=torch.float64).eval()
    torch.testing.assert_close(whole(**inputs).logits, expected, rtol=1e-6, atol=1e-7)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora")).double().eval()
    torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_update_of_full_rank_is_added_as_its_factors_are(case: Any) -> None:
    model, _, folders = case
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=LAM)
    matrices = {path: nsc_merge.Factor.of_matrix(result.delta(path)) for path in result.paths}
    dense = replace(result, coefficients={}, factors=matrices)
    found, wanted = dense.merged(model), result.merged(model)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


def test_an_adapter_in_memory_is_read_alike(case: Any) -> None:
    model, _, folders = case
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folders["a"])
    read, held = nsc_merge.load_adapter(folders["a"], "a"), nsc_merge.load_adapter(adapted, "a")
    assert read.factors.keys() == held.factors.keys()
    for path, factor in read.factors.items():
        torch.testing.assert_close(factor.delta(), held.factors[path].delta())


def test_nsc_measures_gpt2(tmp_path: Path) -> None:
    model, inputs, _ = gpt2()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    data = {"a": [inputs]}
    result = nsc_merge.merge(model, {"a": adapted}, data, steps=2, progress=False)
    assert result.options["scored"] == ["transformer.h.1.attn.c_attn"]
    moved = {row["a"] for row in result.coefficients.values()}
    assert len(moved) == 2, "the first block's coefficient moved, the last has no gradient"


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Embedding(8, 4, max_norm=1.0), "max_norm, which changes the base's rows"),
        (nn.Conv2d(4, 8, 3, groups=2), "several groups"),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Conv2d(4, 8, 3, dilation=2), "dilation"),
    ],
)
def test_modules_where_peft_is_no_oracle_are_refused(module: nn.Module, why: str) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    factor = nsc_merge.Factor(torch.ones(1, weight[0].numel()), torch.ones(len(weight), 1), 1.0)
    with pytest.raises(TypeError, match=f"{why}.*expected adapters that leave it out"):
        nsc_merge.merge(nn.Sequential(module), {"a": nsc_merge.Adapter("a", {"0": factor})}, method="task_arithmetic")


@pytest.mark.parametrize("method", ["ties", "dare", "svd", "regmean", "fisher", "nsc", "match"])
def test_a_conv1d_merges_as_the_linear_that_it_is(method: str) -> None:
    torch.manual_seed(0)
    model, inputs, _ = gpt2()
    model = model.float()
    same = copy.deepcopy(model)
    paths = [path for path, _ in model.named_modules() if path.endswith("c_attn")]
    for path in paths:
        own: Any = same.get_submodule(path)
        linear = nn.Linear(own.nx, own.nf)
        linear.weight.data, linear.bias.data = own.weight.data.t().contiguous(), own.bias.data.clone()
        same.get_submodule(path.rpartition(".")[0]).c_attn = linear
    adapters = {
        task: nsc_merge.Adapter(
            task, {path: nsc_merge.Factor(torch.randn(2, 12), torch.randn(36, 2), 0.3) for path in paths}
        )
        for task in LAM
    }
    options: dict[str, Any] = {"steps": 3, "progress": False} if method in ("nsc", "match") else {}
    data = {task: [inputs] for task in adapters}
    found, wanted = (nsc_merge.merge(one, adapters, data, method, **options) for one in (model, same))
    merged, expected = found.merged(model), wanted.merged(same)
    for path in paths:
        torch.testing.assert_close(merged[f"{path}.weight"].t(), expected[f"{path}.weight"], rtol=1e-5, atol=1e-6)

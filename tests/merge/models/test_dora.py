"""DoRA, merged as the exact update that it is to the base; the oracle is PEFT's own forward in float64."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from zoo import DECODER, outputs, text, write_adapter

import nsc_merge
from nsc_merge.adapters import Factor
from nsc_merge.results.beside.norms import inner_products, norm_kept

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, attention_bias=True)).double().eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    return made


@pytest.fixture(scope="module")
def tasks(model: nn.Module) -> dict[str, PeftModel]:
    """Two DoRA adapters in float64, on modules that overlap."""
    found = {}
    for seed, (name, targets) in enumerate(zip(NAMES, (["q_proj", "v_proj"], ["v_proj", "up_proj"]), strict=True)):
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True)
        peft = get_peft_model(copy.deepcopy(model), config).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in peft.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
                elif "lora_" in key:
                    value.copy_(0.15 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        found[name] = peft
    return found


def weights(merged: nn.Module, path: str) -> Tensor:
    return merged.get_submodule(path).weight.detach()


def gain_of(factor: Factor) -> Tensor:
    assert factor.gain is not None
    return factor.scaling * factor.gain


@pytest.fixture(scope="module")
def differences(model: nn.Module, tasks: dict[str, PeftModel]) -> dict[str, dict[str, Tensor]]:
    """Task -> module -> what PEFT's own merge changes of the weight."""
    found = {}
    for name, peft in tasks.items():
        own = copy.deepcopy(peft).merge_and_unload()
        paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        found[name] = {path: weights(own, path) - weights(model, path) for path in paths}
    return found


@pytest.fixture(scope="module")
def both(model: nn.Module, tasks: dict[str, PeftModel]) -> nsc_merge.MergeResult:
    return nsc_merge.merge(model, tasks, method="task_arithmetic", scale=0.6)


def test_one_task_computes_what_peft_does(model: nn.Module, tasks: dict[str, PeftModel]) -> None:
    for name, peft in tasks.items():
        result = nsc_merge.merge(model, {name: peft}, method="task_arithmetic", scale=1.0)
        merged = result.apply(copy.deepcopy(model))
        # Layer by layer: LLaMA's norms round to float32, so that its outputs hide what is smaller.
        with nsc_merge.attach(model, result.adapters, 1.0), torch.no_grad():
            for path in result.paths:
                own, base = peft.get_base_model().get_submodule(path), merged.get_submodule(path)
                z = torch.randn(5, base.in_features, dtype=torch.float64)
                expected = own(z)
                assert float((expected - own.base_layer(z)).abs().max()) > 0.1
                torch.testing.assert_close(model.get_submodule(path)(z), expected, rtol=0, atol=1e-12)
                torch.testing.assert_close(base(z), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(outputs(model, text(1)), outputs(peft, text(1)), rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs(merged, text(1)), outputs(peft, text(1)), rtol=0, atol=1e-6)


def test_two_tasks_are_the_sum_of_their_differences(
    model: nn.Module, both: nsc_merge.MergeResult, differences: dict[str, dict[str, Tensor]]
) -> None:
    merged = both.apply(copy.deepcopy(model))
    for path in both.paths:
        wanted = 0.6 * (differences["a"][path] + differences["b"][path])
        torch.testing.assert_close(both.delta(path), wanted, rtol=0, atol=1e-13)
        torch.testing.assert_close(weights(merged, path), weights(model, path) + wanted, rtol=0, atol=1e-13)
    with nsc_merge.attach(model, both.adapters, 0.6), torch.no_grad():
        for path in both.paths:
            z = torch.randn(5, model.get_submodule(path).in_features, dtype=torch.float64)
            torch.testing.assert_close(
                model.get_submodule(path)(z), merged.get_submodule(path)(z), rtol=0, atol=1e-12
            )
    half, path = both.scaled(0.5), both.paths[0]
    torch.testing.assert_close(half.delta(path), both.delta(path) / 2)


def test_coefficients_have_the_right_gradient(model: nn.Module, both: nsc_merge.MergeResult) -> None:
    path = "model.layers.0.self_attn.v_proj"
    z = torch.randn(3, model.get_submodule(path).in_features, dtype=torch.float64, requires_grad=True)
    with nsc_merge.attach(model, both.adapters, {"a": 0.3, "b": -0.7}) as merged:
        linear = merged[path]
        held = linear.lam.detach().clone()

        def run(z: Tensor, lam: Tensor) -> Tensor:
            return torch.func.functional_call(linear, {"lam": lam}, (z,))

        assert torch.autograd.gradcheck(run, (z, held.requires_grad_()))
        by_weight = nn.functional.linear(z, linear.weight, linear.bias)
        torch.testing.assert_close(linear(z), by_weight, rtol=0, atol=1e-13)
        seen: list[Tensor] = []
        linear.measure = lambda _, quad, sqnorm: seen.append(quad)
        torch.testing.assert_close(linear(z), by_weight, rtol=0, atol=1e-13)
        assert seen[0].shape == (3, 2)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_adapter_saved_is_reloaded_as_what_was_merged(
    model: nn.Module, both: nsc_merge.MergeResult, tmp_path: Path, rank: int | None
) -> None:
    folder = both.save(tmp_path / "lora", "lora", rank=rank)
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert sum("lora_magnitude_vector" in key for key in file.keys()) == len(both.paths)  # noqa: SIM118
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).double()
    own = copy.deepcopy(peft).merge_and_unload()
    again = nsc_merge.merge(model, {"merged": folder}, method="task_arithmetic", scale=1.0)
    errors = both.rank_errors(rank) if rank else {}
    for path in both.paths:
        found, wanted = weights(own, path) - weights(model, path), both.delta(path)
        torch.testing.assert_close(again.delta(path), found, rtol=0, atol=1e-6)
        if rank is None:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        else:
            # Only the low-rank part is truncated.
            terms = [(lam, replace(factor, gain=None)) for lam, factor in both.terms(path)]
            part = sum(lam * factor.delta() for lam, factor in terms)
            assert float((found - wanted).norm() / part.norm()) == pytest.approx(errors[path], abs=1e-5)
    if rank is None:
        with nsc_merge.attach(model, both.adapters, 0.6):
            torch.testing.assert_close(outputs(peft, text(3)), outputs(model, text(3)), rtol=0, atol=1e-5)


def test_plain_modules_beside_dora_are_written_with_their_own_norms(
    model: nn.Module, tasks: dict[str, PeftModel], tmp_path: Path
) -> None:
    plain = write_adapter(model, tmp_path / "plain", 4, r=2, target_modules=["o_proj"])
    result = nsc_merge.merge(model, {"a": tasks["a"], "plain": plain}, method="task_arithmetic", scale=0.8)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), result.save(tmp_path / "lora", "lora")).double()
    merged = result.apply(copy.deepcopy(model))
    torch.testing.assert_close(outputs(peft, text(4)), outputs(merged, text(4)), rtol=0, atol=1e-5)


def test_the_model_saved_is_the_merged_one(model: nn.Module, both: nsc_merge.MergeResult, tmp_path: Path) -> None:
    again = tf.LlamaForCausalLM.from_pretrained(both.save(tmp_path / "model", "model"), dtype=torch.float64)
    for path in both.paths:
        torch.testing.assert_close(weights(again, path), weights(model, path) + both.delta(path), rtol=0, atol=1e-15)
    norms = norm_kept(both)
    wanted = torch.stack([both.delta(path).norm() for path in both.paths]).norm()
    assert norms.merged == pytest.approx(float(wanted), rel=1e-5)


def test_magnitudes_need_the_base_as_it_was_merged(
    model: nn.Module, tasks: dict[str, PeftModel], tmp_path: Path
) -> None:
    own = copy.deepcopy(model)
    result = nsc_merge.merge(own, tasks, method="task_arithmetic", scale=0.6)
    result.apply(own)
    with pytest.raises(ValueError, match="model: apply has changed it since this merge was made"):
        result.save(tmp_path / "lora", "lora")


def test_inner_products_count_gains() -> None:
    torch.manual_seed(1)
    base = torch.randn(7, 5)
    A, B, gain = torch.randn(2, 5), torch.randn(7, 2), torch.randn(7)
    one, plain = Factor(A, B, 0.5, gain=gain), Factor(torch.randn(2, 5), torch.randn(7, 2), 2.0)
    dense = [0.5 * (gain[:, None] * base + B @ A).double(), plain.delta()]
    wanted = torch.tensor([[float((x * y).sum()) for y in dense] for x in dense], dtype=torch.float64)
    found = inner_products([one, plain], lambda begin, end: base[begin:end])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "wanted_share"),
    # Divided as the methods divide their updates.
    [("ties", 0.35), ("dare", 0.7), ("knots_ties", 0.35), ("svd", 0.7)],
)
def test_methods_without_data_add_gains_as_task_arithmetic_does(
    model: nn.Module, tasks: dict[str, PeftModel], both: nsc_merge.MergeResult, method: str, wanted_share: float
) -> None:
    result = nsc_merge.merge(model, tasks, method=method, scale=0.7)
    path = "model.layers.1.self_attn.v_proj"
    gains = [gain_of(both.adapters[name].factors[path]) for name in NAMES]
    merged = result.factors[path]
    assert merged.gain is not None
    share = float((merged.gain.double() @ sum(gains)) / (sum(gains) @ sum(gains)))
    torch.testing.assert_close(merged.gain.double(), share * sum(gains), rtol=1e-5, atol=1e-6)
    assert share == pytest.approx(wanted_share)
    bare = replace(merged, gain=None)
    wanted = bare.delta() + merged.gain.double()[:, None] * weights(model, path)
    torch.testing.assert_close(result.delta(path), wanted, rtol=0, atol=1e-12)


def test_every_task_keeps_its_gains_in_emr(
    model: nn.Module, tasks: dict[str, PeftModel], both: nsc_merge.MergeResult
) -> None:
    own = nsc_merge.merge(model, tasks, method="emr").for_task("a")
    path = "model.layers.1.self_attn.v_proj"
    torch.testing.assert_close(own.factors[path].gain, gain_of(both.adapters["a"].factors[path]))


@pytest.mark.parametrize("method", ["linear", "lora_lego", "robustmerge", "core_space", "ties"])
def test_of_magnitudes_that_are_the_norms_dora_is_merged_as_plain_factors(model: nn.Module, method: str) -> None:
    """Also by methods of factors, which share the scaling between the two."""
    path, generator = "model.layers.1.self_attn.v_proj", torch.Generator().manual_seed(0)
    weight = weights(model, path)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    plain = {n: Factor(drawn(2, weight.shape[1]), drawn(len(weight), 2), s) for n, s in (("a", 0.5), ("b", 4.0))}
    dora = {n: replace(one, magnitude=(weight + one.delta()).norm(dim=1)) for n, one in plain.items()}
    found, wanted = (
        nsc_merge.merge(model, {n: nsc_merge.Adapter(n, {path: one}) for n, one in held.items()}, method=method)
        for held in (dora, plain)
    )
    torch.testing.assert_close(found.delta(path), wanted.delta(path), rtol=1e-5, atol=1e-5)


def test_dora_with_a_scaling_of_0_is_its_gain(model: nn.Module) -> None:
    path = "model.layers.1.self_attn.v_proj"
    weight = weights(model, path)
    A, B = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    off = nsc_merge.Adapter("a", {path: Factor(A, B, 0.0, magnitude=1.5 * weight.norm(dim=1))})
    found = nsc_merge.merge(model, {"a": off}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(found.delta(path), 0.5 * weight, rtol=0, atol=1e-12)


def test_nsc_and_regmean_merge_dora(model: nn.Module, tasks: dict[str, PeftModel]) -> None:
    data = {name: [text(seed)] for seed, name in enumerate(NAMES)}
    for fold in (None, True):
        result = nsc_merge.merge(model, tasks, data, steps=2, fold=fold)
        merged = result.apply(copy.deepcopy(model))
        with nsc_merge.attach(model, result.adapters, 0.0) as linears:
            for path, linear in linears.items():
                row = [result.coefficients[path][name] for name in NAMES]
                linear.lam.data = torch.tensor(row, dtype=torch.float64)
                z = torch.randn(5, linear.in_features, dtype=torch.float64)
                torch.testing.assert_close(linear(z), merged.get_submodule(path)(z), rtol=0, atol=1e-12)
    averaged = nsc_merge.merge(model, tasks, data, method="regmean")
    assert all(averaged.factors[path].gain is not None for path in averaged.paths)


def test_in_bfloat16_about_as_far_off_as_peft(model: nn.Module, tasks: dict[str, PeftModel]) -> None:
    path = "model.layers.0.self_attn.v_proj"
    own = copy.deepcopy(tasks["a"]).bfloat16()
    base = copy.deepcopy(model).bfloat16()
    result = nsc_merge.merge(base, {"a": own}, method="task_arithmetic", scale=1.0)
    layer = own.get_base_model().get_submodule(path)
    z = torch.randn(500, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), nsc_merge.attach(base, result.adapters, 1.0):
        exact = copy.deepcopy(layer).double()(z.double())
        ours, theirs = base.get_submodule(path)(z), layer(z)
    assert ours.dtype is torch.bfloat16
    assert float((ours - exact).norm()) <= 1.25 * float((theirs - exact).norm())


def test_tensors_that_require_a_gradient_are_merged_as_their_values(
    model: nn.Module, tasks: dict[str, PeftModel]
) -> None:
    read = {name: nsc_merge.load_adapter(peft, name) for name, peft in tasks.items()}
    data = {name: [text(seed)] for seed, name in enumerate(NAMES)}
    wanted = nsc_merge.merge(model, read, data, steps=2)
    for part in ("magnitude", "bias"):
        learnt = {}
        for name, adapter in read.items():
            factors = {}
            for path, factor in adapter.factors.items():
                value = torch.zeros(len(factor.B)) if part == "bias" else factor.magnitude.clone()
                factors[path] = replace(factor, **{part: value.requires_grad_()})
            learnt[name] = replace(adapter, factors=factors)
        assert nsc_merge.merge(model, learnt, data, steps=2).coefficients == wanted.coefficients


def test_what_dora_cannot_hold_is_refused_with_the_way_out(
    model: nn.Module, tasks: dict[str, PeftModel], tmp_path: Path
) -> None:
    result = nsc_merge.merge(model, tasks, method="task_arithmetic", scale=-9.0)
    with pytest.raises(ValueError, match=r"format 'lora': the merge turns row .* use format 'model', or .*'convert'"):
        result.save(tmp_path / "turned", "lora")
    biased = write_adapter(model, tmp_path / "biased", 5, r=2, target_modules=["o_proj"], lora_bias=True)
    result = nsc_merge.merge(model, {"a": tasks["a"], "biased": biased}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"o_proj has a bias \(lora_bias\), which PEFT has no DoRA with"):
        result.save(tmp_path / "bias", "lora")
    rows = write_adapter(model, tmp_path / "rows", 5, r=2, target_modules=["embed_tokens"])
    result = nsc_merge.merge(model, {"a": tasks["a"], "rows": rows}, method="task_arithmetic")
    with pytest.raises(ValueError, match="embed_tokens is Embedding, and in a DoRA adapter every module has DoRA"):
        result.save(tmp_path / "embedding", "lora")
    assert not (tmp_path / "embedding").exists()
    rows = write_adapter(model, tmp_path / "both", 5, r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    for dora in ("exact", "convert"):
        with pytest.raises(ValueError, match=r"embed_tokens: DoRA on an embedding .*use_dora=False"):
            nsc_merge.merge(model, {"a": rows}, method="task_arithmetic", dora=dora)
    with pytest.raises(ValueError, match="runs DoRA, expected plain LoRA, or dora='exact' or 'convert'"):
        nsc_merge.merge(model, {"a": nsc_merge.load_adapter(tasks["a"], "a")}, method="task_arithmetic", dora="refuse")


def test_conv1d_is_refused_by_name(tmp_path: Path) -> None:
    gpt = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    folder = write_adapter(gpt, tmp_path / "a", 1, r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="DoRA on Conv1D is not merged, expected it on linears"):
        nsc_merge.merge(gpt, {"a": folder}, method="task_arithmetic")

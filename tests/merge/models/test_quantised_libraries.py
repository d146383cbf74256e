"""Real libraries of quantised weights, where they are installed: their forward is kept, their codes are not touched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from loop_cases import llama, text_batches, trajectory, values
from peft import LoraConfig, get_peft_model
from torch import nn

import nsc_merge
from nsc_kernels.integrations.peft import accelerate
from nsc_merge import Adapter, Factor
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import KINDS, Placement
from nsc_merge.models.bases.quantised import check_gradients, dequantised, is_linear, is_quantised
from nsc_merge.models.families import family_of


def bitsandbytes_8bit(model):
    library = pytest.importorskip("bitsandbytes")
    for name, linear in model.named_children():
        quantised = library.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        quantised.weight = library.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        setattr(model, name, quantised.to("cpu"))


def bitsandbytes_4bit(model):
    library = pytest.importorskip("bitsandbytes")
    for name, linear in model.named_children():
        quantised = library.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        quantised.weight = library.nn.Params4bit(linear.weight.detach(), requires_grad=False)
        setattr(model, name, quantised.to("cpu"))


def torchao(model):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())


def quanto(model):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)


@pytest.mark.parametrize("quantise", [bitsandbytes_8bit, bitsandbytes_4bit, torchao, quanto])
def test_attached_around_their_forward_and_refused_for_apply(quantise):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    quantise(model)
    model.scale = nn.Parameter(torch.ones(1))
    model.eval().requires_grad_(False)
    factors = {path: Factor(torch.randn(2, 64), torch.randn(64, 2), 0.5) for path in ("0", "1")}
    result = nsc_merge.merge(model, {"a": Adapter("a", factors)}, method="task_arithmetic", scale=0.4)
    z = torch.randn(3, 64)
    with torch.no_grad():
        expected = z
        for path in ("0", "1"):
            expected = model.get_submodule(path)(expected) + expected @ result.delta(path).float().t()
    with nsc_merge.attach(model, result.adapters, 0.4) as merged:
        found = model(z)
        found.sum().backward()
        assert all(module.lam.grad.abs() > 0 for module in merged.values())
    # 8-bit products quantise their input as well, so that a rounding before them shows.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    with torch.no_grad():
        before = model(z)
    with pytest.raises(ValueError, match=r"^0\.weight: .*; use format 'lora' and load it on the quantised base"):
        result.apply(model)
    with torch.no_grad():
        assert torch.equal(model(z), before)


def base(folder, heads=2):
    """A decoder whose linears are wide enough for blocks of 64 and groups of 32."""
    config = transformers.LlamaConfig(**{**llama().config.to_dict(), "hidden_size": 64, "intermediate_size": 64})
    config.head_dim = 64 // heads
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def adapters():
    generator = torch.Generator().manual_seed(1)
    paths = [f"model.layers.{n}.{name}" for n in range(4) for name in ("self_attn.v_proj", "mlp.up_proj")]
    return {
        task: Adapter(
            task,
            {
                path: Factor(
                    torch.randn(2, 64, generator=generator), 0.1 * torch.randn(64, 2, generator=generator), 1.0
                )
                for path in paths
            },
        )
        for task in ("a", "b", "c")
    }


def first_gradient(model):
    """NSC's objective for every task, and its gradient."""
    given = adapters()
    family = family_of(model)
    scored = [path for path in given["a"].factors if path.endswith("v_proj")][-1:]
    chosen = resolve_options(family, list(given), {"batch_tasks": False, "fold": False})
    with objective_of(model, given, family, scored, chosen) as objective:
        omega = objective.accumulate([batches[0] for batches in text_batches(1).values()])
        return omega, objective.coefficients.flat.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_quantised_as_it_is_loaded(kind, tmp_path):
    pytest.importorskip(KINDS[kind].library)
    place = Placement(dtype="float32", device="cpu")
    folder = base(tmp_path / "base")
    model = load_model(folder, local=True, placement=dataclasses.replace(place, quantization=kind))
    plain = load_model(folder, local=True, placement=place)
    paths = [path for path, module in model.named_modules() if is_linear(module) and is_quantised(module)]
    assert len(paths) == 28
    with torch.no_grad():
        for path in paths:
            plain.get_submodule(path).weight.copy_(dequantised(model, path))
        # Running it must not change what its backward gives.
        model(**text_batches(1)["a"][0])
    # 8-bit products of bitsandbytes round their inputs as well.
    share = 0.1 if kind == "bitsandbytes-8bit" else 1e-4
    for mine, other in zip(first_gradient(model), first_gradient(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=share * float(other.abs().max()))
    found = trajectory(model, adapters(), text_batches(), steps=2)
    assert (values(found) - 0.4).abs().max() > 1e-2
    with pytest.raises(ValueError, match="dequantize=True"):
        found.save(tmp_path / "no", "model")
    saved = transformers.LlamaForCausalLM.from_pretrained(found.save(tmp_path / "out", "model", dequantize=True))
    assert not hasattr(saved.config, "quantization_config")
    for name, value in found.apply(plain).named_parameters():
        assert torch.equal(saved.get_parameter(name), value)


@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"])
def test_pefts_layers_around_their_linears_run_fused(kind, tmp_path):
    pytest.importorskip(KINDS[kind].library)
    place = Placement(dtype="float32", device="cpu", quantization=kind)
    model = load_model(base(tmp_path / "base"), local=True, placement=place)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, config, "a").eval()
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    model.requires_grad_(False)
    z = model.get_input_embeddings()(text_batches(1)["a"][0]["input_ids"]).detach().requires_grad_()
    found = []
    for fused in (False, True):
        with accelerate(model) if fused else torch.enable_grad() as handle:
            assert not fused or handle.layers == 8
            y = model(inputs_embeds=z).logits
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), z)))
    for mine, peft in zip(*found, strict=True):
        torch.testing.assert_close(mine, peft, rtol=0, atol=1e-5 * float(peft.abs().max()))


@pytest.mark.parametrize("kind", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"])
def test_a_quantised_base_with_adapters_unwraps_itself(kind, tmp_path):
    """A QLoRA model, merged with its own adapter: as the base that was quantised alike, without it."""
    pytest.importorskip(KINDS[kind].library)
    place = Placement(dtype="float32", device="cpu", quantization=kind)
    folder = base(tmp_path / "base")
    clean, under = (load_model(folder, local=True, placement=place) for _ in range(2))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(under, config, "own").eval()
    inputs = text_batches(1)["a"][0]
    with torch.no_grad():
        adapted, plain = model(**inputs).logits, clean(**inputs).logits
    given = {"own": nsc_merge.load_adapter(model, "own"), "b": adapters()["b"]}
    data = {"own": text_batches()["a"], "b": text_batches()["b"]}
    found = trajectory(model, {**given, "own": model}, data, steps=2)
    expected = trajectory(clean, given, data, steps=2)
    assert (values(found) - 0.4).abs().max() > 1e-2
    assert torch.equal(values(found), values(expected))
    with torch.no_grad():
        assert torch.equal(found.model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, adapted)
    saved = nsc_merge.load_adapter(found.save(tmp_path / "out", "lora"), "merged")
    for path in found.paths:
        torch.testing.assert_close(saved.factors[path].delta(), found.delta(path), rtol=1e-5, atol=1e-6)


def test_a_4_bit_base_that_bitsandbytes_laid_out_for_inference_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("only processors with AVX512-BF16 have that layout")
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    bitsandbytes_4bit(model)
    model.scale = nn.Parameter(torch.ones(1))
    model.eval().requires_grad_(False)
    check_gradients(model)
    with torch.no_grad():
        model(torch.randn(3, 64))
    with pytest.raises(ValueError, match=r"^0: .*found a Linear4bit .*bitsandbytes' 4 bits on a CPU: anew"):
        check_gradients(model)

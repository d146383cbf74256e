"""Adapters of mixtures of experts: of whole parameters, as PEFT's target_parameters has them, and of single experts as
transformers 4 had these; the oracle is PEFT's own forward in float64.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import outputs

import nsc_merge
from nsc_merge.adapters import outline_of
from nsc_merge.adapters.formats.parameter_stacks import updates_of
from nsc_merge.analysis.adapter_overlap import describe
from nsc_merge.integrations.peft import merge as merge_in_place
from nsc_merge.models.bases import numbers

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPERTS = 4
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=EXPERTS))


def qwen() -> nn.Module:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=12))


def gpt_oss() -> nn.Module:
    """Its experts are ``[E, d_in, d_out]``, and have biases."""
    config = tf.GptOssConfig(**SIZES, num_local_experts=EXPERTS, layer_types=["full_attention"] * 2)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return tf.GptOssForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss}
ROUTERS = {"mixtral": "mlp.gate.weight", "qwen": "mlp.gate.weight", "gpt-oss": "mlp.router.weight"}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    # The grouped products know no float64.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: made(kind) for kind in MODELS}


def tokens(seed: int = 5) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(seed))}


def trained(model: nn.Module, seed: int, parameters: list[str], modules: list[str], r: int = 2, **others: Any) -> Any:
    config = LoraConfig(r=r, lora_alpha=3, target_modules=modules, target_parameters=parameters, **others)
    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float32))
    return peft.double().eval()


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_of_parameters_compute_what_peft_does(models: dict[str, nn.Module], kind: str, tmp_path: Path) -> None:
    model, base = models[kind], outputs(models[kind], tokens())
    for number, parameters in enumerate((BOTH[:1], [*BOTH, ROUTERS[kind]])):
        pattern = {"experts.down_proj": 3} if number else {}
        peft = trained(model, number, parameters, ["q_proj"], rank_pattern=pattern)
        peft.save_pretrained(tmp_path / str(number))
        wanted = outputs(peft, tokens())
        assert (wanted - base).abs().max() > 0.1
        for source in (tmp_path / str(number), peft):
            result = nsc_merge.merge(model, {"a": source}, method="task_arithmetic", scale=1.0)
            assert len(result.paths) == 2 * (1 + EXPERTS * min(len(parameters), 2) + len(parameters) // 3)
            with nsc_merge.attach(model, result.adapters, 1.0):
                torch.testing.assert_close(outputs(model, tokens()), wanted, rtol=0, atol=1e-12)
            merged = result.apply(copy.deepcopy(model))
            torch.testing.assert_close(outputs(merged, tokens()), wanted, rtol=0, atol=1e-12)
        assert torch.equal(outputs(model, tokens()), base)


@pytest.mark.parametrize("width", [24, 16])
@pytest.mark.parametrize(("kind", "version"), [("mixtral", "0.18.1"), ("mixtral", "0.19.0"), ("gpt-oss", "0.19.0")])
def test_adapters_of_parameters_by_an_earlier_peft_are_turned(
    kind: str, version: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They took outputs for inputs; today's refuses that, and misreads it where there are as many."""
    monkeypatch.setitem(SIZES, "intermediate_size", width)
    model = made(kind)
    peft = trained(model, 1, [BOTH[1]], ["q_proj"])
    peft.save_pretrained(tmp_path)
    weights, settings = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    for key in [key for key in weights if "experts.lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        A, B = weights[key].reshape(EXPERTS, 2, -1), weights[other].reshape(-1, 2, EXPERTS)
        weights[key] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
        weights[other] = A.permute(2, 1, 0).flatten(1).contiguous()
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "peft_version": version}))
    result = nsc_merge.merge(model, {"a": tmp_path}, method="task_arithmetic", scale=1.0)
    merged = result.apply(copy.deepcopy(model))
    torch.testing.assert_close(outputs(merged, tokens()), outputs(peft, tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_both_formats_hold_what_was_merged(models: dict[str, nn.Module], kind: str, tmp_path: Path) -> None:
    """Of adapters on other parameters, with other ranks."""
    model = models[kind]
    adapters = {
        "a": trained(model, 1, BOTH, ["q_proj"]),
        "b": trained(model, 2, [BOTH[1], ROUTERS[kind]], [], r=3),
    }
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
    wanted = outputs(result.apply(copy.deepcopy(model)), tokens())
    saved = result.save(tmp_path / "model", "model")
    again = type(model).from_pretrained(saved, dtype=torch.float64, experts_implementation="eager")
    torch.testing.assert_close(outputs(again, tokens()), wanted, rtol=0, atol=1e-12)
    lora = result.save(tmp_path / "lora", "lora")
    peft = PeftModel.from_pretrained(copy.deepcopy(model), lora).double()
    torch.testing.assert_close(outputs(peft, tokens()), wanted, rtol=0, atol=1e-6)
    read = nsc_merge.merge(model, {"merged": lora}, method="task_arithmetic", scale=1.0)
    for path in result.paths:
        torch.testing.assert_close(read.delta(path), result.delta(path), rtol=0, atol=1e-6)
    assert "target_parameters), which PEFT loads and not every server does: save as a model" in (
        (lora / "README.md").read_text()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_experts_that_are_saved_some_after_others_are_those_of_one_piece(
    models: dict[str, nn.Module], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones do not fit into a tile together; here no two of them do."""
    adapters = {"a": trained(models[kind], 1, BOTH, []), "b": trained(models[kind], 2, [BOTH[1]], [])}
    result = nsc_merge.merge(models[kind], adapters, method="task_arithmetic", scale=0.5)
    whole = result.merged(models[kind])
    monkeypatch.setattr(numbers, "_TILE", 0)
    assert sum(value.dim() == 3 for value in whole.values()) == 4
    for name, value in result.merged(models[kind]).items():
        assert torch.equal(value, whole[name]), name


def of_single_experts(folder: Path, kind: str, experts: range, names: list[str]) -> Path:
    """As transformers 4 had the modules, with LoRA on those of ``experts`` called ``names``."""
    block, width = ("block_sparse_moe", 24) if kind == "mixtral" else ("mlp", 12)
    sizes = {"w1": (width, 16), "w3": (width, 16), "w2": (16, width)}
    sizes |= {"gate_proj": (width, 16), "up_proj": (width, 16), "down_proj": (16, width)}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in experts:
            for name in names:
                d_out, d_in = sizes[name]
                begin = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{begin}.lora_A.weight"] = 0.3 * torch.randn(2, d_in, generator=generator)
                tensors[f"{begin}.lora_B.weight"] = 0.3 * torch.randn(d_out, 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=3, target_modules=names, task_type="CAUSAL_LM").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "names"), [("mixtral", ["w1", "w3", "w2"]), ("qwen", ["gate_proj", "up_proj", "down_proj"])]
)
def test_adapters_of_single_experts_compute_what_peft_makes_of_them(
    models: dict[str, nn.Module], kind: str, names: list[str], tmp_path: Path
) -> None:
    model = models[kind]
    for number, chosen in enumerate((names, names[2:])):
        folder = of_single_experts(tmp_path / str(number), kind, range(EXPERTS), chosen)
        wanted = outputs(PeftModel.from_pretrained(copy.deepcopy(model), folder).double(), tokens())
        result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
        assert (wanted - outputs(model, tokens())).abs().max() > 0.1
        torch.testing.assert_close(outputs(result.apply(copy.deepcopy(model)), tokens()), wanted, rtol=0, atol=1e-12)


def test_some_experts_and_halves_of_a_matrix_that_peft_refuses_are_merged_as_they_are(
    models: dict[str, nn.Module], tmp_path: Path
) -> None:
    model = models["mixtral"]
    folder = of_single_experts(tmp_path / "a", "mixtral", range(1, 3), ["w3"])
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    merged, tensors = result.apply(copy.deepcopy(model)), load_file(folder / "adapter_model.safetensors")
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        changed = merged.get_parameter(f"{path}.gate_up_proj") - model.get_parameter(f"{path}.gate_up_proj")
        wanted = torch.zeros_like(changed)
        for expert in (1, 2):
            begin = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w3"
            A, B = (tensors[f"{begin}.lora_{part}.weight"].double() for part in "AB")
            # w1 is above w3.
            wanted[expert, 24:] = 1.5 * B @ A
        torch.testing.assert_close(changed, wanted, rtol=0, atol=1e-12)


def test_halves_of_a_matrix_with_scalings_of_their_own_are_not_rounded_to_the_files_dtype(
    models: dict[str, nn.Module], tmp_path: Path
) -> None:
    model = models["mixtral"]
    folder = of_single_experts(tmp_path / "a", "mixtral", range(1), ["w1", "w3"])
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(tensors, file)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "alpha_pattern": {"w3": 5}}))
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    halves = []
    for name, scaling in (("w1", 1.5), ("w3", 2.5)):
        begin = f"base_model.model.model.layers.0.block_sparse_moe.experts.0.{name}"
        A, B = (tensors[f"{begin}.lora_{part}.weight"].double() for part in "AB")
        halves.append(scaling * B @ A)
    found = result.delta("model.layers.0.mlp.experts.gate_up_proj.0")
    torch.testing.assert_close(found, torch.cat(halves), rtol=1e-6, atol=1e-7)


def test_two_names_of_one_expert_are_refused(models: dict[str, nn.Module], tmp_path: Path) -> None:
    folder = of_single_experts(tmp_path / "a", "mixtral", range(1), ["w2"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    again = {key.replace("block_sparse_moe", "mlp"): one.clone() for key, one in tensors.items()}
    save_file({**tensors, **again}, file)
    with pytest.raises(ValueError, match=r"experts\.0\.w2 and another module both mean a part of .*down_proj\.0"):
        nsc_merge.merge(models["mixtral"], {"a": folder}, method="task_arithmetic")


def test_adapters_of_a_router_as_transformers_4_had_it(models: dict[str, nn.Module], tmp_path: Path) -> None:
    model = models["mixtral"]
    factors = {"lora_A": torch.randn(2, 16), "lora_B": torch.randn(EXPERTS, 2)}
    begin = "base_model.model.model.layers.1.block_sparse_moe.gate"
    save_file({f"{begin}.{part}.weight": one for part, one in factors.items()}, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=2, target_modules=["gate"]).save_pretrained(str(tmp_path))
    result = nsc_merge.merge(model, {"a": tmp_path}, method="task_arithmetic", scale=1.0)
    path = "model.layers.1.mlp.gate.weight"
    assert result.paths == [path]
    merged = result.apply(copy.deepcopy(model))
    wanted = model.get_parameter(path) + factors["lora_B"].double() @ factors["lora_A"].double()
    torch.testing.assert_close(merged.get_parameter(path).detach(), wanted.detach(), rtol=0, atol=1e-12)
    with nsc_merge.attach(model, result.adapters, 1.0):
        torch.testing.assert_close(outputs(model, tokens()), outputs(merged, tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_coefficients_have_the_right_gradient(models: dict[str, nn.Module], kind: str) -> None:
    """Of the experts and the router by themselves: norms and routing round to float32."""
    model = models[kind]
    peft = {"a": trained(model, 1, BOTH, ["v_proj"]), "b": trained(model, 2, [*BOTH, ROUTERS[kind]], [], r=3)}
    adapters = nsc_merge.merge(model, peft, method="task_arithmetic").adapters
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(7, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    chosen = torch.randint(EXPERTS, (7, 2), generator=generator)
    weights = torch.rand(7, 2, generator=generator).double()
    with nsc_merge.attach(model, adapters, {"a": 0.3, "b": -0.4}) as merged:
        block = model.get_submodule("model.layers.0.mlp")
        experts = [module for path, module in merged.items() if path.startswith("model.layers.0.mlp.experts.")]
        assert len(experts) == 2 * EXPERTS
        router = merged[f"model.layers.0.{ROUTERS[kind]}"]

        def run(z: Tensor, *lam: Tensor) -> tuple[Tensor, Tensor]:
            for module, value in zip((router, *experts), lam, strict=True):
                module._parameters["lam"] = value
            routed = block.get_submodule(ROUTERS[kind].split(".")[1])(z)
            return block.experts(z, chosen, weights), routed[0]

        held = [module.lam for module in (router, *experts)]
        assert torch.autograd.gradcheck(run, (z, *held))
        for module, value in zip((router, *experts), held, strict=True):
            module._parameters["lam"] = value


def test_methods_with_and_without_data(models: dict[str, nn.Module]) -> None:
    model = models["mixtral"]
    adapters = {
        "a": trained(model, 1, BOTH, ["q_proj", "v_proj"]),
        "b": trained(model, 2, BOTH[:1], ["v_proj"]),
    }
    data = {name: [{**tokens(seed), "attention_mask": torch.ones(3, 9).long()}] for seed, name in enumerate("ab")}
    # Those of the last block are behind all that nsc measures.
    expert = "model.layers.0.mlp.experts.gate_up_proj.2"
    for method in ("nsc", "match", "distill", "adamerging"):
        result = nsc_merge.merge(model, adapters, data, method, steps=2, progress=False)
        row = result.coefficients[expert]
        assert row["a"] != row["b"], method
        assert result.coefficients["model.layers.0.mlp.experts.down_proj.0"]["b"] == 0
    # Experts have no term of RegMean's but their share of a mean over all tasks, also of what one has alone: 0.4 / 2
    # of every update, and half of the mean.
    still = {"steps": 1, "lr": 0.0, "weight_decay": 0.0, "progress": False}
    result = nsc_merge.merge(model, adapters, data, "distill", regmean={"batches": 1, "ridge": 1e-2}, **still)
    for path in (expert, "model.layers.0.mlp.experts.down_proj.0"):
        summed = sum(one.factors[path].delta() for one in result.adapters.values() if path in one.factors)
        torch.testing.assert_close(result.delta(path).double(), (0.2 + 0.5 / 2) * summed, rtol=1e-5, atol=1e-8)
    for method in ("ties", "dare", "svd", "knots_ties", "core_space", "emr", "fr"):
        result = nsc_merge.merge(model, adapters, method=method).for_task("a")
        merged = result.apply(copy.deepcopy(model))
        change = merged.get_parameter(expert[:-2])[2] - model.get_parameter(expert[:-2])[2]
        torch.testing.assert_close(change, result.delta(expert), rtol=0, atol=1e-12)
        assert change.abs().max() > 1e-3
    for method in ("regmean", "fisher"):
        with pytest.raises(ValueError, match=f"method '{method}': .*experts.* is no linear.*'task_arithmetic'"):
            nsc_merge.merge(model, adapters, data, method)


def test_what_does_not_fit_is_refused_by_name(models: dict[str, nn.Module], tmp_path: Path) -> None:
    model, other = models["mixtral"], models["qwen"]
    folder, config = tmp_path / "a", tmp_path / "a" / "adapter_config.json"
    peft = trained(model, 1, BOTH, [])
    peft.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"gate_up_proj: expected lora_A \[8, 16\] and lora_B \[24, 8\] for 4"):
        nsc_merge.merge(other, {"a": folder}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"mlp\.experts has adapted parameters .*LlamaForCausalLM has no such module"):
        llama = tf.LlamaForCausalLM(tf.LlamaConfig(**{key: SIZES[key] for key in list(SIZES)[:-1]}))
        nsc_merge.merge(llama, {"a": folder}, method="task_arithmetic")
    read = nsc_merge.load_adapter(folder, "a")
    with (
        pytest.raises(ValueError, match=r"mlp\.experts\S* has LoRA on parameters.*fitting\.fit makes updates"),
        nsc_merge.attach(model, {"a": read}, 1.0),
    ):
        pass
    stacks = {path: replace(one, A=one.A * float("nan")) for path, one in read.stacks.items()}
    with pytest.raises(ValueError, match=r"experts\S*\.A \(torch\.float64\) holds values that are not finite"):
        nsc_merge.merge(model, {"a": replace(read, stacks=stacks)}, method="task_arithmetic")
    written = json.loads(config.read_text())
    for targets, error in (
        (["mlp.experts.gate_up_proj"], r"tensors for 2 parameters, and target_parameters=.* names \['gate_up_proj'\]"),
        ("mlp.experts.down_proj", "target_parameters: expected names, found"),
    ):
        config.write_text(json.dumps({**written, "target_parameters": targets}))
        with pytest.raises(ValueError, match=error):
            nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"\['default'\] have target_parameters, which is not merged in place"):
        merge_in_place(peft, ["default"], [1.0], "merged", method="task_arithmetic")
    biased = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    result = nsc_merge.merge(model, {"a": peft, "b": biased}, method="task_arithmetic")
    with pytest.raises(ValueError, match=r"format 'lora': .*experts.* no adapter with biases .*use format 'model'"):
        result.save(tmp_path / "lora", "lora")


def test_what_is_said_of_adapters_without_a_model(models: dict[str, nn.Module], tmp_path: Path) -> None:
    peft = trained(models["mixtral"], 1, BOTH, ["q_proj"], rank_pattern={"experts.gate_up_proj": 5})
    peft.save_pretrained(tmp_path)
    fitted = nsc_merge.merge(models["mixtral"], {"a": tmp_path}, method="task_arithmetic").adapters["a"]
    known = describe(fitted)
    assert known["modules"] == {"q_proj": 2, "gate_up_proj": 2 * EXPERTS, "down_proj": 2 * EXPERTS}
    read = nsc_merge.load_adapter(tmp_path, "a")
    for adapter in (read, outline_of(tmp_path, "a")[0]):
        updates = updates_of(adapter)
        # Which of the two is outermost is the model's matter.
        assert sorted(factor.rank for factor in updates.values()) == sorted(one.rank for one in fitted.factors.values())
        assert sum(".experts." in path for path in updates) == 4 * EXPERTS
    said = describe(replace(read, factors=updates_of(read)))
    assert said["modules"] == {"q_proj": 2, "experts": 4 * EXPERTS}
    assert said["norm"] == pytest.approx(known["norm"])
    assert said["parameters"] == known["parameters"]


def test_offloaded_experts_are_merged_without_data_and_refused_with(
    models: dict[str, nn.Module], tmp_path: Path
) -> None:
    model = copy.deepcopy(models["mixtral"])
    adapter = trained(model, 1, BOTH, ["v_proj"])
    wanted = nsc_merge.merge(model, {"a": adapter}, method="task_arithmetic", scale=0.5).apply(copy.deepcopy(model))
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    result = nsc_merge.merge(offloaded, {"a": adapter}, method="task_arithmetic", scale=0.5)
    saved = type(model).from_pretrained(result.save(tmp_path / "model", "model"), dtype=torch.float64)
    for name, value in wanted.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), value, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="expected experts in memory, found them offloaded; load the model without"):
        nsc_merge.merge(offloaded, {"a": adapter}, {"a": [tokens()]}, steps=1)


def shared_experts() -> nn.Module:
    """A dense block, and one of experts that have a shared one beside them."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12}
    others = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = tf.DeepseekV3Config(**others, **sizes, **experts, n_shared_experts=1, first_k_dense_replace=1)
    return tf.DeepseekV3ForCausalLM(config)


def router_that_is_linear() -> nn.Module:
    config = tf.AfmoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=12, num_dense_layers=1)
    return tf.AfmoeForCausalLM(config)


@pytest.mark.parametrize("build", [shared_experts, router_that_is_linear])
def test_linears_with_names_of_experts_are_saved_so_that_peft_loads_them(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    model.set_experts_implementation("eager")
    ends = ("mlp.gate_proj", "mlp.down_proj", "shared_experts.up_proj", "router.gate", "q_a_proj", "q_proj")
    linears = {path: one for path, one in model.named_modules() if isinstance(one, nn.Linear) and path.endswith(ends)}
    adapters = {}
    for rank, task in ((2, "a"), (3, "b")):
        factors = {
            path: nsc_merge.Factor(torch.randn(rank, one.in_features), torch.randn(one.out_features, rank), 0.5)
            for path, one in list(linears.items())[rank - 2 :]
        }
        adapters[task] = nsc_merge.Adapter(task, factors)
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
    wanted = outputs(result.apply(copy.deepcopy(model)), tokens())
    assert (wanted - outputs(model, tokens())).abs().max() > 0.1
    folder = result.save(tmp_path / "lora", "lora")
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).double().eval()
    torch.testing.assert_close(outputs(peft, tokens()), wanted, rtol=0, atol=1e-5)
    again = nsc_merge.merge(model, {"merged": folder}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(outputs(again.apply(copy.deepcopy(model)), tokens()), wanted, rtol=0, atol=1e-5)


def test_a_classifier_with_adapted_experts_is_saved_with_its_head(tmp_path: Path) -> None:
    """Which is checked to have all that is adapted: a matrix of a parameter is no module."""
    torch.manual_seed(0)
    model = tf.MixtralForSequenceClassification(
        tf.MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_labels=3, pad_token_id=0)
    ).eval()
    held = trained(model.double(), 1, BOTH, ["q_proj"], task_type="SEQ_CLS")
    held.set_experts_implementation("eager")
    held.save_pretrained(tmp_path / "a")
    result = nsc_merge.merge(model, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0)
    saved = result.save(tmp_path / "model", "model", head="a")
    again = tf.MixtralForSequenceClassification.from_pretrained(
        saved, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(again(**tokens()).logits, held(**tokens()).logits, rtol=0, atol=1e-6)

"""Adapters as vLLM's rules have them (vllm/config/lora.py and vllm/lora of 0.33), and notes where they are broken."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers as tf
import zoo
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import nsc_merge
from nsc_merge.integrations.serving import check, write_uniform
from nsc_merge.results.beside.serving_notes import serving_notes

# What --max-lora-rank takes.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Parts of the linears that vLLM packs, and those that it keeps.
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def merge(kind, folder, ranks=(3, 4), **config):
    model = zoo.build(kind)
    settings = {"target_modules": zoo.KINDS[kind].targets, "lora_alpha": 6, **config}
    adapters = {
        f"t{seed}": zoo.write_adapter(model, folder / f"t{seed}", seed, r=rank, **settings)
        for seed, rank in enumerate(ranks)
    }
    return nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.7)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llava", "llama-cls"])
def test_an_adapter_is_what_vllm_takes(kind, tmp_path):
    """Its scaling is taken to be lora_alpha / r of the whole file by releases that read no patterns."""
    pattern = {"rank_pattern": {r"layers\.1\.self_attn\.v_proj": 6}} if kind != "llava" else {}
    result = merge(kind, tmp_path, use_rslora=True, **pattern)
    out = result.save(tmp_path / "out", "lora")
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    assert not any(config[key] for key in ("use_dora", "lora_bias", "use_rslora", "use_qalora", "layer_replication"))
    assert config["lora_alpha"] == config["r"] == max(len(tensors[key]) for key in tensors if "lora_A" in key)
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert all(type(rank) is int for rank in config["rank_pattern"].values())
    flag = int(re.search(r"--enable-lora --max-lora-rank (\d+)$", serving_notes(result)[0])[1])
    assert flag in RANKS
    assert RANKS[RANKS.index(flag) - 1] < config["r"] <= flag
    others = [note.partition(" one rank in all modules, ")[0] for note in serving_notes(result)[1:]]
    assert others == ([] if kind == "llava" else ["SGLang, LoRAX and llama.cpp need"])
    for path in result.paths:
        A, B = (tensors.pop(f"base_model.model.{path}.lora_{part}.weight").double() for part in "AB")
        matching = [rank for key, rank in config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", path)]
        assert len(A) == (matching or [config["r"]])[0]
        torch.testing.assert_close(B @ A, result.delta(path), rtol=1e-5, atol=1e-6)
        assert path.rsplit(".", 1)[-1] in LINEARS
        # Its mapper of LLaVA knows this beginning, and puts language_model.model in its place.
        assert path.startswith("model.language_model.layers." if kind == "llava" else "model.layers.")
    assert not tensors


REFUSED = {
    "DoRA": ("llama", {"use_dora": True}, "the adapter is DoRA, which PEFT loads and vLLM does not"),
    "biases": ("llama", {"lora_bias": True}, "the adapter has biases (lora_bias), which PEFT loads and vLLM does not"),
    "head in full": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        "the adapter has modules_to_save (lm_head), which PEFT loads and vLLM does not",
    ),
    "LoRA on a head": (
        "mistral",
        {"target_modules": ["q_proj", "lm_head"]},
        "the adapter has LoRA on lm_head, which vLLM does not load for mistral models",
    ),
    "images": (
        "llava",
        {"target_modules": ["q_proj", "linear_1"]},
        "vLLM leaves out, without a word, the 4 modules outside the language model, such as "
        "model.multi_modal_projector.linear_1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_refuses_or_passes_over_is_said_with_the_way_out(case, tmp_path):
    kind, config, note = REFUSED[case]
    result = merge(kind, tmp_path, **config)
    rank, *notes = serving_notes(result)
    if case == "DoRA":
        assert notes.pop().startswith("transformers' own from_pretrained, load_adapter and pipeline leave")
    # The images' part alone is passed over, and the rest is served.
    assert ("--max-lora-rank" in rank) is (case == "images")
    assert [one.split(": save as a model")[0] for one in notes] == [note]
    assert note in (result.save(tmp_path / "out", "lora") / "README.md").read_text()


@pytest.mark.parametrize(("setting", "word"), [("use_dora", "is DoRA"), ("lora_bias", "has biases")])
def test_what_one_of_the_modules_has_is_said(setting, word, tmp_path):
    model = zoo.build("llama")
    adapters = {
        name: zoo.write_adapter(model, tmp_path / name, 1, r=2, target_modules=[f"{name}_proj"], **given)
        for name, given in (("q", {setting: True}), ("v", {}))
    }
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=1.0)
    assert result.paths[-1].endswith("v_proj")
    assert any(note.startswith(f"the adapter {word}") for note in serving_notes(result))


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_head_with_lora_is_loaded_where_vllm_has_lora_for_it(kind, tmp_path):
    pattern = ["q_proj", "lm_head"] if kind == "llama" else r".*language_model.*\.q_proj|lm_head"
    others = [note.partition(" needs ")[0] for note in serving_notes(merge(kind, tmp_path, target_modules=pattern))[1:]]
    assert others == (["LoRAX"] if kind == "llama" else [])


@pytest.mark.parametrize(
    ("ranks", "rank", "note"),
    [
        ((3, 5), None, "rank 8; vLLM: --enable-lora --max-lora-rank 8"),
        ((4, 5), None, "rank 9; vLLM: --enable-lora --max-lora-rank 16"),
        ((4, 5), 2, "rank 2; vLLM: --enable-lora --max-lora-rank 8"),
        ((4, 5), 20, "rank 9; vLLM: --enable-lora --max-lora-rank 16"),
        ((256, 64), None, "rank 320; vLLM: --enable-lora --max-lora-rank 320"),
        ((256, 257), None, "rank 513, more than vLLM's 512: save with a smaller rank, or as a model"),
        ((256, 257), 512, "rank 512; vLLM: --enable-lora --max-lora-rank 512"),
    ],
)
def test_the_flag_is_the_smallest_that_holds_the_rank(ranks, rank, note, tmp_path):
    found, *others = serving_notes(merge("llama", tmp_path, ranks), rank)
    assert found == f"the adapter has {note}"
    held = int(re.search(r"rank (\d+)", note)[1])
    assert [other.partition(": write it")[0] for other in others] == (
        [] if held in (8, 320, 512) else [f"LoRAX needs a rank of 8, 16, 32, 48, ..., found {held}"]
    )


def test_what_other_servers_need_is_what_their_rules_say(tmp_path):
    """Ranks that differ, ranks that are padded, and what is left once the adapter is written as the note says."""
    uneven = {"rank_pattern": {r"layers\.1\.self_attn\.v_proj": 6}}
    of_text = {"rank_pattern": {r"language_model\.layers\.1\..*v_proj": 6}}
    for name, (kind, ranks, settings, servers) in {
        "uneven": ("llama", (3, 4), uneven, {"sglang": "refused", "lorax": "refused", "llama.cpp": "wrong"}),
        "padded": ("llama", (3, 4), {}, {"lorax": "wrong"}),
        "one": ("llama", (4, 4), {}, {}),
        "images": ("llava", (3, 4), of_text, {"sglang": "refused"}),
    }.items():
        result = merge(kind, tmp_path / name, ranks, **settings)
        out, notes = result.save(tmp_path / name / "out", "lora"), serving_notes(result)[1:]
        base = result.model.config.to_dict()
        for server in ("sglang", "lorax", "llama.cpp") if kind == "llama" else ("sglang",):
            effects = {problem.effect for problem in check(out, server, base=base).problems}
            assert effects == ({servers[server]} if server in servers else set()), (name, server)
            told = [note for note in notes if {"sglang": "SGLang", "lorax": "LoRAX"}.get(server, server) in note]
            assert len(told) == (server in servers), (name, server)
            if told:
                assert write_uniform(out, tmp_path / name / server, server, base=base).problems == ()


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"lora_bias": True}, "the adapter has biases (lora_bias), which PEFT loads and not every server does"),
        ({}, None),
    ],
)
def test_a_model_that_vllm_does_not_serve_with_adapters_gets_no_word_of_it(config, note, tmp_path):
    notes = serving_notes(merge("vit", tmp_path, **config))
    assert notes == ["the adapter has rank 7", *([note] if note else [])]


class Blocks(nn.Module):
    """A module that is none of transformers, without a configuration."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_plain_module_has_an_adapter_as_well(tmp_path):
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(2, 8)
    folder = zoo.write_adapter(model, tmp_path / "a", 1, r=3, target_modules=["0.0", "1.0"])
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=0.5)
    assert serving_notes(result) == ["the adapter has rank 3"]
    out = result.save(tmp_path / "out", "lora")
    with torch.no_grad():
        wanted = result.apply(copy.deepcopy(model))(x)
        torch.testing.assert_close(PeftModel.from_pretrained(model, out)(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(tf, "LagunaConfig"), reason="of later releases of transformers")
def test_what_peft_loses_by_its_name_as_it_loads_an_adapter_is_named(tmp_path):
    """``mlp.shared_expert.``, a pattern for names of checkpoints, is in ``mlp.shared_experts`` as well. LoRA alone is
    written under a name that PEFT finds.
    """
    config = tf.LagunaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, layer_types=["full_attention"], mlp_layer_types=["sparse"],
        num_attention_heads_per_layer=[2],
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LagunaForCausalLM(config).eval()
    path = "model.layers.0.mlp.shared_experts.up_proj"
    folder = zoo.write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj", "shared_experts.up_proj"],
                               use_dora=True)  # fmt: skip
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic", scale=1.0)
    (note,) = [one for one in serving_notes(result) if path in one]
    assert "PEFT gives another name as it loads them" in note
    assert note.endswith("save as a model")
    # It is so, and not so of what is saved as a model.
    saved = result.save(tmp_path / "model", "model")
    weights = tf.LagunaForCausalLM.from_pretrained(saved).get_submodule(path).weight
    before = model.get_submodule(path).weight
    torch.testing.assert_close(weights - before, result.delta(path).float(), rtol=1e-4, atol=1e-6)
    held = PeftModel.from_pretrained(model, result.save(tmp_path / "lora", "lora")).merge_and_unload()
    assert torch.equal(held.get_submodule(path).weight, before)

"""The rules of servers on outlines of adapters; tests/merge/integrations/test_serving.py holds them to exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nsc_merge.results.beside.serving import llama_cpp, lorax, sglang, vllm
from nsc_merge.results.beside.serving.outline import (
    Base,
    Low,
    Outline,
    beyond,
    changed_bases,
    first_of,
    part_of,
    place_of,
    read_base,
    read_outline,
)

LAYER = "model.layers.{}.self_attn.{}"
LLAMA = Base("llama", 2, {}, False, True, False)


def low(rank: int = 8, scaling: float = 1.0, shape: tuple[int, int] = (16, 16)) -> Low:
    return Low(rank, shape, scaling)


def outline(*names: str, base: Base = LLAMA, layers: int = 2, config: Any = None, one: Low | None = None, **more: Any):
    paths = [LAYER.format(number, name) for number in range(layers) for name in names]
    held = dict.fromkeys(paths, one or low())
    return Outline({"r": 8, "lora_alpha": 8, **(config or {})}, {**held, **more.pop("modules", {})}, base=base, **more)


def found(rules: Any, adapter: Outline, **settings: Any) -> list[tuple[str, str]]:
    return [(problem.effect, problem.what) for problem in rules.problems(adapter, **settings)]


@pytest.mark.parametrize(
    ("rank", "flag"), [(1, 8), (8, 8), (9, 16), (64, 64), (257, 320), (321, 512), (512, 512), (513, None)]
)
def test_the_flag_that_holds_a_rank(rank, flag):
    assert vllm.flag_for(rank) == flag
    adapter = outline("q_proj", config={"rank_pattern": {"v_proj": rank}}, one=low(1))
    assert vllm.flags(adapter) == ("" if flag is None else f"--enable-lora --max-lora-rank {flag}")
    assert outline("q_proj", one=low(rank)).ranks == [8, rank, rank]


def test_what_vllm_takes():
    assert found(vllm, outline("q_proj", "v_proj")) == []
    assert found(vllm, outline("q_proj", config={"bias": "all"})) == [("refused", "bias='all'")]
    assert found(vllm, outline("q_proj", config={"bias": "none"})) == []
    heads = ("score.weight", "classifier.bias")
    assert found(vllm, outline("q_proj", whole=heads, config={"modules_to_save": ["score"]})) == []
    assert found(vllm, outline("q_proj", whole=("model.norm.weight", *heads))) == [
        ("refused", "model.norm.weight is no tensor of LoRA")
    ]
    assert found(vllm, outline("q_proj", whole=("alone",))) == [("refused", "alone is no tensor of LoRA")]
    more = {"modules_to_save": ["norm"], "use_dora": True, "lora_bias": True}
    assert found(vllm, outline("q_proj", whole=("model.norm.weight",), config=more)) == [
        ("refused", "the adapter is DoRA"),
        ("refused", "the adapter has modules_to_save (norm)"),
        ("refused", "the adapter has biases (lora_bias)"),
    ]
    unequal = outline("q_proj", modules={LAYER.format(0, "v_proj"): low(40)})
    assert found(vllm, unequal, max_rank=40) == []
    (problem,) = vllm.problems(unequal, max_rank=16)
    assert str(problem) == (
        "refused: rank 40 is more than 16: save with a rank of at most 16, or --max-lora-rank 64"
    )
    assert found(vllm, outline("q_proj", parameters=True)) == [("unsure", "LoRA on parameters (target_parameters)")]
    assert found(vllm, outline("q_proj", layers=3)) == [
        ("left out", "model.layers.2.self_attn.q_proj: the base has 2 layers")
    ]
    assert found(vllm, outline("q_proj", layers=3, base=Base("llama"))) == []
    parts = vllm.parts_refused(dora=True, whole=["a", "b"], biased=True)
    assert list(parts) == ["is DoRA", "has modules_to_save (a, b)", "has biases (lora_bias)"]
    assert vllm.parts_refused(dora=False, whole=[], biased=False) == {}


@pytest.mark.parametrize(
    ("kind", "refused", "unsure"),
    [
        ("llama", [], []),
        ("cohere", ["lm_head"], []),
        ("qwen2", ["model.embed_tokens", "lm_head"], []),
        ("mamba", ["model.embed_tokens", "lm_head", "q_proj"], []),
        ("of_tomorrow", [], ["model.embed_tokens", "lm_head"]),
    ],
)
def test_embeddings_and_heads_by_the_type_of_the_model(kind, refused, unsure):
    paths = ["model.embed_tokens", "lm_head", "q_proj"]
    assert vllm.refused_of(kind, paths) == refused
    assert vllm.unsure_of(kind, paths) == unsure


def test_models_with_images_are_served_in_their_language_model():
    names = ["model.language_model.layers.0.q_proj", "lm_head", "model.vision_tower.layers.0.q_proj", "projector"]
    assert vllm.left_out(names) == names[2:]
    shows = Base("llama", 2, {"q_proj": (16, 16)}, True)
    towers = {"vision_tower.layers.5.q_proj": low()}
    inside = {"language_model.layers.0.q_proj": low(), "language_model.layers.0.v_proj": low()}
    what = "vision_tower.layers.5.q_proj"
    adapter = Outline({"r": 8, "lora_alpha": 8}, {**inside, **towers}, base=shows)
    assert found(vllm, adapter) == [("left out", f"{what}, outside the language model")]
    taken = f"{what} is taken for the language model's layer of the same number"
    lonely = ("refused", f"{what}, without LoRA on the v_proj beside it")
    more = ("refused", f"{what}: the base has 2 layers")
    assert found(sglang, adapter) == [lonely, ("wrong", taken), more]
    smaller = Outline(adapter.config, {**inside, what: low(shape=(16, 8))}, base=shows)
    assert found(sglang, smaller) == [lonely, ("refused", taken), more]
    # One that does not fit is enough.
    two = {"vision_tower.layers.0.v_proj": low(), "vision_tower.layers.0.q_proj": low(shape=(16, 8))}
    fits = Base("llama", 2, {"q_proj": (16, 16), "v_proj": (16, 16)}, True)
    ((effect, said),) = found(sglang, Outline(adapter.config, {**inside, **two}, base=fits))
    assert (effect, said.partition(" is taken")[0]) == ("refused", "2 modules, such as vision_tower.layers.0.v_proj")
    assert found(sglang, Outline(adapter.config, inside, base=shows)) == []
    assert found(llama_cpp, adapter) == [("unsure", "the names of llama models with images are not followed here")]


@pytest.mark.parametrize(
    ("names", "lonely"),
    [
        (("q_proj", "v_proj"), None),
        (("q_proj", "k_proj", "v_proj"), None),
        (("q_proj",), "q_proj, without LoRA on the v_proj beside it"),
        (("v_proj",), "v_proj, without LoRA on the q_proj beside it"),
        (("k_proj", "v_proj"), "k_proj, without LoRA on the q_proj beside it"),
        (("k_proj", "q_proj"), "k_proj, without LoRA on the v_proj beside it"),
        (("gate_proj", "up_proj"), None),
        (("gate_proj",), None),
        (("up_proj",), "up_proj, without LoRA on the gate_proj beside it"),
        (("o_proj", "down_proj"), None),
    ],
)
def test_sglang_wants_lora_on_others_of_a_stack(names, lonely):
    problems = found(sglang, outline(*names, layers=1))
    assert [effect for effect, _ in problems] == ([] if lonely is None else ["refused"])
    assert all(what.endswith(f"model.layers.0.self_attn.{lonely}") for _, what in problems)


def test_what_sglang_takes():
    both = ("q_proj", "v_proj")
    assert sglang.flags(outline(*both)) == "--enable-lora --max-lora-rank 8 --lora-target-modules q_proj v_proj"
    for targets, taken in (("all-linear", True), ("all", True), (["q_proj"], True), (".*q_proj", False)):
        assert (found(sglang, outline(*both, config={"target_modules": targets})) == []) is taken
    assert found(sglang, outline(*both), max_rank=8) == []
    assert found(sglang, outline(*both), max_rank=7) == [("refused", "rank 8 is more than 7")]
    first = "4 modules, such as model.layers.0.self_attn.q_proj"
    assert found(sglang, outline(*both, one=low(4))) == [("refused", f"{first} of another rank than r=8")]
    assert found(sglang, outline(*both, one=low(8, 2.0))) == [("wrong", f"{first} is scaled by 1, and by PEFT by 2")]
    # Without a word in the configuration both are 1.
    plain = Outline({}, dict.fromkeys([LAYER.format(0, name) for name in both], low(1)))
    assert found(sglang, plain) == []
    assert found(sglang, outline(*both, "conv")) == [
        ("unsure", "2 modules, such as model.layers.0.self_attn.conv, for which --lora-target-modules has no name")
    ]
    assert found(sglang, outline(*both, config={"use_dora": True})) == [("refused", "the adapter is DoRA")]
    assert found(sglang, outline(*both, embeddings={"model.embed_tokens": low()})) == []
    assert found(sglang, outline(*both, modules={"lm_head": low(), "score": low()})) == [
        ("left out", "score, outside of all layers")
    ]
    assert found(sglang, outline(*both, biased=True, parameters=True, whole=("a.weight",))) == [
        ("left out", "a.weight, trained in full (modules_to_save)"),
        ("left out", "biases (lora_bias)"),
        ("unsure", "LoRA on parameters (target_parameters)"),
    ]


@pytest.mark.parametrize(
    ("rank", "shards", "padded"),
    [(1, 1, 8), (8, 1, 8), (9, 1, 16), (16, 1, 16), (17, 1, 32), (8, 2, 16), (16, 2, 16), (17, 2, 32), (33, 4, 48)],
)
def test_ranks_that_lorax_pads(rank, shards, padded):
    assert lorax.padded(rank, shards) == padded


def test_what_lorax_takes():
    def rules(name: str) -> str:
        return f"self_attn.{name}"

    assert found(lorax, outline("q_proj", "v_proj")) == []
    assert found(lorax, outline("q_proj", config={"use_rslora": True}, one=low(8, 8 / 8**0.5)))[0][0] == "unsure"
    gone = outline("q_proj", layers=1)
    assert found(lorax, gone) == [
        ("left out", f"{rules('q_proj')} of all 2 layers, as only 1 of them have LoRA there")
    ]
    assert found(lorax, outline("q_proj", modules={LAYER.format(1, "v_proj"): low()})) == [
        ("left out", f"{rules('v_proj')} of all 2 layers, as only 1 of them have LoRA there")
    ]
    assert found(lorax, outline("q_proj", modules={"score": low()})) == [
        ("left out", "score, not among the linears that it knows")
    ]
    unequal = {LAYER.format(0, "v_proj"): low(8), LAYER.format(1, "v_proj"): low(32)}
    assert found(lorax, outline("q_proj", modules=unequal)) == [
        ("refused", f"{rules('v_proj')} has ranks that are padded to [8, 32]")
    ]
    # Ranks that are padded alike.
    alike = {LAYER.format(0, "v_proj"): low(20), LAYER.format(1, "v_proj"): low(32)}
    ((effect, what),) = found(lorax, outline("q_proj", modules=alike))
    assert (effect, what) == ("wrong", f"{rules('q_proj')} is scaled by 0.25 when it is loaded again, and by PEFT by 1")


@pytest.mark.parametrize(
    ("kind", "effect"),
    [
        *((kind, None) for kind in ("llama", "mistral", "qwen2", "gemma", "gemma2", "granite", "cohere", "solar", "")),
        *((kind, "unsure") for kind in ("bloom", "dbrx", "gpt2", "gpt_neox", "mixtral", "mllama", "phi", "phi3")),
        *((kind, "unsure") for kind in ("phi-msft", "qwen")),
        ("vit", "refused"),
        ("qwen3", "refused"),
    ],
)
def test_models_that_lorax_serves(kind, effect):
    told = {"unsure": f"the names of {kind} models are not followed here",
            "refused": f"LoRAX serves no adapters for {kind} models as it is saved here"}  # fmt: skip
    both = outline("q_proj", base=Base(kind, 2))
    assert found(lorax, both) == ([] if effect is None else [(effect, told[effect])])
    shows = outline("q_proj", base=Base(kind, 2, {}, True))
    assert found(lorax, shows) == [("refused", f"LoRAX serves no adapters for {kind} models as it is saved here")]


def test_where_lorax_finds_linears():
    headed = outline("q_proj", modules={"lm_head": low()})
    assert found(lorax, headed) == []
    assert lorax.kinds(headed) == {
        "self_attn.q_proj": {0: LAYER.format(0, "q_proj"), 1: LAYER.format(1, "q_proj")},
        "lm_head": {0: "lm_head"},
    }
    gemma = outline("q_proj", modules={"lm_head": low()}, base=Base("gemma", 2))
    assert found(lorax, gemma) == [("left out", "lm_head, not among the linears that it knows")]
    elsewhere = {f"model.decoder.layers.{number}.self_attn.v_proj": low() for number in range(2)}
    assert found(lorax, outline("q_proj", modules=elsewhere))[0][1].endswith("not among the linears that it knows")
    assert found(lorax, outline("q_proj", parameters=True, biased=True, whole=("a.weight",))) == [
        ("left out", "biases (lora_bias)"),
        ("left out", "a.weight, trained in full (modules_to_save)"),
        ("left out", "LoRA on parameters (target_parameters)"),
    ]


def test_what_llama_cpp_takes():
    assert found(llama_cpp, outline("q_proj")) == []
    assert found(llama_cpp, outline("q_proj", one=low(4, 2.0))) == []
    assert found(llama_cpp, outline("q_proj", one=low(4, 1.0), layers=1)) == [
        ("wrong", "model.layers.0.self_attn.q_proj is scaled by 2, and by PEFT by 1")
    ]
    names = ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.q_norm.weight")
    assert found(llama_cpp, outline("q_proj", whole=names)) == [
        ("refused", "model.layers.0.q_norm.weight, trained in full (modules_to_save)"),
        ("left out", "2 modules, such as model.norm.weight, trained in full (modules_to_save)"),
    ]
    assert found(llama_cpp, outline("q_proj", gained=True, biased=True, parameters=True)) == [
        ("refused", "the adapter is DoRA"),
        ("refused", "biases (lora_bias)"),
        ("unsure", "LoRA on parameters (target_parameters)"),
    ]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({}, ""),
        ({"init_lora_weights": True}, ""),
        ({"init_lora_weights": "Gaussian"}, ""),
        ({"init_lora_weights": "lora_ga"}, ""),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"use_qalora": False, "layer_replication": [[0, 4]]}, "layer_replication=[[0, 4]]"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1]"),
        ({"use_bdlora": True}, "use_bdlora=True"),
    ],
)
def test_settings_under_which_an_adapter_is_another(setting, said):
    adapter = outline("q_proj", "v_proj", config=setting)
    assert changed_bases(adapter) == said
    assert found(vllm, adapter) == ([("refused", said)] if said else [])
    for rules in (sglang, lorax, llama_cpp):
        assert found(rules, adapter) == ([("wrong", f"{said} is not read")] if said else [])


def test_places_in_names():
    assert place_of("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert place_of("layers.12.mlp") == (12, "mlp")
    assert place_of("encoder.mylayers.3.mlp") is place_of("lm_head") is place_of("model.layers.3") is None
    assert (part_of("a.b.c"), part_of("a")) == ("c", "a")
    assert (first_of(["a"]), first_of(iter("ab"))) == ("a", "2 modules, such as a")
    assert beyond(outline("q_proj", layers=4)) == [LAYER.format(number, "q_proj") for number in (2, 3)]
    assert beyond(outline("q_proj", layers=4, base=Base())) == []
    assert outline("q_proj", layers=4, base=Base()).layers == 4
    assert Outline({}, {"lm_head": low()}).layers == 0
    assert outline("q_proj", layers=4).layers == 2


SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (SIZES, {"q_proj": (16, 16), "k_proj": (16, 16), "v_proj": (16, 16), "o_proj": (16, 16)}),
        (
            {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
            {"q_proj": (32, 16), "k_proj": (16, 16), "v_proj": (16, 16), "o_proj": (16, 32), "gate_proj": (40, 16),
             "up_proj": (40, 16), "down_proj": (16, 40)},
        ),
        ({**SIZES, "hidden_size": None}, {}),
        ({**SIZES, "num_attention_heads": [4, 4, 2]}, {}),
    ],
)  # fmt: skip
def test_what_a_configuration_says_of_a_base(config, shapes):
    base = read_base(None, config)
    assert base == Base("llama", 3, shapes, False, True, None)
    within = read_base(None, {"text_config": config, "architectures": ["LlavaForConditionalGeneration"]})
    assert within == Base("llama", 3, shapes, True, True, None)
    # LLaVA's first configurations do not say of what type its language model is.
    unsaid = {name: value for name, value in config.items() if name != "model_type"}
    assert read_base(None, {"text_config": unsaid}).kind == "llama"
    assert read_base(None, unsaid).kind == ""
    assert read_base(None, {"text_config": {**config, "model_type": "qwen2"}, "model_type": "llava"}).kind == "qwen2"
    assert read_base(None, {"llm_config": config}).shows


def test_more_that_a_configuration_says():
    assert read_base(None, {**SIZES, "architectures": ["LlamaForSequenceClassification"]}).writes
    assert not read_base(None, {**SIZES, "architectures": ["ViTForImageClassification"]}).writes
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification"):
        assert read_base(None, {**SIZES, "architectures": ["ViTModel", f"Any{ending}"]}).writes
    assert read_base(None, {**SIZES, "architectures": []}).writes
    assert read_base(None, {**SIZES, "num_hidden_layers": "many"}).layers == 0
    tied = {**SIZES, "tie_word_embeddings": True}
    assert read_base(None, tied).tied is True
    assert read_base(None, {"text_config": tied}).tied is True
    assert read_base(None, {"text_config": tied, "tie_word_embeddings": False}).tied is False


def test_a_base_is_read_from_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="base: expected the folder of a model, with config.json; found none"):
        read_base(None, tmp_path)
    assert read_base(str(tmp_path)) == read_base(None) == Base()
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    assert read_base(str(tmp_path)) == read_base("elsewhere", tmp_path) == read_base(None, SIZES)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, found \[\]"):
        read_base(str(tmp_path))


def test_an_adapter_is_read_without_its_numbers(tmp_path):
    def read(tensors: dict[str, tuple[int, ...]], **config: Any) -> Outline:
        folder = tmp_path / "one"
        folder.mkdir(exist_ok=True)
        held = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in tensors.items()}
        save_file(held, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        return read_outline(Path(folder))

    factors: dict[str, tuple[int, ...]] = {"a.q.lora_A.weight": (2, 5), "a.q.lora_B.weight": (7, 2)}
    one = read(factors)
    assert one.modules == {"a.q": Low(2, (7, 5), 3.0)}
    assert (one.embeddings, one.whole, one.biased, one.gained, one.parameters) == ({}, (), False, False, False)
    embedded = {"wte.lora_embedding_A": (2, 50), "wte.lora_embedding_B": (8, 2)}
    more = {"a.q.lora_B.bias": (7,), "a.q.lora_magnitude_vector": (7,), "head.weight": (3, 7), "a.q.base_layer.w": (1,)}
    one = read({**factors, **embedded, **more})
    assert one.embeddings == {"wte": Low(2, (50, 8), 3.0)}
    assert (one.whole, one.biased, one.gained) == (("head.weight",), True, True)
    assert set(one.low) == {"a.q", "wte"}
    one = read(factors, target_parameters=["a.q"])
    assert (one.modules, one.parameters) == ({}, True)
    with pytest.raises(ValueError, match=r"a\.q has one factor; expected lora_A and lora_B"):
        read({"a.q.lora_A.weight": (2, 5)})
    with pytest.raises(ValueError, match=r"a\.q has factors of .*; expected rank 2, by its configuration"):
        read({"a.q.lora_A.weight": (3, 5), "a.q.lora_B.weight": (7, 3)})
    with pytest.raises(ValueError, match=r"a\.q has factors of .*; expected rank 2, by its configuration"):
        read({"a.q.lora_A.weight": (2, 5), "a.q.lora_B.weight": (7, 3)})

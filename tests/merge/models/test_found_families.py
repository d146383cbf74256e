"""What is found of a model that no family lists, against what its authors call it; and the option that overrules it."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
from architectures import ARCHITECTURES, write_adapter
from torch import nn
from transformers import AlbertConfig, AlbertForTokenClassification

import nsc_merge
from nsc_merge.models.families import family_of, find_family, scored_paths
from nsc_merge.results.result import MergeResult

TEXT, DECODED = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
NO_TEXT = (None, None)
DECODER = r"^(?:model\.layers)\.(\d+)\."
LANGUAGE = r"^(?:model\.language_model\.layers)\.(\d+)\."
VALUE = "model.layers.1.self_attn.v_proj"
SEEN = "model.language_model.layers.1.self_attn.v_proj"

# Architecture -> blocks, what is measured, tokens and mask, whether it is causal, and its recipe.
FOUND = {
    "Gemma": (DECODER, VALUE, TEXT, True, "llm"),
    "Gemma 2": (DECODER, VALUE, TEXT, True, "llm"),
    "Gemma 3": (DECODER, VALUE, TEXT, True, "llm"),
    "Phi-3/4": (DECODER, "model.layers.1.self_attn.qkv_proj", TEXT, True, "llm"),
    "Phi": (DECODER, VALUE, TEXT, True, "llm"),
    "OPT": (
        r"^(?:model\.decoder\.layers)\.(\d+)\.",
        "model.decoder.layers.1.self_attn.v_proj",
        TEXT,
        True,
        "llm",
    ),
    "GPT-NeoX": (
        r"^(?:gpt_neox\.layers)\.(\d+)\.",
        "gpt_neox.layers.1.attention.query_key_value",
        TEXT,
        True,
        "llm",
    ),
    "GPT-2": (r"^(?:transformer\.h)\.(\d+)\.", "transformer.h.1.attn.c_attn", TEXT, True, "llm"),
    "Falcon": (
        r"^(?:transformer\.h)\.(\d+)\.",
        "transformer.h.1.self_attention.query_key_value",
        TEXT,
        True,
        "llm",
    ),
    "StableLM": (DECODER, VALUE, TEXT, True, "llm"),
    "Granite": (DECODER, VALUE, TEXT, True, "llm"),
    "OLMo 2": (DECODER, VALUE, TEXT, True, "llm"),
    "Mixtral": (DECODER, VALUE, TEXT, True, "llm"),
    "Qwen3-MoE": (DECODER, VALUE, TEXT, True, "llm"),
    "BERT": (r"^(?:bert\.encoder\.layer)\.(\d+)\.", "bert.encoder.layer.1.attention.self.value", TEXT, False, "llm"),
    "RoBERTa": (
        r"^(?:roberta\.encoder\.layer)\.(\d+)\.",
        "roberta.encoder.layer.1.attention.self.value",
        TEXT,
        False,
        "llm",
    ),
    "ModernBERT": (DECODER, "model.layers.1.attn.Wqkv", TEXT, False, "llm"),
    "T5": (r"^(?:decoder\.block)\.(\d+)\.", "decoder.block.1.layer.0.SelfAttention.v", DECODED, True, "llm"),
    "BART": (
        r"^(?:model\.decoder\.layers)\.(\d+)\.",
        "model.decoder.layers.1.self_attn.v_proj",
        DECODED,
        True,
        "llm",
    ),
    "Whisper": (
        r"^(?:model\.decoder\.layers)\.(\d+)\.",
        "model.decoder.layers.1.self_attn.v_proj",
        DECODED,
        True,
        "llm",
    ),
    # Its stages rather than the blocks within: nothing adapted comes after the last.
    "Swin": (
        r"^(?:swin\.encoder\.layers)\.(\d+)\.",
        r"swin\.encoder\.layers\.1\.blocks\.\d\.attention.*\.(value|v_proj)",
        NO_TEXT,
        False,
        "vision",
    ),
    "BEiT": (r"^(?:beit\.layers)\.(\d+)\.", "beit.layers.1.attention.v_proj", NO_TEXT, False, "vision"),
    "DINOv3": (r"^(?:model\.layer)\.(\d+)\.", "model.layer.1.attention.v_proj", NO_TEXT, False, "vision"),
    "LLaVA-NeXT": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "LLaVA-OneVision": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "Qwen2-VL": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "Qwen2.5-VL": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "Qwen3-VL": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "PaliGemma": (LANGUAGE, SEEN, TEXT, True, "vlm"),
    "Idefics3": (
        r"^(?:model\.text_model\.layers)\.(\d+)\.",
        "model.text_model.layers.1.self_attn.v_proj",
        TEXT,
        True,
        "vlm",
    ),
}


def linears(model: nn.Module) -> list[str]:
    return [path for path, one in model.named_modules() if hasattr(one, "in_features") or hasattr(one, "nf")]


@pytest.mark.parametrize("name", [name for name in FOUND if name in ARCHITECTURES])
def test_blocks_measured_module_and_inputs_are_found(name):
    block, measured, inputs, causal, recipe = FOUND[name]
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    family = family_of(model, linears(model))
    assert family.block == block
    assert (family.tokens, family.mask, family.causal, family.recipe) == (*inputs, causal, recipe)
    scored = scored_paths(family, model, linears(model), None, "last_quarter")
    assert scored
    for path in scored:
        assert re.fullmatch(measured, path)
    assert bool(family.images) == (recipe == "vlm") == (family.frozen_prefix is not None)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
@pytest.mark.parametrize("deeper", [0, 4])
def test_both_towers_are_measured_each_by_its_own_depth(name, deeper):
    one = ARCHITECTURES[name]
    vision = {**one.config["vision_config"], "num_hidden_layers": 2 + deeper}
    with torch.device("meta"):
        model = one._replace(config={**one.config, "vision_config": vision}).build()
    family = family_of(model, linears(model))
    scored = scored_paths(family, model, linears(model), None, "last_quarter")
    places = ["text_model.encoder.layers.1", *(f"vision_model.encoder.layers.{4 + one}" for one in range(2))]
    places = places if deeper else ["text_model.encoder.layers.1", "vision_model.encoder.layers.1"]
    assert scored == [f"{place}.self_attn.v_proj" for place in places]
    # Of the shallower one all are taken where more are asked for.
    assert len(scored_paths(family, model, linears(model), None, 2 + deeper)) == 4 + deeper
    assert len(scored_paths(family, model, linears(model), None, [1])) == 2
    assert (family.tokens, family.mask, family.unmasked) == (None, "attention_mask", "vision_model")


def test_an_adapted_encoder_alone_is_measured_by_its_own_mask():
    with torch.device("meta"):
        model = ARCHITECTURES["T5"].build()
    family = family_of(model, [path for path in linears(model) if path.startswith("encoder.")])
    assert family.block == r"^(?:encoder\.block)\.(\d+)\."
    assert (family.tokens, family.mask) == TEXT
    assert not family.causal


def test_other_linears_are_measured_where_no_values_are_adapted():
    with torch.device("meta"):
        model = ARCHITECTURES["Gemma"].build()
    paths = [path for path in linears(model) if path.endswith(("o_proj", "gate_proj"))]
    assert family_of(model, paths).score_modules == ("self_attn.o_proj", "mlp.gate_proj")
    paths = [path for path in linears(model) if path.endswith(("gate_proj", "down_proj"))]
    assert family_of(model, paths).score_modules == ("mlp.down_proj", "mlp.gate_proj")


def test_a_model_without_blocks_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(2, 2))
    assert find_family(model) is None
    with pytest.raises(ValueError, match=r"no nn.ModuleList or nn.Sequential of blocks of .* family=\{'block'"):
        family_of(model)
    given = family_of(model, ["0"], {"block": r"^(\d+)\.", "score_modules": ["0"]})
    assert (given.block, given.score_modules, given.tokens) == (r"^(\d+)\.", ("0",), None)


class Block(nn.Module):
    """As timm has it, with queries, keys and values packed."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return x + self.proj(torch.tanh(self.qkv(x)))


class Patches(nn.Module):
    """A model that is not of transformers, and calls its blocks one after another."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
        self.blocks, self.head = blocks, nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(("name", "block"), [("", r"^(?:blocks)\.(\d+)\."), ("layer_", r"^(?:blocks)\.layer_(\d+)\.")])
def test_blocks_in_a_sequence_are_found_as_those_of_a_list_are(name, block):
    torch.manual_seed(0)
    blocks = {f"{name}{number}": Block() for number in range(4)}
    sequence, listed = Patches(nn.Sequential(OrderedDict(blocks))), Patches(nn.ModuleList(blocks.values()))
    listed.load_state_dict({key.replace(name, ""): value for key, value in sequence.state_dict().items()})
    batches = [{"x": torch.randn(3, 5, 6)} for _ in range(2)]
    found = []
    for model, called in ((sequence, name), (listed, "")):
        torch.manual_seed(1)
        adapters = {
            task: nsc_merge.Adapter(
                task,
                {
                    f"blocks.{called}{number}.{part}": nsc_merge.Factor(
                        0.3 * torch.randn(2, d_in), torch.randn(d_out, 2), 1.0
                    )
                    for number in range(4)
                    for part, d_in, d_out in (("qkv", 8, 24), ("proj", 24, 8))
                },
            )
            for task in ("a", "b")
        }
        given = dict.fromkeys(adapters, batches)
        result = nsc_merge.merge(model, adapters, given, steps=2, progress=False)
        matched = nsc_merge.merge(model, adapters, given, "match", steps=2, progress=False)
        found.append((list(result.coefficients.values()), list(matched.coefficients.values())))
    assert found[0] == found[1]
    family = family_of(sequence, linears(sequence)[2:-1])
    assert (family.block, family.tokens, family.causal, family.recipe) == (block, None, False, "vision")
    assert scored_paths(family, sequence, linears(sequence)[2:], None, "last_quarter") == [f"blocks.{name}3.qkv"]


def test_a_list_of_blocks_goes_before_a_longer_sequence():
    model = Patches(nn.ModuleList([Block(), Block()]))
    model.stem = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in range(3)))
    assert family_of(model, linears(model)).block == r"^(?:blocks)\.(\d+)\."
    with pytest.raises(ValueError, match=r"group of block to be a number, found 'blocks' in 'blocks' by"):
        scored_paths(family_of(model, given={"block": r"^(blocks)"}), model, linears(model), None, "last_quarter")
    # Two are enough, and one is not.
    model.blocks = nn.Sequential(Block(), Block())
    assert family_of(model, [f"blocks.{number}.qkv" for number in range(2)]).block == r"^(?:blocks)\.(\d+)\."
    assert find_family(Patches(nn.Sequential(Block()))) is None
    # Parts with names of their own are no blocks.
    model.blocks = nn.Sequential(OrderedDict(first=Block(), second=Block()))
    model.stem = nn.Sequential(OrderedDict(layer1=nn.Linear(6, 6), norm=nn.Linear(6, 6)))
    assert find_family(model) is None


def test_of_a_model_with_one_block_tokens_are_told_from_padding():
    """ALBERT, which runs it several times: no list of blocks is longer."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = AlbertForTokenClassification(AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=96)).eval()
    family = find_family(model)
    assert (family.block, family.mask) == (r"^(?:albert\.encoder\.albert_layer_groups)\.(\d+)\.", "attention_mask")
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value"
    adapters = {
        task: nsc_merge.Adapter(task, {path: nsc_merge.Factor(torch.randn(2, 32), torch.randn(32, 2), 1.0)})
        for task in ("a", "b")
    }
    ids = torch.randint(3, 96, (2, 6))
    longer = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    shorter = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for method in ("match", "distill", "adamerging"):
        found, wanted = (
            nsc_merge.merge(model, adapters, {task: [batch] for task in adapters}, method, steps=1, progress=False)
            for batch in (longer, shorter)
        )
        assert found.objective["before"] == pytest.approx(wanted.objective["before"], rel=1e-4), method
    with pytest.raises(RuntimeError, match=r"depends on no coeff.*several times, as ALBERT's, .*: score_modules"):
        nsc_merge.merge(model, adapters, {task: [shorter] for task in adapters}, steps=1, progress=False)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    one = ARCHITECTURES["Gemma"]
    model = one.build()
    folder = tmp_path_factory.mktemp("gemma")
    adapters = {
        task: write_adapter(model, folder / task, number, r=2, lora_alpha=4, target_modules=one.targets)
        for number, task in enumerate(("a", "b"))
    }
    return model, adapters, {task: [one.inputs()] for task in adapters}


def run(gemma, method: str = "nsc", **options) -> MergeResult:
    return nsc_merge.merge(*gemma, method=method, steps=2, progress=False, **options)


def test_a_family_given_by_its_fields_or_whole_overrules_what_is_found(gemma, tmp_path):
    assert run(gemma).options["scored"] == [VALUE]
    some = run(gemma, family={"score_modules": ["self_attn.k_proj"]})
    assert some.options["scored"] == ["model.layers.1.self_attn.k_proj"]
    whole = nsc_merge.Family(
        name="own",
        model_types=(),
        block=r"^model\.layers\.(\d+)\.",
        score_modules=("k_proj",),
        recipe="llm",
        tokens="input_ids",
        mask="attention_mask",
    )
    result = run(gemma, family=whole)
    assert result.coefficients == some.coefficients
    assert result.options["family"]["score_modules"] == ["k_proj"]
    assert "score_modules:" in (result.save(tmp_path / "out") / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["match", "distill"])
def test_matching_takes_its_positions_from_the_family(gemma, method):
    last = run(gemma, method)
    same = run(gemma, method, family={"causal": True})
    every = run(gemma, method, family={"causal": False})
    assert same.coefficients == last.coefficients
    assert every.history[0]["loss"] != last.history[0]["loss"]
    assert every.history[0]["loss"] == run(gemma, method, positions="all").history[0]["loss"]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"blocks": "x"}, "family: 'blocks' is no field of a Family; expected some of"),
        ({"block": "layers"}, "family: expected block to be a regular expression with one group"),
        ("decoder", "family: expected a Family or a mapping of its fields, found 'decoder'"),
    ],
)
@pytest.mark.parametrize("method", ["nsc", "match", "distill"])
def test_no_family_is_refused_by_name(gemma, method, family, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(gemma, method, family=family)


@pytest.mark.parametrize("name", ["Phi-3/4", "BERT", "T5", "Whisper", "CLIP", "Qwen2-VL", "Idefics3", "DINOv3"])
def test_the_ratio_falls_and_coefficients_move(name, tmp_path):
    one = ARCHITECTURES[name]
    model = one.build()
    adapters = {
        task: write_adapter(model, tmp_path / task, number, r=2, lora_alpha=4, target_modules=one.targets)
        for number, task in enumerate(("a", "b"))
    }
    calibration = {task: [one.inputs()] for task in adapters}
    result = nsc_merge.merge(model, adapters, calibration, steps=4, lr=1e-3, progress=False)
    moved = [value != 0.4 for row in result.coefficients.values() for value in row.values()]
    assert sum(moved) >= len(moved) // 3
    objective = [entry["objective"] for entry in result.history]
    assert objective[-1] < objective[0]

"""What configurations mean: patterns by PEFT's rule in bounded time, and values that are none."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from unittest.mock import MagicMock

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from zoo import build, write_adapter

from nsc_merge import load_adapter
from nsc_merge.adapters import module_patterns, peft_config
from nsc_merge.adapters.module_patterns import ModulePatterns
from nsc_merge.adapters.peft_config import unknown_settings

PATHS = [
    *(f"model.layers.{block}.{name}" for block in (0, 1, 11) for name in ("attn.q_proj", "mlp.up_proj", "o")),
    *("lm_head", "layersX1.attn.q_proj", "a", "a.b", "aXb", "x.aa.ab", "aab.b.b", "b.a1"),
]
NAMES = [
    *("q_proj", "layers.1", "layers.1.attn.q_proj", r"layers\.1\.attn\.q_proj"),
    *("^model", "^model.layers.1.o", "^o", "a.b"),
]
ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "layers", "q_proj", "{", "]", "^", "$", "1", r"\Z"]
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,1}", "{0,}", "*?", "+?", "??", "{1,2}?"]


def drawn(rng, depth=0):
    """A regular expression."""
    kind = rng.random()
    if depth > 3 or kind < 0.35:
        return rng.choice(ATOMS)
    if kind < 0.6:
        return drawn(rng, depth + 1) + drawn(rng, depth + 1)
    if kind < 0.75:
        return f"{drawn(rng, depth + 1)}|{drawn(rng, depth + 1)}"
    return f"({rng.choice(['', '?:'])}{drawn(rng, depth + 1)}){rng.choice(REPEATS) if kind < 0.9 else ''}"


def valid(pattern):
    try:
        return re.compile(rf"(.*\.)?({pattern})$") is not None
    except re.error:
        return False


def test_patterns_are_matched_as_peft_does():
    rng = random.Random(0)
    matched = 0
    for _ in range(400):
        count = rng.randint(1, 4)
        drawn_now = [drawn(rng) if rng.random() < 0.6 else rng.choice(NAMES) for _ in range(count)]
        patterns = {pattern: number for number, pattern in enumerate(drawn_now) if valid(pattern)}
        found = ModulePatterns(patterns)
        # Short paths: PEFT's own matching takes ever longer on some of these patterns.
        for path in rng.sample(PATHS, 4):
            wanted = patterns.get(get_pattern_key(patterns, path[-16:]), "none")
            assert found.value(path[-16:], "none") == wanted, (patterns, path)
            matched += wanted != "none"
    assert matched > 150


def test_the_path_itself_is_the_last_resort():
    patterns = {"conv[0]": 3, "up?": 1}
    assert get_pattern_key(patterns, "conv[0]") == "conv[0]"
    assert ModulePatterns(patterns).value("conv[0]", 8) == 3


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*b", "a?" * 30 + "a" * 30, "(.*)(.*)(.*)(.*)(.*)(.*)z"])
def test_patterns_that_backtrack_without_end_are_read(pattern):
    started = time.process_time()
    found = ModulePatterns({pattern: 1})
    paths = [f"model.{'a' * length}" for length in range(30, 60)]
    # The last of these patterns ends in what no path has; the fourth takes 30 to 60 letters; the first all of them.
    wanted = [1 if pattern.endswith("$") or pattern.startswith("a?") else 8] * len(paths)
    assert [found.value(path, 8) for path in paths] == wanted
    assert time.process_time() - started < 5


def test_many_names_and_many_modules_are_read_fast():
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    patterns = {f"layers.{block}.self_attn.q_proj": block for block in range(500)}
    started = time.process_time()
    found = ModulePatterns(patterns)
    for block in range(500):
        values = [found.value(f"model.layers.{block}.{name}", -1) for name in names]
        assert values == [block, -1, -1, -1, -1]
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(": 2}, r"'\(' is no regular expression"),
        ({"(?!x)q_proj": 2}, r"holds '\(\?!': expected characters, classes, groups"),
        ({r"(a)\1": 2}, r"holds '\\\\1'"),
        ({"(?i)q_proj": 2}, r"holds '\(\?i'"),
        ({"a" * 1001: 2}, "expected patterns of at most 1000 characters"),
        ({"(" * 30 + "a" + ")" * 30: 2}, "expected groups in at most 20 others"),
        ({"((a{1,99}){1,99}){1,99}": 2}, "are too many or repeat too often"),
        ({f".*[ap]{{9}}.*.{{9}}a{number}": 2 for number in range(30)}, "take too long to match"),
        ({"q_proj": 2.5}, r"rank_pattern\['q_proj'\]: expected a positive whole number, found 2.5"),
        ({"q_proj": "2"}, r"rank_pattern\['q_proj'\]: expected a positive whole number, found '2'"),
        ({"nowhere": True}, r"rank_pattern\['nowhere'\]: expected a positive whole number, found True"),
        ([("q_proj", 2)], "rank_pattern: expected patterns and numbers"),
    ],
)
def test_patterns_that_cannot_be_bounded_are_refused(patterns, message, monkeypatch):
    monkeypatch.setattr(module_patterns, "_MOST_EDGES", 20_000)
    monkeypatch.setattr(module_patterns, "_MOST_STATES", 5_000)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": patterns}
    paths = [f"base_model.model.{'ap' * 20}.layers.{block}.q_proj" for block in range(300)]
    weights = {f"{path}.lora_A.weight": torch.ones(2, 3) for path in paths}
    weights |= {f"{path}.lora_B.weight": torch.ones(3, 2) for path in paths}
    with pytest.raises(ValueError, match=rf"adapters\['x'\]: (rank_pattern: )?.*{message}") as error:
        load_adapter({"config": config, "weights": weights}, "x")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


WEIGHTS = {
    "base_model.model.q.lora_A.weight": torch.ones(2, 3),
    "base_model.model.q.lora_B.weight": torch.ones(3, 2),
}
BOOLEANS = ("ensure_weight_tying", "use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: "false"}, f"{name}: expected true or false, found 'false'") for name in BOOLEANS),
        *(({name: 0}, f"{name}: expected true or false, found 0") for name in BOOLEANS),
        ({"lora_bias": "no"}, "lora_bias: expected true or false, found 'no'"),
        ({"lora_alpha": 10**400}, "lora_alpha of .*: expected a positive number, found 1000"),
        ({"lora_alpha": "8"}, "lora_alpha of .*: expected a positive number, found '8'"),
        ({"lora_alpha": -1}, "lora_alpha of .*: expected a positive number, found -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha of .*: expected a positive number, found nan"),
        ({"r": 2.0}, "r of .*: expected a positive whole number, found 2.0"),
        ({"r": True}, "r of .*: expected a positive whole number, found True"),
        ({"r": 10**400}, "r of .*: expected a positive whole number, found 1000"),
        ({"alpha_pattern": {"q": [1]}}, r"alpha_pattern\['q'\]: expected a positive number, found \[1\]"),
        ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\]: expected a positive number, found inf"),
        ({"modules_to_save": [""]}, r"modules_to_save: expected names, found \[''\]"),
        ({"modules_to_save": [3]}, r"modules_to_save: expected names, found \[3\]"),
        ({"init_lora_weights": 3}, "init_lora_weights: expected true, false or a name, found 3"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA' is refused"),
        ({"bias": ["none"]}, r"bias: expected 'none', found \['none'\]"),
        ({"bias": None}, "bias: expected 'none', found None"),
        ({"peft_type": ["LORA"]}, r"peft_type: expected 'LORA', found \['LORA'\]"),
        ({"use_something_new": True}, "use_something_new=True is refused: a kind of LoRA"),
    ],
)
def test_values_of_another_type_are_refused(change, message):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **change}
    with pytest.raises(ValueError, match=rf"adapters\['x'\]: {message}") as error:
        load_adapter({"config": config, "weights": WEIGHTS}, "x")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_values_that_peft_lets_be_are_read():
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": None, "rank_pattern": None, "use_dora": False}
    config |= {"init_lora_weights": "gaussian", "modules_to_save": None, "bias": "none", "use_bdlora": None}
    assert load_adapter({"config": config, "weights": WEIGHTS}, "x").factors["q"].scaling == 1.5


def test_settings_of_a_newer_peft_are_noted():
    """PEFT itself warns of them; they may say that the factors mean something else."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": "9.1"}
    newer = {"twist_config": {"angle": 1}, "spectral": True, "off_config": None, "other": False}
    (note,) = load_adapter({"config": {**config, **newer}, "weights": WEIGHTS}, "x").notes
    assert note.startswith("spectral, twist_config of the configuration, which PEFT 9.1 wrote: not known here")
    assert load_adapter({"config": {**LoraConfig(r=2).to_dict(), **config}, "weights": WEIGHTS}, "x").notes == ()
    every = dict.fromkeys(LoraConfig.__dataclass_fields__, 1)
    assert unknown_settings(every) == ()


def test_another_kind_of_adapter_becomes_lora_as_the_message_says(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    made = get_peft_model(base, LoHaConfig(r=1, alpha=2, target_modules=["0"], init_weights=False))
    made.save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match=r"found 'LOHA'; PEFT makes LoRA of it: peft.save_as_lora\(FOLDER, peft_m"):
        load_adapter(tmp_path / "loha", "x")
    peft.save_as_lora(tmp_path / "lora", made, rank=4)
    layer = made.base_model.model[0]
    update = load_adapter(tmp_path / "lora", "x").factors["0"].delta()
    assert torch.allclose(update.float(), layer.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize("kind", ["IA3", "OFT", "HRA", "SHIRA", "HIRA"])
def test_of_kinds_that_peft_makes_no_lora_of_the_message_says_so(kind, tmp_path):
    settings = {"IA3": {"feedforward_modules": []}, "OFT": {"r": 0, "oft_block_size": 2}, "SHIRA": {"r": 1}}
    config = peft.get_peft_config({"peft_type": kind, "target_modules": ["0"], **settings.get(kind, {})})
    made = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6)), config)
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.save_as_lora(tmp_path / "lora", made, rank=4)
    with pytest.raises(ValueError, match=rf"found '{kind}', of which PEFT makes no LoRA; .*merge_and_unload\(\)"):
        load_adapter(tmp_path / "made", "x")


def test_lora_is_promised_of_the_kinds_alone_of_which_peft_makes_it():
    """By what the layers of each kind say where they stand around a linear."""
    promised, made = set(), set()
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if kind.value in ("LORA", "ADALORA"):
            continue
        with pytest.raises(ValueError, match=f"found '{kind.value}'") as caught:
            load_adapter({"config": {"peft_type": kind.value}, "weights": {}}, "x")
        if "PEFT makes LoRA of it" in str(caught.value):
            promised.add(kind.value)
        package = tuner.__module__.rpartition(".")[0]
        layers = [one for one in vars(sys.modules.get(f"{package}.layer", peft)).values() if is_layer(one)]
        if any(layer.supports_lora_conversion(MagicMock()) for layer in layers):
            made.add(kind.value)
    assert len(promised) > 10
    assert promised == made


def is_layer(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, BaseTunerLayer)


def test_of_adapters_that_depend_on_the_input_the_message_says_so():
    with pytest.raises(ValueError, match=r"found 'XLORA', which is something else .*: give one of them$"):
        load_adapter({"config": {"peft_type": "XLORA"}, "weights": {}}, "x")


def test_of_prompts_there_is_no_weight_to_merge():
    with pytest.raises(ValueError, match="found 'PROMPT_TUNING', which changes what the model reads and no weight"):
        load_adapter({"config": {"peft_type": "PROMPT_TUNING"}, "weights": {}}, "x")


def test_an_expression_is_read_once_for_all_modules(tmp_path, monkeypatch):
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, target_modules=["q_proj", "v_proj"])
    file = folder / "adapter_config.json"
    # No other test has it, as those that were read are kept.
    expression = r".*\.(v_proj|q_proj)"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": expression}))
    read = []
    monkeypatch.setattr(peft_config, "ModulePatterns", lambda held: read.append(held) or ModulePatterns(held))
    assert len(load_adapter(folder, "a").factors) > 2
    assert sum(any("q_proj" in one for one in held) for held in read) == 1

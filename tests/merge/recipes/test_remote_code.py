"""Code that comes with a base runs where a recipe says so, and nowhere else."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import served_cases
import yaml
from cli_cases import make_place
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from zoo import build

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.recipes.saved_result import load_result

CODE = '''\
from transformers import AutoModel, LlamaConfig, LlamaForSequenceClassification, LlamaModel

with open({log!r}, "a") as file:
    file.write("run\\n")


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnTrunk(LlamaModel):
    config_class = OwnConfig


AutoModel.register(OwnConfig, OwnTrunk)


class OwnModel(LlamaForSequenceClassification):
    config_class = OwnConfig
'''
LORA = ["method=task_arithmetic", "options={scale: 0.5}", "output.formats=lora"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base whose class lies beside it, and says so whenever it is read."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", list(sys.path))
    place = make_place(build("llama-cls"), tmp_path)
    assert main(["run", str(place / "recipe.yaml"), *LORA, f"output.dir={place / 'known'}"]) == 0
    file = place / "base" / "config.json"
    config = json.loads(file.read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"], "auto_map": own}
    file.write_text(json.dumps(config))
    (place / "base" / "own.py").write_text(CODE.format(log=str(place / "log")))
    return place


def test_it_runs_only_where_it_is_written_out(place, monkeypatch, capsys):
    monkeypatch.setenv("HF_TRUST_REMOTE_CODE", "1")
    run = ["run", str(place / "recipe.yaml"), *LORA]
    assert main(run) == 1
    assert "needs code of its own (auto_map in its config.json)" in capsys.readouterr().err
    assert not (place / "log").exists()
    assert not (place / "merged").exists()

    assert main([*run, "trust_remote_code=true"]) == 0
    assert (place / "log").exists()
    found, known = (load_file(place / out / "lora" / "adapter_model.safetensors") for out in ("merged", "known"))
    assert found.keys() == known.keys()
    assert all((found[key] == known[key]).all() for key in known)
    assert yaml.safe_load((place / "merged" / "recipe.yaml").read_text())["trust_remote_code"] is True

    # A folder may be another's: reading it back takes a word of its own.
    (place / "log").unlink()
    with pytest.raises(ValueError, match="says trust_remote_code: true, .* expected trust_remote_code=True"):
        load_result(place / "merged")
    export = ["export", str(place / "merged"), "--format", "lora", "--out", str(place / "copy")]
    assert main(export) == 1
    assert not (place / "log").exists()
    assert main([*export, "--trust-remote-code"]) == 0
    assert load_file(place / "copy" / "adapter_model.safetensors").keys() == known.keys()


def test_where_its_blocks_are_is_found_from_its_own_code(place, capsys):
    command = ["run", str(place / "recipe.yaml"), "trust_remote_code=true", "output.formats=coefficients"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "blocks ^(?:model\\.layers)\\.(\\d+)\\.," in shown
    assert "measured  1 module: model.layers." in shown


def test_the_card_runs_a_merged_model_of_such_code(place, monkeypatch, capsys):
    served_cases.tokenizer().save_pretrained(place / "base")
    out = place / "merged"
    run = ["run", str(place / "recipe.yaml"), *LORA[:2], "output.formats=[model]", "trust_remote_code=true"]
    assert main([*run, f"output.dir={out}"]) == 0
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-classification"
    monkeypatch.chdir(out)
    made = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, made)
    assert type(made["model"]).__name__ == "OwnModel"
    told = made["classify"]("w1 w2")[0]

    result = load_result(out, trust_remote_code=True)
    model = result.apply(result.model)
    model.score.weight.data = load_file(out / "heads" / "nli.safetensors")["score.weight"]
    logits = model(**served_cases.tokenizer()("w1 w2", return_tensors="pt")).logits
    assert told["score"] == pytest.approx(float(logits.softmax(-1).max()))


def test_what_the_configuration_says_of_code_that_is_not_there_is_left_out(tmp_path):
    base = served_cases.write_base("llama-cls", tmp_path / "base")
    adapters = served_cases.write_adapters(base, tmp_path, "llama-cls")
    file = base / "config.json"
    there = {"AutoModel": "owner/name--own.OwnModel", "AutoConfig": "other.OwnConfig"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": there}))
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic")
    config = result.save(tmp_path / "out", "model") / "config.json"
    assert json.loads(config.read_text())["auto_map"] == {"AutoModel": "owner/name--own.OwnModel"}

    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoConfig": "other.OwnConfig"}}))
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic")
    out = result.save(tmp_path / "plain", "model")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    loaded = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    assert type(loaded) is type(result.model)


def test_code_of_a_slow_and_a_fast_tokenizer_stays_where_it_lies_beside(tmp_path):
    """There are two places then, or one and none."""
    base = served_cases.write_base("llama-cls", tmp_path / "base")
    adapters = served_cases.write_adapters(base, tmp_path, "llama-cls")
    (base / "own.py").write_text("")
    file = base / "config.json"
    own = {"AutoTokenizer": ["own.Slow", None], "AutoConfig": "other.OwnConfig"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": own}))
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic")
    result = replace(result, inputs={**result.inputs, "trust_remote_code": True})
    config = result.save(tmp_path / "out", "model") / "config.json"
    assert json.loads(config.read_text())["auto_map"] == {"AutoTokenizer": ["own.Slow", None]}

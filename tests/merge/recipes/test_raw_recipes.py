"""Recipes on raw data: what they merge on is told, recorded, and the same every time."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml
from cli_cases import contents, interrupted, make_place
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from zoo import build

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.recipes import inputs
from nsc_merge.recipes.merge_recipe import load_recipe

ROWS = [{"question": f"w{number}", "answer": " ".join(f"w{3 + i}" for i in range(number))} for number in range(1, 9)]
TEMPLATE = "{question} {answer}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base with a tokenizer, two adapters, and rows whose lengths are all different."""
    place = make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))
    words = {"<pad>": 0, "<unk>": 1, **{f"w{number}": 2 + number for number in range(60)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    wrapped.save_pretrained(place / "base")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "lines.txt").write_text("".join(f"w{number} w1 w2\n" for number in range(6)))
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe |= {
        "calibration": {"nli": {"source": "rows.jsonl", "text": TEMPLATE}, "topic": "lines.txt"},
        "data": {"samples": 4, "seed": 5},
        "device": "cpu",
    }
    recipe["output"]["formats"] = ["coefficients"]
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made


def document(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def coefficients(folder):
    return json.loads((folder / "coefficients.json").read_text())["coefficients"]


def data(place, task="nli"):
    source = {"nli": place / "rows.jsonl", "topic": place / "lines.txt"}[task]
    text = TEMPLATE if task == "nli" else None
    return nsc_merge.calibration_data(source, str(place / "base"), batch_size=2, text=text, samples=4, seed=5)


def test_a_merge_on_raw_data_is_that_of_the_same_batches_and_leads_to_itself(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "merged"
    assert main(["run", str(place / "recipe.yaml"), f"output.dir={out}"]) == 0
    batches = {task: data(place, task) for task in ("nli", "topic")}
    model = AutoModelForSequenceClassification.from_pretrained(place / "base")
    adapters = {task: place / "adapters" / task for task in batches}
    assert coefficients(out) == nsc_merge.merge(model, adapters, batches, steps=4, lr=0.01).coefficients

    written = document(out)
    recorded = written["record"]["sha256"]["calibration"]
    assert recorded["nli"]["rows.jsonl"] == hashlib.sha256((place / "rows.jsonl").read_bytes()).hexdigest()
    assert {task: one["samples"] for task, one in recorded.items()} == {
        task: one.sha256["samples"] for task, one in batches.items()
    }
    assert written["calibration"]["nli"]["text"] == TEMPLATE
    assert {key: written["calibration"]["topic"][key] for key in ("source", "samples", "seed", "max_length")} == {
        "source": str(place / "lines.txt"),
        "samples": 4,
        "seed": 5,
        "max_length": 512,
    }
    monkeypatch.chdir(tmp_path)
    assert main(["run", "merged/recipe.yaml", "output.dir=again"]) == 0
    assert coefficients(tmp_path / "again") == coefficients(out)
    assert document(tmp_path / "again")["calibration"] == written["calibration"]
    # Its keys are each task's own.
    capsys.readouterr()
    assert main(["run", "merged/recipe.yaml", "output.dir=shorter", "data.max_length=3"]) == 2
    said = "data.max_length: has no effect, since every task sets max_length itself; expected calibration.TASK.max_len"
    assert said in capsys.readouterr().err
    assert main(["run", "merged/recipe.yaml", "--dry-run", "--json", "calibration.nli.max_length=3"]) == 0
    # Exported, it is still of these samples.
    nsc_merge.load_result(out).save(tmp_path / "copy", "coefficients")
    assert document(tmp_path / "copy")["record"]["sha256"] == written["record"]["sha256"]


def test_the_dry_run_shows_what_is_merged_on(place, capsys):
    before = contents(place)
    assert main(["run", str(place / "recipe.yaml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    batches = list(data(place))
    places = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    found = plan["data"]["nli"]
    assert (found["samples"], found["batches"], found["tokens"]) == (4, 2, real / 2)
    assert found["padding"] == pytest.approx(1 - real / places)
    assert found["sha256"] == data(place).sha256["samples"]
    assert found["first"] in {TEMPLATE.format_map(row) for row in ROWS}
    assert main(["run", str(place / "recipe.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = f"data      nli: 4 samples in 2 batches, {real / 2:.0f} tokens a batch and {1 - real / places:.0%} padding"
    assert f"{shown}, hash {found['sha256'][:12]}" in lines
    assert f"  first: {found['first']!r}" in lines
    assert contents(place) == before


def test_a_dry_run_of_inputs_that_are_made_already_says_as_much_as_it_can(place, capsys):
    file = place / "inputs" / "nli.safetensors"
    assert main(["run", str(place / "recipe.yaml"), "--dry-run", "--json", f"calibration.nli={file}"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]["nli"]
    assert (found["samples"], found["batches"]) == (6, 3)
    assert "sha256" not in found
    assert "first" not in found


def test_a_run_goes_on_with_the_same_samples_only(place, tmp_path, monkeypatch, capsys):
    command = ["run", str(place / "recipe.yaml"), f"output.dir={tmp_path / 'merged'}"]
    with interrupted(monkeypatch):
        assert main(command) == 130
    for other in ("data.seed=6", "calibration.nli.samples=3", "calibration.nli.text='{answer} {question}'"):
        assert main([*command, other, "--resume"]) == 1
        assert "calibration" in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, "--resume"]) == 0
    assert main([*command[:2], f"output.dir={tmp_path / 'whole'}"]) == 0
    assert coefficients(tmp_path / "merged") == coefficients(tmp_path / "whole")


def test_settings_of_raw_data_are_not_for_inputs_that_are_made_already(place, capsys):
    file = place / "inputs" / "nli.safetensors"
    assert main(["run", str(place / "recipe.yaml"), f"calibration.nli.source={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "calibration.nli.text: is of raw data, but" in line
    assert "holds inputs that are made already; expected none" in line


def test_processes_that_read_other_samples_do_not_merge(place, monkeypatch):
    recipe = load_recipe(place / "recipe.yaml")

    class Two(inputs.current().__class__):
        def share(self, value):
            return [*value, {**value[0], "nli": {"samples": "others"}}]

    monkeypatch.setattr(inputs, "current", Two)
    with pytest.raises(OSError, match=r"calibration: expected data that is the same for all processes"):
        inputs.read_inputs(recipe)

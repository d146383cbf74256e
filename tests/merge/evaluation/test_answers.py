"""How answers are searched: greedily or by beams, by what a base's generation config says of the tokens."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from architectures import ARCHITECTURES
from safetensors.torch import save_file
from zoo import KINDS, build, write_adapter

from nsc_merge.commands.main import main
from nsc_merge.evaluation import heads
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.scoring import predict, score
from nsc_merge.evaluation.suite import RecipeSuite


def wild(name):
    """A model whose answers depend on what it reads, and inputs without what its decoder begins with."""
    model = build("llama") if name == "llama" else ARCHITECTURES[name].build()
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.dim() == 2:
            value.data = torch.randn(value.shape, generator=generator) * (2 / value.shape[1] ** 0.5)
    if name == "llama":
        return model, {key: value.flip(1) for key, value in KINDS["llama"].inputs(0).items()}
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 4
    model.generation_config.eos_token_id = None
    return model, {key: value for key, value in ARCHITECTURES[name].inputs().items() if key != "decoder_input_ids"}


@pytest.mark.parametrize("name", ["BART", "llama"])
@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True, "temperature": 5.0},
        {"num_beams": 4, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_time": 1e-9},
        {"max_length": 3},
        {"forced_eos_token_id": 2},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_whatever_search_a_base_asks_for_answers_are_greedy(name, asked):
    model, inputs = wild(name)
    wanted = heads.GeneratingHead(6)(model, inputs)
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    assert torch.equal(heads.GeneratingHead(6)(model, inputs), wanted)


@pytest.mark.parametrize(
    "asked",
    [
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 3.0},
        {"suppress_tokens": list(range(5, 60))},
        {"bad_words_ids": [[number] for number in range(5, 60)]},
        {"forced_bos_token_id": 7},
        {"eos_token_id": [2, 3, *range(10, 60)], "min_length": 4},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_a_base_says_of_the_tokens_themselves_counts(asked):
    model, inputs = wild("BART")
    plain = heads.GeneratingHead(6)(model, inputs)
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    found = heads.GeneratingHead(6)(model, inputs)
    assert not torch.equal(found, plain)
    written = model.generate(**inputs, max_new_tokens=6, num_beams=1)[:, 1:]
    known = found != heads.IGNORE
    assert torch.equal(found[known], torch.nn.functional.pad(written, (0, 6 - written.shape[1]))[known])


def test_a_last_token_is_forced_at_a_limit_of_answers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, inputs = wild("BART")
    model.generation_config.forced_eos_token_id = end = 2
    free = heads.GeneratingHead(4)(model, inputs)
    assert free[0, -1] != end
    limited = heads.GeneratingHead(4, limited=True)(model, inputs)
    assert torch.equal(limited, torch.cat([free[:, :3], torch.full((2, 1), end)], 1))
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"])
    save_file({**inputs, "labels": free}, tmp_path / "test.safetensors")
    task = {"adapter": "adapter", "test": "test.safetensors", "metric": "exact_match", "generate": True}
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["zero_shot"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    for limit, expected in ((None, 1), (4, 0), (5, 1)):
        change = f"tasks.t.max_new_tokens={limit or 'null'}"
        suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml", [change]).at(0))
        assert score(suite, predict(suite, suite.model, "test")).metrics["t"] == expected


def test_an_answer_begins_as_generation_does_and_not_as_training_did():
    model, inputs = wild("BART")
    model.generation_config.decoder_start_token_id = 9
    wanted = model.generate(**inputs, max_new_tokens=5)[:, 1:]
    begun = {**inputs, "decoder_input_ids": torch.full((len(wanted), 1), 4)}
    assert torch.equal(heads.GeneratingHead(5)(model, begun), wanted)


@pytest.mark.parametrize("name", ["BART", "T5", "Whisper", "llama"])
def test_beams_are_those_of_generate(name):
    model, inputs = wild(name)
    model.generation_config.eos_token_id = ends = [2, *range(20, 30)]
    model.generation_config.no_repeat_ngram_size = 1
    written = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    front = {"llama": inputs.get("input_ids", torch.empty(1, 0)).shape[1], "Whisper": 0}.get(name, 1)
    found = heads.GeneratingHead(6, beams=3)(model, inputs)
    assert not torch.equal(found, heads.GeneratingHead(6)(model, inputs))
    for said, row in zip(found, written[:, front:].tolist(), strict=True):
        last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        assert said[said != heads.IGNORE].tolist()[: last + 1] == row[: last + 1]
        assert (said[last + 1 :] == heads.IGNORE).all()


def test_limit_and_beams_of_a_recipe_are_those_of_the_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, inputs = wild("BART")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"])
    written = model.generate(**inputs, max_new_tokens=7, num_beams=3)[:, 1:]
    assert written.shape == (2, 7)
    labels = written[:, :4].contiguous()
    save_file({**inputs, "labels": labels}, tmp_path / "test.safetensors")
    task = {"adapter": "adapter", "test": "test.safetensors", "metric": "exact_match", "generate": True}
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["zero_shot"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))

    def answers(*changes):
        suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml", changes).at(0))
        outputs = predict(suite, suite.model, "test")
        return outputs["t"][0], score(suite, outputs).metrics["t"]

    outputs, share = answers("tasks.t.max_new_tokens=7", "tasks.t.num_beams=3")
    assert torch.equal(outputs, written)
    assert share == 1
    assert answers()[0].shape == (2, 4)
    outputs, share = answers("tasks.t.max_new_tokens=2", "tasks.t.num_beams=3")
    assert outputs.shape == (2, 2)
    assert share == 0
    assert main(["eval", str(tmp_path / "eval.yaml"), "tasks.t.num_beams=2", "tasks.t.generate=false"]) == 2
    assert "tasks.t.num_beams: is of generated answers; expected generate: true, too" in capsys.readouterr().err
    settings = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": ["end"]}))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 1
    assert "stop_strings ['end']; expected tokens that end a text, in eos_token_id there" in capsys.readouterr().err

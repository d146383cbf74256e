"""A first recipe for a model whose decoder writes behind an encoder (BART, T5), and what it merges."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import zoo
from architectures import ARCHITECTURES
from init_cases import ADAPTERS, write_lines, written
from served_cases import WORDS, load, tokenizer

import nsc_merge
from nsc_merge.commands.main import main

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module", params=["BART", "T5"])
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    kind = ARCHITECTURES[request.param]
    model = kind.build()
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for seed, task in enumerate(("one", "two"), 1):
        zoo.write_adapter(model, folder / "adapters" / task, seed, r=2 + seed, target_modules=kind.targets)
    rows = [{"question": " ".join(WORDS[n : n + 2 + n % 3]), "answer": WORDS[2 * n]} for n in range(8)]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "news.jsonl", [{"document": one["question"], "summary": one["answer"]} for one in rows])
    return folder


@pytest.fixture(autouse=True)
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    Path("recipe.yaml").unlink(missing_ok=True)


def test_the_question_is_read_by_the_encoder_and_the_answer_by_the_decoder(capsys):
    assert main(["init", *ADAPTERS, "--data", "rows.jsonl"]) == 0
    assert "8 rows of question, answer; column 'question', for the decoder column 'answer'" in capsys.readouterr().out
    document = written()
    assert (document["data"]["text"], document["data"]["target"]) == ("question", "answer")
    advised = re.findall(r"^#   nsc-merge (run .* method=.*)$", Path("recipe.yaml").read_text(encoding="utf-8"), re.M)
    # Answers are written from where they begin.
    assert [line for line in advised if "new_tokens" in line and line.count(" data.target=null ") == 1]
    for line in advised:
        short = ["options.steps=1"] if "task_arithmetic" not in line else []
        assert main([*shlex.split(line), *short, "--dry-run"]) == 0, line


def test_columns_of_summaries_are_known():
    assert main(["init", *ADAPTERS, "--data", "news.jsonl"]) == 0
    assert (written()["data"]["text"], written()["data"]["target"]) == ("document", "summary")


def test_targets_of_each_tasks_own_are_all_left_out_where_answers_are_written():
    assert main(["init", *ADAPTERS, "--data", "one=rows.jsonl", "--data", "two=news.jsonl"]) == 0
    own = written()["calibration"]
    assert [own[task]["target"] for task in ("one", "two")] == ["answer", "summary"]
    (line,) = re.findall(r"^#   nsc-merge (run .*new_tokens.*)$", Path("recipe.yaml").read_text(encoding="utf-8"), re.M)
    assert " calibration.one.target=null calibration.two.target=null " in line
    assert main([*shlex.split(line), "options.steps=1", "--dry-run"]) == 0


def test_texts_alone_are_read_from_the_start_of_an_answer():
    write_lines(Path("texts.jsonl"), [{"text": WORDS[3]}, {"text": WORDS[4]}])
    assert main(["init", *ADAPTERS, "--data", "texts.jsonl"]) == 0
    assert not {"text", "target"} & set(written()["data"])


def test_a_run_is_the_merge_of_the_same_batches(tmp_path):
    assert main(["init", *ADAPTERS, "--data", "rows.jsonl"]) == 0
    run = ["run", "recipe.yaml", "batch_size=3", "options.steps=3", f"output.dir={tmp_path / 'merged'}"]
    assert main(run) == 0
    base = load(Path("base"))
    data = nsc_merge.calibration_data("rows.jsonl", base, text="question", target="answer", samples=500, batch_size=3)
    adapters = {task: f"adapters/{task}" for task in ("one", "two")}
    options = {**written()["options"], "steps": 3}
    wanted = nsc_merge.merge(base, adapters, dict.fromkeys(adapters, data), recipe="llm", progress=False, **options)
    found = nsc_merge.load_result(tmp_path / "merged")
    assert found.coefficients == wanted.coefficients
    assert len({one for task in found.coefficients.values() for one in task.values()}) > 2

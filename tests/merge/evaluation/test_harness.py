"""Tasks of the lm-evaluation-harness in evaluation recipes, from task files and data on disk."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shutil
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from harness_cases import lay_out, questions, tokenizer
from lm_eval.tasks import TaskManager
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.harness import measuring
from nsc_merge.evaluation.harness.task_files import read_task_files, reads
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.recipes.yaml_keys import RecipeError


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    place = tmp_path_factory.mktemp("harness")
    lay_out(place)
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Offline, with a cache of its own, and without the harness's list of installed packages, which takes a second."""
    import datasets.config
    import lm_eval.evaluator

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def calls(monkeypatch):
    """The tasks of every call of the harness."""
    made = []
    original = lm_eval.simple_evaluate

    def counted(**settings):
        made.append([getattr(task, "task_name", getattr(task, "name", None)) for task in settings["tasks"]])
        return original(**settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    return made


@pytest.fixture
def place(laid_out, tmp_path):
    """A copy whose files a test may change."""
    copied = tmp_path / "place"
    shutil.copytree(laid_out, copied)
    for file in (copied / "my_tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(laid_out), str(copied)))
    return copied


def model_of(place, adapters=(), scale=1.0):
    """By public pieces alone."""
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    if adapters:
        folders = {str(number): place / "adapters" / name for number, name in enumerate(adapters)}
        nsc_merge.merge(model, folders, method="task_arithmetic", scale=scale).apply(model)
    return model


@torch.no_grad()
def log_likelihoods(model, ids):
    """Of every token but the first."""
    logs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].double()


def accuracy(model, asked):
    """Share of questions whose answer is the likeliest of the choices after the question."""
    encode = tokenizer()
    right = 0
    for one in asked:
        sums = []
        for choice in one["choices"]:
            ids = encode(f"{one['question']} {choice}", add_special_tokens=False)["input_ids"]
            sums.append(log_likelihoods(model, ids)[-2:].sum().item())
        right += sums.index(max(sums)) == one["answer"]
    return right / len(asked)


def word_perplexity(model, asked):
    encode = tokenizer()
    total, words = 0.0, 0
    for one in asked:
        ids = [encode.bos_token_id, *encode(one["question"], add_special_tokens=False)["input_ids"]]
        total += log_likelihoods(model, ids).sum().item()
        words += len(one["question"].split())
    return math.exp(-total / words)


def change(place, **values):
    recipe = yaml.safe_load((place / "eval.yaml").read_text())
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, **values}, sort_keys=False))


def rows(place):
    document = json.loads((place / "out" / "results.json").read_text())
    return {row["row"]: row["runs"][0] for row in document["rows"]}


@pytest.mark.parametrize("chat", [False, True])
def test_a_system_instruction_stands_in_front_of_every_question(place, capsys, chat):
    """In a chat it is the system's message; another one measures the rows again."""
    said, tool = "w7 w8 w9", tokenizer()
    roles = "{{ {'system': 'w10', 'user': 'w11'}.get(m['role'], 'w12') }}"
    tool.chat_template = f"{{% for m in messages %}}{roles} {{{{ m['content'] }}}} {{% endfor %}}"
    tool.save_pretrained(place / "base")
    recipe = [str(place / "eval.yaml"), f"lm_eval.apply_chat_template={str(chat).lower()}"]
    assert main(["eval", *recipe]) == 0
    before = rows(place)
    assert main(["eval", *recipe, f'lm_eval.system_instruction="{said}\\n"']) == 0
    asked = questions(3, 12)[:10]
    front = f"w10 {said} w11" if chat else said
    asked = [{**one, "question": f"{front} {one['question']}"} for one in asked]
    for name, adapters in (("zero_shot", ()), ("finetuned", ["quiz"])):
        expected = accuracy(model_of(place, adapters), asked)
        assert rows(place)[name]["metrics"]["quiz"] == pytest.approx(expected)
    assert rows(place)["zero_shot"]["metrics"] != before["zero_shot"]["metrics"]
    capsys.readouterr()


def test_tasks_of_the_harness_beside_own_ones_in_one_table(place, calls, capsys, monkeypatch):
    own = {**KINDS["llama"].inputs(0), "labels": KINDS["llama"].inputs(1)["input_ids"]}
    with torch.no_grad():
        own["labels"][:2, 1:] = model_of(place, ["text"])(**KINDS["llama"].inputs(0)).logits[:2, :-1].argmax(-1)
    save_file(own, place / "own.safetensors")
    nsc_merge.merge(model_of(place), {"quiz": place / "adapters" / "quiz"}, method="task_arithmetic", scale=0.5).save(
        place / "merged", "model"
    )
    tasks = yaml.safe_load((place / "eval.yaml").read_text())["tasks"]
    tasks["text"]["limit"] = 10
    tasks = {"own": {"adapter": "adapters/text", "test": "own.safetensors", "metric": "accuracy"}, **tasks}
    methods = [{"method": "task_arithmetic", "name": "TA", "options": {"scale": 0.4}}, {"folder": "merged"}]
    change(place, tasks=tasks, methods=methods)
    recipe = str(place / "eval.yaml")
    capsys.readouterr()
    assert main(["eval", recipe]) == 0
    shown = capsys.readouterr()
    assert "\r" not in shown.err
    assert "acc ↑  word_perplexity ↓" in shown.out
    # One call where tasks share a model, one for each where every task has its own.
    assert sorted(map(len, calls)) == [1, 1, 2, 2, 2]

    asked = questions(3, 12)[:10]
    found = rows(place)
    for row, quiz, text in (
        ("zero_shot", model_of(place), model_of(place)),
        ("finetuned", model_of(place, ["quiz"]), model_of(place, ["text"])),
        ("TA", *[model_of(place, ["text", "quiz", "text"], 0.4)] * 2),
        ("merged", *[model_of(place, ["quiz"], 0.5)] * 2),
    ):
        metrics = found[row]["metrics"]
        assert list(metrics) == ["own", "quiz", "text"]
        assert metrics["quiz"] == pytest.approx(accuracy(quiz, asked)), row
        assert metrics["text"] == pytest.approx(word_perplexity(text, asked), rel=1e-4)
        with torch.no_grad():
            predicted = text(**KINDS["llama"].inputs(0)).logits[:, :-1].argmax(-1)
        assert metrics["own"] == pytest.approx((predicted == own["labels"][:, 1:]).float().mean().item())
        share = metrics["quiz"]
        record = found[row]["lm_eval"]
        assert record["quiz"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 9))
        assert record["quiz"] | {"stderr": None} == {
            "metric": "acc",
            "stderr": None,
            "lower_is_better": False,
            "samples": 10,
            "version": 1.5,
        }
        assert record["text"]["lower_is_better"]
    tuned = found["finetuned"]["metrics"]
    percents = found["TA"]["normalised"]
    assert percents["quiz"] == pytest.approx(100 * found["TA"]["metrics"]["quiz"] / tuned["quiz"])
    assert percents["text"] == pytest.approx(100 * tuned["text"] / found["TA"]["metrics"]["text"])

    document = json.loads((place / "out" / "results.json").read_text())
    assert document["tasks"]["text"] == {"metric": "word_perplexity", "lower_is_better": True, "lm_eval": "text"}
    assert document["versions"]["lm-eval"] == importlib.metadata.version("lm-eval")
    assert "text (word_perplexity ↓)" in (place / "out" / "results.md").read_text()
    lines = list(csv.DictReader((place / "out" / "results.csv").open()))
    assert [line["stderr"] != "" for line in lines if line["row"] == "TA"] == [False, True, False]

    # Nothing is measured again, but after a change of what is asked, or with another release of the harness.
    calls.clear()
    assert main(["eval", recipe]) == 0
    assert calls == []
    file = place / "my_tasks" / "test.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions(9, 12)))
    assert main(["eval", recipe, "methods=[task_arithmetic]"]) == 0
    assert len(calls) == 4
    assert rows(place)["zero_shot"]["metrics"]["quiz"] == pytest.approx(
        accuracy(model_of(place), questions(9, 12)[:10])
    )
    calls.clear()
    monkeypatch.setattr("nsc_merge.evaluation.rows.fingerprint.measuring_versions", lambda recipe: {"lm-eval": "0"})
    assert main(["eval", recipe, "methods=[task_arithmetic]"]) == 0
    assert len(calls) == 4
    capsys.readouterr()


def test_a_scale_is_tuned_on_other_questions_than_are_measured(place, capsys, monkeypatch):
    asked, original = [], lm_eval.simple_evaluate

    def noted(**settings):
        asked.append((settings["num_fewshot"], settings["limit"]))
        return original(**settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", noted)
    tune = {"by": "metric", "coarse": [0.2, 1.0], "fine_step": None}
    lines = [{"method": "task_arithmetic", "name": "TA", "tune": tune}]
    tasks = yaml.safe_load((place / "eval.yaml").read_text())["tasks"]
    tasks["quiz"] |= {"num_fewshot": 1, "metric": "acc_norm", "limit": 0.5}
    change(place, tasks={"quiz": tasks["quiz"]}, methods=lines)
    assert main(["eval", str(place / "eval.yaml")]) == 0
    assert set(asked) == {(1, 0.5)}
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    harness = measuring.Harness(load_eval_recipe(place / "eval.yaml").at(0), suite)
    finetuned = nsc_merge.merge(suite.model, suite.adapters, method="finetuned")
    own = harness.scores(finetuned, "val")["quiz"]
    assert (own.samples, harness.scores(finetuned, "test")["quiz"].samples) == (3, 6)
    trail = dict(rows(place)["TA"]["tuned"]["trail"])
    for scale in (0.2, 1.0):
        merged = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=scale)
        # The same once more: what stands in front of a question is drawn alike every time.
        for _ in range(2):
            assert trail[scale] == pytest.approx(100 * harness.scores(merged, "val")["quiz"].value / own.value)
    # Without examples, by hand.
    change(place, tasks={"quiz": {"adapter": "adapters/quiz", "lm_eval": "quiz"}})
    recipe = load_eval_recipe(place / "eval.yaml").at(0)
    measured = measuring.Harness(recipe, suite).scores(suite.model, "val")["quiz"].value
    assert measured == pytest.approx(accuracy(model_of(place), questions(2, 6)))
    assert asked[-1] == (None, None)
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["same file", "part of it"])
def test_a_scale_is_not_tuned_on_the_questions_under_another_name(place, capsys, kind):
    lines = (place / "my_tasks" / "test.jsonl").read_text().splitlines(keepends=True)
    (place / "my_tasks" / "validation.jsonl").write_text("".join(lines if kind == "same file" else lines[3:7]))
    change(place, tasks={"quiz": {"adapter": "adapters/quiz", "lm_eval": "quiz"}})
    tuned = "methods=[{method: task_arithmetic, tune: metric}]"
    assert main(["eval", str(place / "eval.yaml"), tuned]) == 1
    assert "test and validation of quiz of the harness (tasks.quiz) hold the same" in capsys.readouterr().err
    assert not (place / "out").exists()
    assert main(["eval", str(place / "eval.yaml")]) == 0


@pytest.mark.parametrize("training", [False, True])
def test_no_question_is_tuned_on_with_its_own_answer_in_front(place, training):
    """Without training data the examples in front of a question are of the validation split, as the questions are."""
    file = place / "my_tasks" / "quiz.yaml"
    config = yaml.safe_load(file.read_text())
    if not training:
        del config["training_split"]
    file.write_text(yaml.safe_dump(config))
    quiz = {"adapter": "adapters/quiz", "lm_eval": "quiz", "num_fewshot": 4}
    change(place, tasks={"quiz": quiz}, methods=[{"method": "task_arithmetic", "tune": "metric"}])
    recipe = load_eval_recipe(place / "eval.yaml").at(0)
    harness = measuring.Harness(recipe, RecipeSuite(recipe))
    examples = {one["question"] for one in questions(*((1, 4) if training else (2, 6)))}
    for split, asked in (("val", questions(2, 6)), ("test", questions(3, 12))):
        task = harness._task("quiz", split)
        assert [doc["question"] for doc in task.eval_docs] == [one["question"] for one in asked]
        task.set_fewshot_seed(1234)
        for doc in task.eval_docs:
            *shown, last = task.fewshot_context(doc, 4).split("\n\n")
            assert last == doc["question"]
            assert len(shown) == 4
            assert doc["question"] not in [one[: len(doc["question"])] for one in shown]
            assert all(any(one.startswith(example) for example in examples) for one in shown)


def test_an_output_layer_that_was_trained_is_measured_with_its_adapter(place, capsys):
    write_adapter(
        build("llama"), place / "adapters" / "text", 5, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    change(place, tasks={"text": {"adapter": "adapters/text", "lm_eval": "text"}})
    assert main(["eval", str(place / "eval.yaml"), "methods=[zero_shot]"]) == 0
    own = PeftModel.from_pretrained(model_of(place), place / "adapters" / "text").eval()
    asked = questions(3, 12)
    found = {row: run["metrics"]["text"] for row, run in rows(place).items()}
    assert found["finetuned"] == pytest.approx(word_perplexity(own, asked), rel=1e-4)
    assert found["zero_shot"] == pytest.approx(word_perplexity(model_of(place), asked), rel=1e-4)
    capsys.readouterr()


def test_a_group_of_tasks_is_one_figure(place, calls, capsys):
    group = {
        "group": "both",
        "task": ["quiz", {"task": "quiz_val", "include": "quiz.yaml"}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    quiz = yaml.safe_load((place / "my_tasks" / "quiz.yaml").read_text())
    other = {**quiz, "task": "quiz_val", "test_split": "validation"}
    (place / "my_tasks" / "both.yaml").write_text(yaml.safe_dump({**group, "task": ["quiz", "quiz_val"]}))
    (place / "my_tasks" / "quiz_val.yaml").write_text(yaml.safe_dump(other))
    tasks = {
        "all": {"adapter": "adapters/quiz", "lm_eval": "both"},
        "quiz": {"adapter": "adapters/quiz", "lm_eval": "quiz"},
        "again": {"adapter": "adapters/quiz", "lm_eval": "quiz", "metric": "acc"},
    }
    change(place, tasks=tasks)
    assert main(["eval", str(place / "eval.yaml"), "methods=[zero_shot]"]) == 0
    found = rows(place)["zero_shot"]
    asked = [*questions(3, 12), *questions(2, 6)]
    assert found["metrics"]["all"] == pytest.approx(accuracy(model_of(place), asked))
    assert found["lm_eval"]["all"]["samples"] == 18
    assert found["metrics"]["quiz"] == found["metrics"]["again"] == pytest.approx(accuracy(model_of(place), asked[:12]))
    # A task beside a group that holds it needs a call of its own; the same task twice does not.
    assert calls[:2] == [["both"], ["quiz"]]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.quiz.lm_eval=3"], "tasks.quiz.lm_eval: expected text, found 3"),
        (["tasks.quiz.limit=0"], "limit: expected a whole number of at least 1, or a share below 1, found 0"),
        (["tasks.quiz.limit=1.0"], "limit: expected a whole number of at least 1, or a share below 1, found 1.0"),
        (["tasks.quiz.limit=0.0"], "limit: expected a whole number of at least 1, or a share below 1, found 0.0"),
        (["tasks.quiz.limit=some"], "limit: expected a whole number of at least 1, or a share below 1, found 'some'"),
        (["tasks.quiz.num_fewshot=-1"], "tasks.quiz.num_fewshot: expected a whole number of at least 0, found -1"),
        (["tasks.quiz.test=own.safetensors"], "tasks.quiz.test: no such key (keys: adapter, lm_eval, metric"),
        (["tasks.quiz.adapter=null"], "tasks.quiz.adapter: expected a path, found none"),
        (["lm_eval.include_path=nowhere"], "lm_eval.include_path: expected a folder of task files"),
        (["lm_eval.batch_size=many"], "lm_eval.batch_size: expected a whole number of at least 1, found 'many'"),
        (["lm_eval.tasks=quiz"], "lm_eval.tasks: no such key (keys: include_path, batch_size, apply_chat_template, "),
        (["methods=[ensemble]"], "methods[0]: ensemble is the mean of the outputs of several models, and task quiz"),
        (["methods=[nsc]"], "tasks.quiz.calibration: methods[0] (nsc) needs inputs of every task"),
        (
            ["methods=[{method: task_arithmetic, tune: loss}]"],
            "methods[0].tune: task quiz (lm_eval) has no loss; use metric",
        ),
        (["joint=logits"], "joint: expected at least two tasks of metric accuracy, found 0"),
    ],
)
def test_wrong_recipes_give_one_line_and_status_2(laid_out, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(laid_out)
    assert main(["eval", "eval.yaml", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (laid_out / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.quiz.metric=f1"], "tasks.quiz.metric: expected one of ['acc', 'acc_norm'], found 'f1'"),
        (["tasks.quiz.metric='acc,strict'"], "tasks.quiz.metric: expected one of ['acc,none', 'acc_norm,none']"),
        (
            ["methods=[{method: task_arithmetic, tune: metric}]"],
            "tune needs data beside those that are measured, and text of the harness (tasks.text) has test_split "
            "'test' and validation_split None; give the scale as options.scale",
        ),
    ],
)
def test_what_the_harness_does_not_have_is_told_before_anything_is_written(place, capsys, overrides, message):
    assert main(["eval", str(place / "eval.yaml"), *overrides]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "out").exists()


def test_names_that_the_harness_does_not_have_and_data_that_cannot_be_read_are_told(place, monkeypatch, capsys):
    quiz = place / "my_tasks" / "quiz.yaml"
    quiz.write_text(f"{quiz.read_text()}tag: games\n")
    # The harness's own tasks take many seconds to list.
    own = TaskManager(include_path=str(place / "my_tasks"), include_defaults=False)
    monkeypatch.setattr(measuring, "_with_builtin", lambda include_path: own)
    for name, message in (
        ("quizz", "tasks.quiz.lm_eval: the harness has no task 'quizz'; did you mean quiz?"),
        ("games", "tasks.quiz.lm_eval: 'games' is a tag with no figure of its own; expected one of ['quiz']"),
    ):
        assert main(["eval", str(place / "eval.yaml"), f"tasks.quiz.lm_eval={name}"]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    (place / "my_tasks" / "test.jsonl").write_text("{")
    assert main(["eval", str(place / "eval.yaml")]) == 1
    assert "tasks.quiz.lm_eval: the harness cannot load 'quiz': " in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "out").exists()


def test_samples_are_not_studied_by_tasks_of_the_harness(laid_out, capsys):
    assert main(["analyse", "quartiles", str(laid_out / "eval.yaml"), "--row", "TA"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tasks: expected some with test data, found those of the lm-evaluation-harness alone" in line


def test_a_base_without_tokenizer_or_words_is_refused(place, capsys):
    (place / "base" / "tokenizer.json").unlink()
    assert main(["eval", str(place / "eval.yaml")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"tasks.quiz.lm_eval: beside the base: {place / 'base'} holds no tokenizer" in line
    assert line.endswith("tokenizer: FOLDER, under the key data")
    vit = build("vit")
    vit.save_pretrained(place / "vit")
    write_adapter(vit, place / "adapters" / "image", 1, r=2, target_modules=["q_proj"])
    change(place, model="vit", tasks={"image": {"adapter": "adapters/image", "lm_eval": "quiz"}})
    assert main(["eval", str(place / "eval.yaml")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tasks.image.lm_eval: expected a base that generates text, found ViTForImageClassification" in line


def test_without_the_harness_the_way_to_it_is_told(laid_out, monkeypatch, capsys):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else original(name, *a))
    assert main(["eval", str(laid_out / "eval.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "tasks.quiz.lm_eval: needs the lm-evaluation-harness" in line
    assert line.endswith("pip install 'nsc-kernels[eval]'")


def test_the_network_is_left_open_only_for_tasks_whose_data_are_on_the_hub(laid_out, tmp_path):
    recipe = laid_out / "eval.yaml"
    assert load_eval_recipe(recipe).offline
    assert not load_eval_recipe(recipe, ["tasks.quiz.lm_eval=arc_easy"]).offline
    assert not load_eval_recipe(recipe, ["model=owner/name"]).offline

    folder = tmp_path / "tasks"
    (folder / "deep").mkdir(parents=True)
    data = tmp_path / "data.csv"
    data.write_text("a,b\n")
    local = {"dataset_path": "csv", "dataset_kwargs": {"data_files": str(data)}}
    written = {
        "base": local,
        "here": {"include": "base.yaml", "task": "here"},
        "hub": {"include": "base.yaml", "task": "hub", "dataset_path": "owner/name"},
        "folder": {"task": "folder", "dataset_path": str(folder)},
        "link": {"task": "link", "dataset_path": "json", "dataset_kwargs": {"data_files": ["https://a.b/c.json"]}},
        "gone": {"task": "gone", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "gone.json"}}},
        "pair": {"group": "pair", "task": ["here", {"task": "folder", "num_fewshot": 2}]},
        "mixed": {"group": "mixed", "task": ["pair", "hub"]},
        "inner": {"group": "inner", **local, "task": [{"group": "sub", "task": ["here"]}, {"task": "x", "doc": 1}]},
        "wide": {"group": "wide", "task": ["here", "arc_easy"]},
    }
    for name, config in written.items():
        (folder / "deep" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (folder / "code.yaml").write_text("task: code\nclass: !function mine.Task\n")
    (folder / "made.yaml").write_text("task: made\ncustom_dataset: !function mine.make\n")
    known = read_task_files(folder)
    found = {name: reads(name, known, name) for name in known if name != "gone"}
    assert {name for name, one in found.items() if one.hub} == {"hub", "link", "mixed", "wide", "code"}
    assert {name for name, one in found.items() if one.builtin} == {"wide"}
    assert found["here"].files == (data,)
    assert found["pair"].files == (data, folder)
    assert found["inner"].files == (data, data)
    with pytest.raises(RecipeError, match=r"tasks.gone: .*gone.yaml reads gone.json, which is missing"):
        reads("gone", known, "tasks.gone")
    (folder / "deep" / "base.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"lm_eval.include_path: .*base.yaml"):
        read_task_files(folder)
    (folder / "deep" / "base.yaml").write_text("include: base.yaml")
    with pytest.raises(RecipeError, match="base.yaml includes itself"):
        read_task_files(folder)


def test_the_recipe_and_the_task_file_of_the_guide_are_read_as_it_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text().split("## Tasks of the lm-eval")[1]
    recipe, task = (block.split("```")[0] for block in page.split("```yaml\n")[1:3])
    monkeypatch.chdir(tmp_path)
    adapters = [f"adapters/{name}" for name in ("arc", "maths", "quiz", "count")]
    for folder in ("base", "merged", "my_tasks", "data", *adapters):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("count-test.safetensors", "test.jsonl", "validation.jsonl"):
        (tmp_path / "data" / file).touch()
    (tmp_path / "eval.yaml").write_text(recipe)
    (tmp_path / "my_tasks" / "my_quiz.yaml").write_text(task)
    found = load_eval_recipe(tmp_path / "eval.yaml")
    assert list(found.harness) == ["arc", "maths", "quiz"]
    assert (found.harness["arc"].limit, found.harness["maths"].limit) == (500, 0.2)
    assert found.lm_eval.data == (tmp_path / "data" / "test.jsonl", tmp_path / "data" / "validation.jsonl")
    assert found.lm_eval.builtin
    assert not found.offline
    change(tmp_path, tasks={"quiz": {"adapter": "adapters/quiz", "lm_eval": "my_quiz"}})
    assert load_eval_recipe(tmp_path / "eval.yaml").offline


def test_what_is_measured_leaves_the_model_as_it_was(laid_out):
    recipe = load_eval_recipe(laid_out / "eval.yaml").at(0)
    suite = RecipeSuite(recipe)
    before = {name: value.clone() for name, value in suite.model.state_dict().items()}
    merged = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.7)
    measuring.Harness(recipe, suite).scores(merged, "test")
    assert all(torch.equal(value, before[name]) for name, value in suite.model.state_dict().items())
    assert isinstance(suite.model, nn.Module)

"""What is kept of an evaluation: measured once, again where something changed, and once for every seed that matters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from eval_cases import change, reference, rows
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.rows.fingerprint import fingerprint


def test_rows_are_measured_once_and_again_only_if_something_changed(place, capsys, monkeypatch):
    from nsc_merge.evaluation import run as module

    measured = []
    original = module._Bench.measured

    def counted(self, row):
        measured.append(row.name)
        return original(self, row)

    monkeypatch.setattr(module._Bench, "measured", counted)
    recipe = str(place / "eval.yaml")
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert len(measured) == 6
    first = (place / "out" / "results.json").read_bytes()
    # The last line is lost, as by an interruption, and half of another is left.
    lines = (place / "out" / "rows.jsonl").read_text().splitlines()
    (place / "out" / "rows.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    measured.clear()
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == ["ensemble"]
    again = json.loads((place / "out" / "results.json").read_text())
    for document in (again, expected := json.loads(first)):
        for run in rows(document)["ensemble"]:
            del run["seconds"]
    assert again == expected
    measured.clear()
    change(
        place,
        methods=["ensemble", {"method": "task_arithmetic", "name": "renamed", "options": {"scale": 0.4}}],
    )
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == []
    data = load_file(place / "data" / "nli-test.safetensors")
    save_file({**data, "labels": (data["labels"] + 1) % 3}, place / "data" / "nli-test.safetensors")
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert measured == ["zero_shot", "finetuned", "ensemble", "renamed"]
    capsys.readouterr()


def test_rows_of_another_way_to_measure_are_measured_again(place, monkeypatch):
    from nsc_merge.evaluation.rows import fingerprint as module

    recipe = load_eval_recipe(place / "eval.yaml")
    before = [module.fingerprint(recipe, row, 0) for row in recipe.rows]
    assert before == [module.fingerprint(recipe, row, 0) for row in recipe.rows]
    monkeypatch.setattr(module, "_MEASURES", module._MEASURES + 1)
    assert not set(before) & {module.fingerprint(recipe, row, 0) for row in recipe.rows}


@pytest.fixture
def marks(place):
    """The fingerprint of every row at a seed, of the recipe with some overrides."""
    (place / "texts").mkdir()
    (place / "texts" / "a.jsonl").write_text('{"a": "x", "b": "y"}')
    (place / "base" / "tokenizer.json").write_text("{}")
    (place / "harness").mkdir()
    document = {"task": "quiz", "dataset_path": "json", "output_type": "generate_until"}
    data = {"dataset_kwargs": {"data_files": {"test": str(place / "quiz.jsonl")}}, "test_split": "test"}
    (place / "harness" / "quiz.yaml").write_text(yaml.safe_dump(document | data))
    (place / "quiz.jsonl").write_text("{}")
    head = {"weight": torch.zeros(3, 32)}
    save_file(head, place / "head.safetensors")

    def found(*overrides, seed=0):
        recipe = load_eval_recipe(place / "eval.yaml", overrides)
        return {row.name: fingerprint(recipe, row, seed) for row in recipe.rows}

    return found


HEAD = ("joint=false", "tasks.nli.head={place}/head.safetensors", "tasks.nli.pool=mean")
TEXTS = ("tasks.nli.calibration={{source: {place}/texts, text: a}}",)
QUIZ = (
    "joint=false", "methods=[zero_shot]", "tasks.quiz={{adapter: {place}/adapters/nli, lm_eval: quiz}}",
    "lm_eval.include_path={place}/harness",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "settings", "files"),
    [
        (
            (),
            ["batch_size=4", "dtype=bfloat16", "shared_modules=mean", "joint=probabilities", "trust_remote_code=true",
             "tasks.nli.labels=input_ids", "tasks.nli.classes=[a, b, c]", "tasks.nli.head=model",
             "tasks.nli.validation={place}/data/nli-test.safetensors"],
            ["base/config.json", "base/model.safetensors", "adapters/nli/adapter_model.safetensors",
             "adapters/topic/adapter_config.json", "data/topic-test.safetensors", "data/nli-val.safetensors"],
        ),
        (HEAD, ["tasks.nli.pool=last", "tasks.nli.metric=f1"], ["head.safetensors"]),
        (TEXTS, ["tasks.nli.calibration.text=b", "data.samples=3"], ["texts/a.jsonl", "base/tokenizer.json"]),
        (
            QUIZ,
            ["tasks.quiz.limit=3", "tasks.quiz.num_fewshot=0", "tasks.quiz.metric=acc", "lm_eval.batch_size=3",
             "lm_eval.apply_chat_template=true", "lm_eval.system_instruction=be brief"],
            ["harness/quiz.yaml", "quiz.jsonl", "base/tokenizer.json"],
        ),
    ],
    ids=["labelled", "head", "texts", "harness"],
)  # fmt: skip
def test_what_figures_depend_on_is_in_the_fingerprint(place, marks, given, settings, files):
    given = [one.format(place=place) for one in given]
    before = marks(*given)
    assert before == marks(*given, "output.dir=elsewhere", "output.plots=false")
    for setting in settings:
        after = marks(*given, setting.format(place=place))
        assert {name for name, mark in after.items() if mark == before[name]} == set(), setting
    for file in map(place.joinpath, files):
        held = file.read_bytes()
        # Of weights, the last byte is a number's.
        file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]) if file.suffix == ".safetensors" else held + b" ")
        assert not set(before.values()) & set(marks(*given).values()), file
        file.write_bytes(held)
    assert marks(*given) == before


def test_a_row_is_its_own_and_of_the_seed_where_it_draws(place, marks):
    shutil.copytree(place / "adapters" / "nli", place / "saved" / "lora")
    change(place, methods=[
        {"folder": str(place / "saved"), "name": "saved"},
        {"method": "task_arithmetic", "name": "a", "options": {"scale": 0.4}},
        {"method": "task_arithmetic", "name": "same", "options": {"scale": 0.4}},
        {"method": "task_arithmetic", "name": "other", "options": {"scale": 0.5}},
        {"method": "task_arithmetic", "name": "tuned", "tune": "loss"},
        {"method": "task_arithmetic", "name": "by metric", "tune": "metric"},
        {"method": "nsc", "options": {"steps": 3}},
        {"method": "dare", "name": "dare"},
        {"method": "dare", "name": "of its own seed", "options": {"seed": 5}},
    ])  # fmt: skip
    found = marks()
    assert len(set(found.values())) == len(found) - 1
    assert found["a"] == found["same"]
    again = marks(seed=1)
    assert {name for name in found if found[name] != again[name]} == {"nsc", "dare"}
    changed = place / "saved" / "lora" / "adapter_model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\7")
    assert {name for name, mark in marks().items() if mark != found[name]} == {"saved"}


def test_a_row_whose_files_changed_while_it_was_measured_is_not_kept(place, capsys, monkeypatch):
    """The suite is read once: a later row would be measured on the old file and kept under the hash of the new."""
    from nsc_merge.evaluation import run as module

    original, file = module._Bench.measured, place / "data" / "nli-test.safetensors"

    def replaced(self, row):
        if row.name == "TA":
            data = load_file(file)
            save_file({**data, "labels": (data["labels"] + 1) % 3}, file)
        return original(self, row)

    scales = {"first": 0.3, "TA": 0.4, "last": 0.5}
    lines = [{"method": "task_arithmetic", "name": name, "options": {"scale": s}} for name, s in scales.items()]
    change(place, methods=lines)
    monkeypatch.setattr(module._Bench, "measured", replaced)
    assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 1
    shown = capsys.readouterr().err
    for name in ("TA", "last"):
        assert f"{name}, seed 0: a file that it depends on changed while rows were measured" in shown
    assert list(rows(json.loads((place / "out" / "results.json").read_text()))) == ["zero_shot", "finetuned", "first"]


def test_a_saved_merge_with_other_coefficients_is_measured_again(place, capsys):
    model = type(build("llama-cls")).from_pretrained(place / "base")
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4).save(place / "numbers", "coefficients")
    change(place, methods=[{"folder": "numbers", "name": "numbers"}])
    losses = []
    for _ in range(2):
        assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 0
        losses.append(rows(json.loads((place / "out" / "results.json").read_text()))["numbers"][0]["losses"])
        document = json.loads((place / "numbers" / "coefficients.json").read_text())
        document["coefficients"] = {path: dict.fromkeys(row, 4.0) for path, row in document["coefficients"].items()}
        (place / "numbers" / "coefficients.json").write_text(json.dumps(document))
    assert losses[0] != losses[1]
    capsys.readouterr()


def test_seeds_repeat_what_depends_on_them(place, capsys):
    for seed in (3, 4):
        shutil.copytree(place / "adapters" / "nli", place / "adapters" / f"nli-{seed}")
    write_adapter(
        build("llama-cls"),
        place / "adapters" / "nli-4",
        9,
        r=2,
        target_modules=["v_proj"],
        task_type="SEQ_CLS",
    )
    recipe = str(place / "eval.yaml")
    overrides = ["seeds=[3, 4]", f"tasks.nli.adapter={place}/adapters/nli-{{seed}}", "joint=false"]
    assert main(["eval", recipe, *overrides, "output.plots=false"]) == 0
    shown = capsys.readouterr().out
    assert "±" in shown
    assert "over 2 seeds" in shown
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert [run["seed"] for run in found["TA 0.4"]] == [3, 4]
    losses = [run["losses"]["nli"] for run in found["TA 0.4"]]
    assert losses[0] != losses[1]
    own, labels = reference(place, 0.4, "nli")
    assert losses[0] == pytest.approx(nn.functional.cross_entropy(own, labels).item(), rel=1e-4)


def test_a_row_that_fails_for_some_seeds_says_so_and_equals_are_marked_alike(place, capsys):
    for seed in (3, 5):
        shutil.copytree(place / "adapters" / "nli", place / f"saved-{seed}")
    (place / "saved-4").mkdir()
    same = {"method": "task_arithmetic", "options": {"scale": 0.0}}
    change(place, methods=[{**same, "name": "one"}, {**same, "name": "other"}, {"folder": "saved-{seed}", "name": "s"}])
    assert main(["eval", str(place / "eval.yaml"), "seeds=[3, 4, 5]", "joint=false"]) == 1
    shown = capsys.readouterr()
    assert "s, seed 4: folder: " in shown.err
    assert "s (2 of 3 seeds) " in shown.out
    table = (place / "out" / "results.md").read_text()
    assert table.count("| s (2 of 3 seeds) |") == 2
    percents = [line.split("|") for line in table.split("## Scores")[0].splitlines() if "|" in line]
    cells = {line[1].strip(): line[2:-1] for line in percents}
    for task in (0, 1, 2):
        marked = {name for name, row in cells.items() if "**" in row[task]}
        # The base is what a scale of 0 leaves, and a row of fewer seeds is not compared.
        assert marked == {"zero_shot", "one", "other"}


def test_what_no_seed_changes_has_no_deviation(place, capsys):
    """It was measured once: a deviation of 0 would say that it was measured again and was the same."""
    assert main(["eval", str(place / "eval.yaml"), "seeds=[3, 4]", "output.plots=false", "joint=false"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in shown.splitlines()}
    # Data of NSC are shuffled by the seed.
    assert "±" in lines["nsc"]
    assert not any("±" in lines[name] for name in ("zero_shot", "finetuned (score)", "TA 0.4", "ensemble"))
    assert "mean ± standard deviation over 2 seeds; what has none depends on no seed" in shown
    scores = (place / "out" / "results.md").read_text().partition("## Scores")[2]
    assert [line.count("±") for line in scores.splitlines() if line.startswith("| TA 0.4")] == [0]


def test_pictures_that_are_asked_for_later_are_drawn(place, capsys):
    recipe = str(place / "eval.yaml")
    assert main(["eval", recipe, "output.plots=false"]) == 0
    assert not (place / "out" / "coefficients").exists()
    (first,) = rows(json.loads((place / "out" / "results.json").read_text()))["nsc"]
    assert main(["eval", recipe]) == 0
    assert list((place / "out" / "coefficients" / "nsc-seed0").glob("*.png"))
    (again,) = rows(json.loads((place / "out" / "results.json").read_text()))["nsc"]
    assert again["losses"] == first["losses"]
    # Of one coefficient for everything there is nothing to be seen, and nothing is measured again for it.
    kept = (place / "out" / "rows.jsonl").read_bytes()
    assert main(["eval", recipe]) == 0
    assert (place / "out" / "rows.jsonl").read_bytes() == kept
    assert [path.name for path in (place / "out" / "coefficients").iterdir()] == ["nsc-seed0"]
    capsys.readouterr()

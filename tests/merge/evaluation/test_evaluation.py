"""Evaluation recipes from end to end."""

from __future__ import annotations

import copy
import csv
import functools
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation import heads
from nsc_merge.evaluation.candidates import candidate_of
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.scoring import applied, joint_hits, predict
from nsc_merge.evaluation.suite import RecipeSuite


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def place(tmp_path):
    """Two classification tasks with heads of their own, their data, and a recipe."""
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    tasks = {}
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(
            base,
            tmp_path / "adapters" / task,
            seed,
            r=4,
            target_modules=["q_proj", "v_proj"],
            task_type="SEQ_CLS",
        )
        for split, first in (("test", 10), ("val", 50)):
            inputs = [KINDS["llama-cls"].inputs(first * seed + i) for i in range(4)]
            stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
            generator = torch.Generator().manual_seed(seed)
            stacked["labels"] = torch.randint(0, 3, (12,), generator=generator)
            save_file(stacked, tmp_path / "data" / f"{task}-{split}.safetensors")
        tasks[task] = {
            "adapter": f"adapters/{task}",
            "test": f"data/{task}-test.safetensors",
            "validation": f"data/{task}-val.safetensors",
            "metric": "accuracy",
        }
    recipe = {
        "model": "base",
        "tasks": tasks,
        "methods": [
            {"method": "task_arithmetic", "name": "TA 0.4", "options": {"scale": "4e-1"}},
            {"method": "task_arithmetic", "name": "TA", "tune": {"by": "loss", "fine_step": None}},
            {"method": "nsc", "options": {"steps": 3, "lr": 0.05}},
            "ensemble",
        ],
        "joint": "logits",
        "batch_size": 5,
        "output": {"dir": "out"},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def reference(place, candidate, task, split="test"):
    """Logits and labels of a task, put together from public pieces alone."""
    model = type(build("llama-cls")).from_pretrained(place / "base").eval()
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    if candidate == "finetuned":
        adapters, candidate = {task: adapters[task]}, 1.0
    nsc_merge.merge(model, adapters, method="task_arithmetic", scale=candidate).apply(model)
    weights = load_file(place / "adapters" / task / "adapter_model.safetensors")
    with torch.no_grad():
        model.score.weight.copy_(weights["base_model.model.score.weight"])
        data = load_file(place / "data" / f"{task}-{split}.safetensors")
        labels = data.pop("labels")
        return model(**data).logits, labels


def rows(document):
    return {row["row"]: row["runs"] for row in document["rows"]}


def test_a_recipe_from_end_to_end(place, capsys):
    assert main(["eval", str(place / "eval.yaml"), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    found = rows(document)
    assert list(found) == ["zero_shot", "finetuned", "TA 0.4", "TA", "nsc", "ensemble"]
    assert "\r" not in shown.err
    for task in ("nli", "topic"):
        for row, candidate in (("TA 0.4", 0.4), ("finetuned", "finetuned"), ("zero_shot", 0.0)):
            outputs, labels = reference(place, candidate, task)
            share = (outputs.argmax(-1) == labels).float().mean().item()
            assert found[row][0]["metrics"][task] == pytest.approx(share)
            loss = nn.functional.cross_entropy(outputs, labels).item()
            assert found[row][0]["losses"][task] == pytest.approx(loss, rel=1e-4)
    own = found["finetuned"][0]["metrics"]
    percents = {task: 100 * found["TA 0.4"][0]["metrics"][task] / own[task] for task in own}
    assert found["TA 0.4"][0]["normalised"] == pytest.approx(percents)
    assert found["TA 0.4"][0]["average"] == pytest.approx(sum(percents.values()) / 2)

    # The tuned scale has the least summed validation loss of the coarse sweep.
    tuned = found["TA"][0]["tuned"]
    losses = {}
    for scale in (0.1, 0.5, 1.0):
        pairs = [reference(place, scale, task, "val") for task in ("nli", "topic")]
        losses[scale] = sum(nn.functional.cross_entropy(*pair).item() for pair in pairs)
    trail = {scale: -value for scale, value in tuned["trail"]}
    assert {scale: trail[scale] for scale in losses} == pytest.approx(losses, rel=1e-4)
    assert trail[tuned["value"]] == min(trail.values())

    out = place / "out"
    assert json.loads((out / "results.json").read_text()) == document
    table = (out / "results.md").read_text()
    assert "| TA 0.4 |" in table
    assert "nli (acc ↑)" in table
    assert "Hits@1" in table
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert len(lines) == 12
    assert float(lines[0]["value"]) == found["zero_shot"][0]["metrics"]["nli"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {
        "normalised.png",
        "coefficients/nsc-seed0/coefficients.png",
        "coefficients/nsc-seed0/ratios.png",
    }
    assert names == {"results.json", "results.md", "results.csv", "rows.jsonl", *pictures}


def test_the_ensemble_and_the_joint_labels_by_hand(place):
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    ensemble = nsc_merge.merge(suite.model, suite.adapters, method="ensemble")
    mean = 0
    for task in ("nli", "topic"):
        with applied(suite.model, ensemble.for_task(task)) as model, torch.no_grad():
            mean = mean + torch.cat([suite.output("nli", model, inputs) for inputs, _ in suite.labelled("nli", "test")])
    torch.testing.assert_close(predict(suite, ensemble, "test")["nli"][0], mean / 2)

    summed = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.4)
    found = joint_hits(suite, summed, "test", ["nli", "topic"], "logits")
    right = []
    for offset, task in ((0, "nli"), (3, "topic")):
        with applied(suite.model, summed) as model, torch.no_grad():
            pairs = suite.labelled(task, "test")
            union = torch.cat(
                [torch.cat([suite.output(head, model, inputs) for head in ("nli", "topic")], 1) for inputs, _ in pairs]
            )
        labels = torch.cat([label for _, label in pairs]) + offset
        right.append((union.topk(3).indices == labels[:, None]).any(1).float())
        assert found[task][3] == pytest.approx(right[-1].mean().item())
    assert found["all"][3] == pytest.approx(torch.cat(right).mean().item())
    finetuned = nsc_merge.merge(suite.model, suite.adapters, method="finetuned")
    assert joint_hits(suite, finetuned, "test", ["nli", "topic"], "logits") is None


def test_applying_is_undone_to_the_bit_even_by_an_error(place):
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    before = {name: value.clone() for name, value in suite.model.state_dict().items()}
    result = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.7)
    with pytest.raises(RuntimeError, match="stop"), applied(suite.model, result):
        assert not torch.equal(
            suite.model.state_dict()["model.layers.0.self_attn.q_proj.weight"], next(iter(before.values()))
        )
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in suite.model.state_dict().items())


def test_saved_merges_of_every_kind_measure_alike(place, capsys):
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    model = type(build("llama-cls")).from_pretrained(place / "base")
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4)
    result.save(place / "merged", ["lora", "model"])
    result.save(place / "adapter", "lora")
    result.save(place / "whole", "model")
    result.save(place / "numbers", "coefficients")
    nsc_merge.merge(model, adapters, method="finetuned").save(place / "each", ["lora"])
    listed = ["merged", "merged/lora", "adapter", "whole", "numbers", "each"]
    methods = [{"method": "task_arithmetic", "name": "TA"}, *({"folder": one, "name": one} for one in listed)]
    change(place, methods=methods)
    assert main(["eval", str(place / "eval.yaml"), "--json"]) == 0
    found = rows(json.loads(capsys.readouterr().out))
    for name in listed:
        expected = found["finetuned" if name == "each" else "TA"][0]
        assert found[name][0]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert found[name][0]["folder"] == str(place / name)


@pytest.mark.parametrize("moved", [False, True])
def test_an_update_of_another_base_is_refused_where_its_record_tells(place, capsys, moved):
    """Of the same shapes, as tuned models of one family are; a copy of the base is the base."""
    kind = type(build("llama-cls"))
    other = kind.from_pretrained(place / "base")
    if moved:
        other = kind(type(other.config)(**{**other.config.to_dict(), "vocab_size": 120}))
    else:
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(place / "other")
    shutil.copytree(place / "base", place / "copy")
    adapters = {name: place / "adapters" / name for name in ("nli", "topic")}
    for base in ("other", "copy"):
        model = kind.from_pretrained(place / base)
        result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4)
        for form in ("lora", "model", "coefficients"):
            result.save(place / base / form, form)
        result.save(place / base / "several", ["lora", "model"])
        nsc_merge.merge(model, adapters, method="finetuned").save(place / base / "each", ["lora"])
    saved = [f"{base}/{form}" for base in ("other", "copy") for form in ("lora", "several", "several/lora", "each")]
    saved += ["other/coefficients"] * (not moved) + ["other/model", "copy/coefficients", "copy/model"]
    if moved:
        for file in (place / "other").glob("*.*"):
            file.unlink()
    capsys.readouterr()
    change(place, methods=[{"folder": one, "name": one} for one in saved], joint=False)
    assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 1
    lines = capsys.readouterr().err.splitlines()
    refused = {line.split(",")[0] for line in lines if f"is an update of {place / 'other'}, and model is" in line}
    assert refused == {one for one in saved if one.startswith("other") and one != "other/model"}
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert set(found) == {"zero_shot", "finetuned", *saved} - refused


def change(place, **values):
    recipe = yaml.safe_load((place / "eval.yaml").read_text())
    (place / "eval.yaml").write_text(yaml.safe_dump({**recipe, **values}))


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


@pytest.mark.parametrize(("by", "word"), [("loss", "loss"), ("metric", "scores 0 or less")])
def test_a_scale_is_not_chosen_where_there_is_nothing_to_choose_by(place, capsys, by, word):
    """A head whose outputs overflow has no loss at any scale."""
    for split in ("test", "val"):
        file = place / "data" / f"topic-{split}.safetensors"
        save_file({**load_file(file), "labels": torch.rand(12)}, file)
    save_file({"weight": torch.full((1, 32), 3e38)}, place / "value.safetensors")
    head = [f"tasks.topic.head={place / 'value.safetensors'}", "tasks.topic.pool=mean", "tasks.topic.metric=rmse"]
    change(place, methods=["task_arithmetic", {"method": "ties", "tune": by}], joint=False)
    assert main(["eval", str(place / "eval.yaml"), *head]) == 1
    shown = capsys.readouterr()
    assert "ties, seed 0: tune: " in shown.err
    assert word in shown.err
    assert "ties" not in shown.out


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


def test_methods_that_look_at_outputs_get_the_heads_of_their_tasks(place, capsys):
    """AdaMerging only those with classes; Fisher all, with a likelihood each."""
    file = place / "data" / "topic-test.safetensors"
    data = load_file(file)
    save_file({**data, "labels": torch.rand(12)}, file)
    save_file({**data, "labels": torch.rand(12)}, place / "data" / "topic-val.safetensors")
    save_file({"weight": torch.randn(1, 32)}, place / "value.safetensors")
    overrides = [
        "joint=false",
        "tasks.topic.metric=l1",
        f"tasks.topic.head={place / 'value.safetensors'}",
        "tasks.topic.pool=last",
    ]
    steps = {"steps": 2, "lr": 0.05}
    change(
        place,
        methods=[
            {"method": "adamerging", "options": steps},
            {"method": "fisher", "options": {"batches": 1}},
            {"method": "distill", "options": steps},
        ],
    )
    assert main(["eval", str(place / "eval.yaml"), *overrides, "--json"]) == 0
    assert list(rows(json.loads(capsys.readouterr().out))) == [
        "zero_shot",
        "finetuned",
        "adamerging",
        "fisher",
        "distill",
    ]
    suite_recipe = load_eval_recipe(place / "eval.yaml", overrides)
    suite = RecipeSuite(suite_recipe.at(0))
    found = {row.name: candidate_of(suite, suite_recipe.at(0), row, 0) for row in suite_recipe.rows}
    model = type(build("llama-cls")).from_pretrained(place / "base")
    adapters = {task: place / "adapters" / task for task in ("nli", "topic")}
    heads_given = {task: functools.partial(suite.output, task) for task in adapters}
    batches = suite.calibration()
    likelihood = {"nli": "categorical", "topic": "gaussian"}
    by_hand = {
        "adamerging": nsc_merge.merge(
            model, adapters, batches, "adamerging", outputs={"nli": heads_given["nli"]}, **steps
        ),
        "fisher": nsc_merge.merge(
            model, adapters, batches, "fisher", outputs=heads_given, likelihood=likelihood, batches=1
        ),
        "distill": nsc_merge.merge(
            model, adapters, batches, "distill", outputs=heads_given, likelihood=likelihood, **steps
        ),
    }
    for name, expected in by_hand.items():
        for path in expected.paths:
            torch.testing.assert_close(found[name].delta(path), expected.delta(path), rtol=1e-5, atol=1e-7)
    assert (place / "out" / "coefficients" / "adamerging-seed0" / "losses.png").is_file()


def test_a_row_that_fails_costs_no_other(place, capsys):
    lines = [
        "task_arithmetic",
        {"method": "task_arithmetic", "name": "odd", "options": {"scale": {"nli": 0.3}}},
    ]
    change(place, methods=lines)
    assert main(["eval", str(place / "eval.yaml"), "output.plots=false"]) == 1
    shown = capsys.readouterr()
    assert "odd, seed 0: scale: expected one value for each of ['nli', 'topic'], found ['nli']" in shown.err
    found = rows(json.loads((place / "out" / "results.json").read_text()))
    assert list(found) == ["zero_shot", "finetuned", "task_arithmetic"]


@pytest.mark.parametrize("kind", ["same file", "copy in another order", "part"])
def test_a_scale_is_not_chosen_on_the_data_that_are_reported(place, capsys, kind):
    test = load_file(place / "data" / "nli-test.safetensors")
    if kind == "same file":
        overrides = [f"tasks.nli.validation={place / 'data' / 'nli-test.safetensors'}"]
    else:
        order = torch.arange(12).flip(0) if kind == "copy in another order" else torch.arange(0, 12, 3)
        save_file({name: value[order] for name, value in test.items()}, place / "leak.safetensors")
        overrides = [f"tasks.nli.validation={place / 'leak.safetensors'}"]
    assert main(["eval", str(place / "eval.yaml"), *overrides]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tasks.nli.validation: tune needs data beside those that are measured" in line
    assert not (place / "out").exists()
    # Inputs without their labels are no tuning.
    assert main(["eval", str(place / "eval.yaml"), *overrides, "methods=[{method: nsc, options: {steps: 1}}]"]) == 0
    assert "test samples" not in capsys.readouterr().err


def test_samples_of_both_splits_are_told(place, capsys):
    test, val = (load_file(place / "data" / f"nli-{split}.safetensors") for split in ("test", "val"))
    both = {name: torch.cat([val[name][:6], test[name][:5]]) for name in test}
    save_file(both, place / "data" / "nli-val.safetensors")
    assert main(["eval", str(place / "eval.yaml"), "methods=[{method: task_arithmetic, tune: loss}]"]) == 0
    assert "tasks.nli: 5 of 12 test samples are in validation, too" in capsys.readouterr().err


def test_figures_without_a_number_are_null_in_json_and_empty_in_csv(place, capsys):
    """A fine-tuned score of 0 has no percentage, and the squares of large errors have no float32."""
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml").at(0))
    finetuned = nsc_merge.merge(suite.model, suite.adapters, method="finetuned")
    file = place / "data" / "nli-test.safetensors"
    wrong = (predict(suite, finetuned, "test")["nli"][0].argmax(-1) + 1) % 3
    save_file({**load_file(file), "labels": wrong}, file)
    file = place / "data" / "topic-test.safetensors"
    save_file({**load_file(file), "labels": torch.full((12,), 1e25)}, file)
    save_file({"weight": torch.ones(1, 32)}, place / "value.safetensors")
    head = [f"tasks.topic.head={place / 'value.safetensors'}", "tasks.topic.pool=mean", "tasks.topic.metric=rmse"]
    overrides = [*head, "joint=false", "methods=[task_arithmetic]"]
    assert main(["eval", str(place / "eval.yaml"), *overrides, "--json"]) == 0

    def refused(constant):
        raise AssertionError(f"{constant} is not JSON")

    for text in (capsys.readouterr().out, (place / "out" / "results.json").read_text()):
        (run,) = rows(json.loads(text, parse_constant=refused))["task_arithmetic"]
        assert run["metrics"]["topic"] is None
        assert run["normalised"]["nli"] is None
        assert run["average"] is None
    lines = list(csv.DictReader((place / "out" / "results.csv").open()))
    assert {(line["task"], line["value"], line["normalised"]) for line in lines if line["row"] == "finetuned"} == {
        ("nli", "0.0", ""),
        ("topic", "", ""),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=1"], "task: no such key; did you mean tasks?"),
        (["tasks=null"], "tasks: expected at least one task"),
        (["tasks.nli=3"], "tasks.nli: expected keys and values, found 3"),
        (["tasks.nli.metric=meteor"], "tasks.nli.metric: expected one of ['accuracy', 'miou', 'f1'"),
        (["tasks.nli.metric={name: accuracy, tolerance: 2}"], "tasks.nli.metric.tolerance: not an option"),
        (["tasks.nli.metric=cider"], "tasks.nli.generate: metric cider needs true, found false"),
        (["tasks.nli.generate=true"], "tasks.nli.metric: a task that generates has exact_match or one of ['cider'"),
        (["tasks.nli.adapter=nowhere"], "tasks.nli.adapter: expected a PEFT folder"),
        (["tasks.nli.test=nowhere"], "tasks.nli.test: expected a safetensors file or a folder of them"),
        (["tasks.nli.head=nowhere"], "tasks.nli.head: expected a safetensors file"),
        (["tasks.nli.pool=max"], "tasks.nli.pool: expected one of ['mean', 'first'"),
        (["tasks.nli.lables=y"], "tasks.nli.lables: no such key; did you mean tasks.nli.labels?"),
        (["methods=[]"], "methods: expected a list of methods or folders"),
        (["methods=[magic]"], "methods[0].method: expected one of"),
        (
            ["methods=[{method: nsc, options: {stepz: 1}}]"],
            "methods[0].options.stepz: not an option of method 'nsc'",
        ),
        (["methods=[{method: nsc, tune: loss}]"], "methods[0].tune: method 'nsc' has no scale to tune"),
        (
            ["methods=[{method: task_arithmetic, tune: labels}]"],
            "methods[0].tune.by: expected one of ['metric', 'loss']",
        ),
        (
            ["methods=[{method: task_arithmetic, tune: loss, options: {scale: 1}}]"],
            "options.scale is given, too",
        ),
        (["methods=[nsc, nsc]"], "methods: two rows are called 'nsc'"),
        (["methods=[{folder: nowhere}]"], "methods.nowhere.folder: expected a folder"),
        (["methods=[{folder: base, method: nsc}]"], "methods[0]: expected either a method or a folder"),
        (
            ["methods=[nsc]", "tasks.nli.validation=null"],
            "tasks.nli.calibration: methods[0] (nsc) needs inputs",
        ),
        (
            ["tasks.nli.validation=null"],
            "tasks.nli.validation: methods[1] (task_arithmetic) needs it, found none",
        ),
        (["joint=yes please"], "joint: expected one of ['logits', 'probabilities']"),
        (
            ["joint=logits", "tasks.nli.metric=exact_match"],
            "joint: expected at least two tasks of metric accuracy",
        ),
        (["seeds=3"], "seeds: expected a list of different whole numbers, found 3"),
        (["output.plots=maybe"], "output.plots: expected true or false"),
        (["output=null"], "output.dir: expected text"),
        (["model=nowhere"], "model: expected a folder or a hub id"),
    ],
)
def test_wrong_recipes_give_one_line_and_status_2(place, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(place)
    assert main(["eval", "eval.yaml", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no labels", "tasks.nli.test: expected a tensor 'labels'"),
        ("wrong input", "tasks.nli.test: LlamaForSequenceClassification takes no input ['pixels']"),
        ("float labels", "tasks.nli: labels: expected class indices as integers, found torch.float32"),
        ("other tokenizer", "tasks.nli.test: expected tokens below 64 in input_ids"),
        ("unknown labels", "tasks.nli: labels: expected at least one known label, found none"),
        ("no head", "tasks.nli.head: the adapter brought no head"),
        ("head of another width", "no pool"),
    ],
)
def test_data_that_do_not_fit_give_one_line_and_write_nothing(place, capsys, kind, message):
    file = place / "data" / "nli-test.safetensors"
    data = load_file(file)
    overrides = []
    if kind == "no labels":
        del data["labels"]
    elif kind == "wrong input":
        data["pixels"] = data.pop("attention_mask")
    elif kind == "float labels":
        data["labels"] = data["labels"].float()
    elif kind == "other tokenizer":
        data["input_ids"][3, 1] = 64
    elif kind == "unknown labels":
        data["labels"] = torch.full((12,), -100)
    elif kind == "no head":
        write_adapter(build("llama-cls"), place / "adapters" / "bare", 1, r=2, target_modules=["q_proj"])
        overrides = [f"tasks.nli.adapter={place / 'adapters' / 'bare'}", "tasks.nli.head=adapter"]
    else:
        overrides = ["tasks.nli.pool=first"]
    save_file(data, file)
    assert main(["eval", str(place / "eval.yaml"), "methods=[task_arithmetic]", *overrides]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nsc-merge: error: ")
    assert message in line
    assert not (place / "out" / "results.json").exists()


def test_dense_regression_and_generated_tasks_on_their_models(tmp_path, capsys):
    """Images by linear heads on features, captions by the model's own head."""
    vit = build("vit")
    vit.save_pretrained(tmp_path / "vit")
    write_adapter(vit, tmp_path / "depth", 1, r=2, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(0)
    pixels = KINDS["vit"].inputs(0)["pixel_values"]
    save_file(
        {"pixel_values": pixels, "depth": torch.rand(3, 8, 8, generator=generator)},
        tmp_path / "depth.safetensors",
    )
    save_file({"weight": torch.randn(16, 32, generator=generator)}, tmp_path / "head.safetensors")
    depth = {"adapter": "depth", "test": "depth.safetensors", "labels": "depth", "metric": "rmse"}
    recipe = {
        "model": "vit",
        "tasks": {"depth": {**depth, "head": "head.safetensors", "pool": "image"}},
        "methods": [{"method": "task_arithmetic", "options": {"scale": 0.5}}],
        "output": {"dir": "out-vit", "plots": False},
    }
    (tmp_path / "vit.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "vit.yaml"), "--json"]) == 0
    run = rows(json.loads(capsys.readouterr().out))["task_arithmetic"][0]
    model = copy.deepcopy(vit)
    nsc_merge.merge(model, {"depth": tmp_path / "depth"}, method="task_arithmetic", scale=0.5).apply(model)
    head = heads.read_head(tmp_path / "head.safetensors", model, "image", "head")
    with torch.no_grad():
        error = head(model, {"pixel_values": pixels})[..., 0] - load_file(tmp_path / "depth.safetensors")["depth"]
    assert run["metrics"]["depth"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)

    llama = build("llama")
    llama.save_pretrained(tmp_path / "llama")
    write_adapter(llama, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    tokens = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    result = nsc_merge.merge(llama, {"caption": tmp_path / "caption"}, method="finetuned")
    with applied(llama, result.for_task("caption")) as model:
        written = heads.GeneratingHead(3)(model, tokens)
    save_file({**tokens, "labels": written}, tmp_path / "caption.safetensors")
    task = {"adapter": "caption", "test": "caption.safetensors", "generate": True, "metric": "exact_match"}
    recipe = {
        "model": "llama",
        "tasks": {"caption": task, "tokens": {**task, "generate": False, "test": "tokens.safetensors"}},
        "methods": ["ensemble"],
        "output": {"dir": "out-llama", "plots": False},
    }
    labels = KINDS["llama"].inputs(0)["input_ids"].clone()
    save_file({**KINDS["llama"].inputs(0), "labels": labels}, tmp_path / "tokens.safetensors")
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "llama.yaml"), "--json", "tasks.tokens.metric=accuracy"]) == 1
    shown = capsys.readouterr()
    assert "ensemble, seed 0: ensemble: the outputs of caption are tokens, which have no mean" in shown.err
    found = rows(json.loads(shown.out))["finetuned"][0]["metrics"]
    assert found["caption"] == 1.0
    # A causal language model's own head says the next token.
    with applied(llama, result.for_task("caption")) as model, torch.no_grad():
        told = model(**KINDS["llama"].inputs(0)).logits[:, :-1].argmax(-1)
    assert found["tokens"] == pytest.approx((told == labels[:, 1:]).float().mean().item())

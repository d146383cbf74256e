"""The quality suites' machinery, on a ViT suite small enough to train here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsc_merge
from bench.quality import acceptance_ranges, ratios, report, run, summary
from bench.quality.controls import anti_nsc, oracle, shuffled
from bench.quality.rows import GRADIENT_FREE, ROWS, Row
from bench.quality.suite import Scores, Subset, building, evaluate, merged, predict, score
from bench.quality.suites import siglip, vit
from bench.quality.suites.kept_adapters import kept_adapters
from nsc_merge.demo import train
from nsc_merge.forwards import shared_forward
from nsc_merge.methods import METHODS

ROOT = Path(__file__).parents[2]
SETTINGS = vit.Settings(
    train_scenes=128,
    val_scenes=32,
    test_scenes=48,
    probe_scenes=64,
    probe_steps=20,
    steps=6,
    kept_steps=4,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def trained(work):
    lines: list[str] = []
    suite = vit.load(work, 0, log=lines.append, progress=False, settings=SETTINGS, permuted=("sal",))
    assert len(lines) == len(vit.TASKS) + 1
    return suite


@pytest.fixture(scope="module")
def bench(trained):
    return run.Bench(trained, progress=False)


def test_parts_are_trained_once(trained, work):
    lines: list[str] = []
    again = vit.load(work, 0, log=lines.append, settings=SETTINGS, permuted=("sal",))
    assert lines == []
    assert list(again.tasks) == list(trained.tasks) == list(vit.TASKS)
    assert {info.kind for info in trained.tasks.values()} == {"classification", "regression", "dense"}
    assert not list(work.rglob("*.part-*"))


def test_a_missing_part_is_trained_again_and_comes_out_the_same(trained, work, tmp_path):
    fresh = tmp_path / "vit" / "seed0" / "adapters"
    fresh.mkdir(parents=True)
    for name in vit.TASKS:
        if name != "angle":
            (fresh / name).symlink_to(work / "vit" / "seed0" / "adapters" / name)
    lines: list[str] = []
    again = vit.load(tmp_path, 0, log=lines.append, progress=False, settings=SETTINGS)
    assert len(lines) == 1
    first, second = (nsc_merge.load_adapter(suite.adapters["angle"], "angle").factors for suite in (trained, again))
    for path, factor in first.items():
        assert torch.equal(factor.A, second[path].A)
        assert torch.equal(factor.B, second[path].B)
    assert torch.equal(trained.heads["angle"].weight, again.heads["angle"].weight)


def test_seeds_differ(trained, tmp_path):
    only = tmp_path / "vit" / "seed1" / "adapters"
    only.mkdir(parents=True)
    for name in vit.TASKS:
        if name != "count":
            (only / name).symlink_to(trained.adapters[name].parent)
    other = vit.load(tmp_path, 1, log=lambda line: None, progress=False, settings=SETTINGS)
    one, two = (nsc_merge.load_adapter(suite.adapters["count"], "count").factors for suite in (trained, other))
    assert all(not torch.equal(one[path].A, two[path].A) for path in one)


def test_adapters_along_training_are_kept(trained, work):
    kept = kept_adapters(work, "vit", 0, "depth", "adapters")
    assert [entry["step"] for entry, _ in kept] == [0, 2, 4, 6]
    start = nsc_merge.load_adapter(kept[0][1], "depth").factors
    assert all(not factor.B.any() for factor in start.values())
    end = nsc_merge.load_adapter(kept[-1][1], "depth").factors
    final = nsc_merge.load_adapter(trained.adapters["depth"], "depth").factors
    assert all(torch.equal(end[path].B, final[path].B) and end[path].B.any() for path in final)
    # The curve is that of the model as it is measured elsewhere.
    alone = merged(trained, nsc_merge.merge(trained.model, trained.adapters, method="finetuned"))
    scores = evaluate(trained, alone, "val")
    assert kept[-1][0]["metric"] == pytest.approx(scores.metrics["depth"], rel=1e-4)
    assert kept_adapters(work, "vit", 0, "depth", "permuted") == []
    assert len(kept_adapters(work, "vit", 0, "sal", "permuted")) == 4


def test_the_suite_without_a_class_token_trains_its_own_base(tmp_path, monkeypatch):
    for name, value in (("_PRETRAIN_STEPS", 3), ("_PRETRAIN_SCENES", 64), ("_HELD_OUT", 16)):
        monkeypatch.setattr(train, name, value)
    few = replace(SETTINGS, probe_steps=2, steps=2, kept_steps=2)
    lines: list[str] = []
    suite = siglip.load(tmp_path, 0, log=lines.append, progress=False, settings=few)
    assert (len(lines), suite.name, len(suite.tasks)) == (1 + len(vit.TASKS), "siglip", 8)
    assert suite.model.config.model_type == "siglip_vision_model"
    assert not hasattr(suite.model.embeddings, "mask_token") or suite.model.embeddings.mask_token is None
    factors = nsc_merge.load_adapter(suite.adapters["depth"], "depth").factors
    assert {path.rsplit(".", 1)[-1] for path in factors} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    (inputs, _), *_ = suite.labelled("depth", "val")
    assert suite.output("depth", suite.model, inputs).shape == (32, 24, 24, 1)
    assert [entry["step"] for entry, _ in kept_adapters(tmp_path, "siglip", 0, "depth", "adapters")] == [0, 2]
    siglip.load(tmp_path, 0, log=lines.append, progress=False, settings=few)
    assert len(lines) == 1 + len(vit.TASKS)


def test_masked_patches_do_not_reach_the_model():
    tower = siglip.new_tower(0)
    masked = torch.zeros(2, 36, dtype=torch.bool)
    masked[:, 5] = True
    pixels = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[:, :, 0:4, 20:24] += 9
    with torch.no_grad():
        hidden = siglip.masked_features(tower, pixels, bool_masked_pos=masked)
        assert torch.equal(hidden, siglip.masked_features(tower, changed, bool_masked_pos=masked))
        shown = siglip.masked_features(tower, changed, bool_masked_pos=torch.zeros_like(masked))
    assert not torch.allclose(hidden, shown, atol=1e-2)


def test_labels_of_the_added_tasks(trained):
    (_, primary), *_ = trained.labelled("cls", "test")
    (_, count), *_ = trained.labelled("count", "test")
    (_, mask), *_ = trained.labelled("sal", "test")
    assert 0 <= primary.min() <= primary.max() <= 9
    assert mask.flatten(1).sum(1).min() > 0
    scenes = trained._scenes["test"]["shaded"]
    # What is seen of the primary digit is a digit of its class, and all there is where no other digit is shown.
    for digits, one, pixels in zip(scenes.digits, primary, mask.bool(), strict=True):
        assert (digits[pixels] == one + 1).all()
    alone = count == 0
    assert torch.equal(mask[alone].bool(), scenes.digits[alone] > 0)


@pytest.mark.parametrize("task", vit.TASKS)
def test_outputs_losses_and_measures_agree_in_shape(trained, task):
    (inputs, label), *_ = trained.labelled(task, "val")
    output = trained.output(task, trained.model, inputs)
    channels = vit.TASKS[task].channels
    assert output.shape == ((32, 24, 24, channels) if vit.TASKS[task].dense else (32, channels))
    assert trained.loss(task, output, label).shape == ()
    quality = trained.quality(task, output, label)
    assert quality.shape == (32,)
    if trained.tasks[task].metric in ("acc", "deg", "L1"):
        sign = -1 if trained.tasks[task].lower_is_better else 1
        assert quality.mean().item() == pytest.approx(sign * trained.measure(task, output, label), rel=1e-4)


def test_evaluation_is_that_of_every_task_by_itself(trained):
    model = merged(trained, nsc_merge.merge(trained.model, trained.adapters, method="task_arithmetic", scale=0.3))
    together = predict(trained, model, "test")
    for task in trained.tasks:
        with torch.no_grad():
            parts = [trained.output(task, model, inputs) for inputs, _ in trained.labelled(task, "test")]
        torch.testing.assert_close(together[task][0], torch.cat(parts))
    assert score(trained, together) == evaluate(trained, dict.fromkeys(trained.tasks, model), "test")


def test_shared_forward_runs_once_per_input_and_leaves_no_trace(trained):
    calls = []
    hook = trained.model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    try:
        with shared_forward(trained.model):
            for task in ("depth", "edge", "depth"):
                trained.output(task, trained.model, trained.labelled(task, "val")[0][0])
            assert "forward" in vars(trained.model)
            trained.output("count", trained.model, trained.labelled("count", "val")[0][0])
    finally:
        hook.remove()
    assert len(calls) == 2
    assert "forward" not in vars(trained.model)


def test_finetuned_is_a_hundred_percent(bench):
    record = bench.record(next(row for row in ROWS if row.name == "finetuned"))
    assert record["average"] == 100
    assert set(record["normalised"].values()) == {100.0}
    assert record["val_average"] == 100


def test_records_are_appended_once_and_kept_through_a_restart(trained, tmp_path):
    rows = [row for row in ROWS if row.name in ("zero_shot", "TA@1/K", "TA")]
    lines: list[str] = []
    added, failed = run.run(trained, rows[:2], tmp_path, log=lines.append)
    assert [record["row"] for record in added] == ["zero_shot", "TA@1/K"]
    assert failed == []
    added, _ = run.run(trained, rows, tmp_path, log=lines.append)
    assert [record["row"] for record in added] == ["TA"]
    assert added[0]["tuned"]["value"] in [scale for scale, _ in added[0]["tuned"]["trail"]]
    assert added[0]["tuned"]["value"] == pytest.approx(added[0]["coefficients"]["mean"])
    best = max(value for _, value in added[0]["tuned"]["trail"])
    assert added[0]["val_average"] == pytest.approx(best, abs=1e-3)
    before = (tmp_path / "vit.jsonl").read_text()
    assert run.run(trained, rows, tmp_path, log=lines.append) == ([], [])
    assert (tmp_path / "vit.jsonl").read_text() == before
    assert "all 3 rows are there" in lines[-1]
    again, _ = run.run(trained, rows[1:2], tmp_path, redo=True, log=lines.append)
    assert again[0]["metrics"] == run.read_records(tmp_path / "vit.jsonl")[1]["metrics"]
    assert len(run.read_records(tmp_path / "vit.jsonl")) == 3


def test_a_failing_row_does_not_stop_the_others(trained, tmp_path):
    broken = Row("broken", GRADIENT_FREE, "task_arithmetic", {"scale": float("nan")})
    lines: list[str] = []
    added, failed = run.run(trained, [broken, ROWS[0]], tmp_path, log=lines.append)
    assert (failed, [record["row"] for record in added]) == (["broken"], [ROWS[0].name])
    assert any("expected a finite number" in line for line in lines)


@pytest.mark.parametrize("row", [row for row in ROWS if row.method in METHODS], ids=lambda row: row.name)
def test_rows_have_options_that_their_methods_take(row):
    method = METHODS[row.method]
    method.check_names(row.options)
    method.options(**row.resolved(4))
    if row.tuned:
        assert (method.tuned, row.options["scale"]) == ("scale", 1.0)


def test_tuning_goes_on_beyond_the_grid(bench, monkeypatch):
    unscaled = nsc_merge.merge(bench.suite.model, bench.adapters, method="task_arithmetic", scale=1.0)
    monkeypatch.setattr(run, "merged", lambda suite, result: result.options["scale"])
    monkeypatch.setattr(run, "evaluate", lambda suite, scale, split: scale)
    monkeypatch.setattr(bench, "_quality", lambda scale, by: -abs(scale - 1.58))
    result, note = bench._tuned(unscaled, "metric")
    assert note["value"] == pytest.approx(1.58)
    assert result.options["scale"] == pytest.approx(1.58)


def test_subset_of_tasks(trained):
    subset = Subset(trained, ["count", "depth"])
    assert list(subset.tasks) == list(subset.adapters) == list(subset.calibration(4, 2)) == ["depth", "count"]
    record = run.Bench(subset, progress=False).record(ROWS[0])
    assert record["tasks"] == ["depth", "count"]
    with pytest.raises(ValueError, match="tasks: expected two or more"):
        Subset(trained, ["depth", "taste"])


def test_anti_nsc_mirrors_nsc(bench):
    options = {
        "lr": 1e-3,
        "steps": 1,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "init": 0.4,
        "progress": False,
    }
    calibration = bench.suite.calibration(8, 1)
    down = nsc_merge.merge(bench.suite.model, bench.adapters, calibration, method="nsc", **options)
    up = anti_nsc(bench.suite, bench.adapters, calibration, **options)
    assert up.history[0]["objective"] == down.history[0]["objective"]
    assert up.dead == down.dead != {}
    for path, row in down.coefficients.items():
        for task, value in row.items():
            assert up.coefficients[path][task] - 0.4 == pytest.approx(0.4 - value, abs=1e-6)
    assert bench.suite.model.state_dict().keys() == merged(bench.suite, up).state_dict().keys()


def test_shuffling_keeps_the_changes_and_loses_their_places(bench):
    calibration = bench.suite.calibration(8, 2)
    found = nsc_merge.merge(bench.suite.model, bench.adapters, calibration, method="nsc", steps=2, progress=False)
    mixed = shuffled(found, 0, 0)

    def values(result):
        return [value for row in result.coefficients.values() for value in row.values()]

    assert sorted(values(mixed)) == pytest.approx(sorted(values(found)))
    assert values(mixed) != pytest.approx(values(found))
    assert values(shuffled(found, 0, 0)) == values(mixed) != values(shuffled(found, 1, 0))


def test_the_oracle_lowers_the_labelled_loss(bench):
    learnt = oracle(bench.suite, bench.adapters, {}, steps=15, progress=False)
    start = nsc_merge.merge(bench.suite.model, bench.adapters, method="task_arithmetic", scale=0.4)
    reference = bench.reference["val"]
    before, after = (
        evaluate(bench.suite, merged(bench.suite, result), "val").relative_loss(reference) for result in (start, learnt)
    )
    assert after < before
    assert before == pytest.approx(learnt.history[0]["objective"], rel=1e-3)


def test_ratios_along_training_start_at_that_of_random_factors(trained, work):
    record = ratios.training_record(trained, work, "edge", "adapters")
    assert record["steps"][0]["all"] == pytest.approx(record["random"], abs=0.01)
    assert [entry["step"] for entry in record["steps"]] == [0, 2, 4, 6]
    assert record["steps"][-1]["all"] < record["steps"][0]["all"]


def test_a_seed_measured_again_replaces_its_own_lines_only(tmp_path):
    path = tmp_path / "ratios.jsonl"
    ratios.replace_seeds(path, [{"seed": 0, "rho": 1}, {"seed": 1, "rho": 2}, {"seed": 1, "rho": 3}], [0, 1])
    ratios.replace_seeds(path, [{"seed": 0, "rho": 4}], [0])
    assert [json.loads(line)["rho"] for line in path.read_text().splitlines()] == [4, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["ratios.jsonl"]


def test_samples_are_related_to_their_quality(trained):
    records = ratios.sample_records(Subset(trained, ["depth", "cls"]))
    assert [(record["task"], record["model"]) for record in records] == [
        (task, model) for model in ("finetuned", "TA@0.4") for task in ("depth", "cls")
    ]
    for record in records:
        assert record["samples"] == 48
        assert -1 <= record["rho"]["all"] <= 1
        assert len(record["quality_by_quartile"]["target"]) == 4


def test_normalised_scores_follow_the_direction_of_the_metric(trained):
    ours = Scores({"depth": 0.2, "cls": 0.3}, {})
    reference = Scores({"depth": 0.1, "cls": 0.6}, {})
    assert ours.normalised(trained, reference) == {"depth": 50.0, "cls": 50.0}
    assert replace(ours, metrics={"depth": 0.1, "cls": 0.9}).average(trained, reference) == pytest.approx(125)


def test_report_holds_what_was_measured(trained, tmp_path, capsys):
    rows = [row for row in ROWS if row.name in ("zero_shot", "finetuned", "TA@1/K", "TA@0.4")]
    run.run(trained, rows, tmp_path, log=lambda line: None)
    found = run.read_records(tmp_path / "vit.jsonl")
    assert report.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for record in found:
        assert f"**{record['average']:.2f}**" in printed
    assert "outside" in printed
    assert report.main(["--results", str(tmp_path), "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)[0]["sections"]
    assert any(section["title"] == "vit, K = 8" for section in sections)
    assert report.main(["--results", str(tmp_path / "nowhere")]) == 1


def test_the_summary_sets_suites_side_by_side(tmp_path, capsys):
    def write(suite, tasks, averages):
        lines = [
            json.dumps({"suite": suite, "seed": seed, "tasks": tasks, "row": row, "average": average})
            for row, values in averages.items()
            for seed, average in enumerate(values)
        ]
        (tmp_path / f"{suite}.jsonl").write_text("\n".join(lines) + "\n")

    assert summary.main(["--results", str(tmp_path)]) == 1
    write("vit", ["a", "b", "c"], {"TA@0.4": [70, 72], "TIES": [75, 71], "NSC": [71, 70]})
    write("llava", ["d", "e"], {"TA@0.4": [40], "NSC": [39, 38]})
    capsys.readouterr()
    assert summary.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "| | ViT, K = 3 | LLaVA, K = 2 |" in printed
    assert "| TA@0.4 | 71.0 ± 1.4 | 40.0 (1 seed) |" in printed
    assert "| TIES | 73.0 ± 2.8 |  |" in printed
    assert "| NSC | +1.0 / -2.0 | -1.0 |" in printed
    assert "| NSC - best gradient-free row of the seed | -4.0 / -2.0 | -1.0 |" in printed


def test_checks_say_inside_and_outside():
    def record(row, seed, average):
        moved = {"mean": 0.4, "min": 0.3, "max": 0.5, "moved": 0.083, "dead": 0.03125}
        return {
            "row": row,
            "tasks": list(vit.TASKS),
            "seed": seed,
            "average": average,
            "tuned": None,
            "coefficients": moved,
            "objective": {"first": 0.92, "last": 0.912},
        }

    measured = [
        record("NSC", 0, 69.0),
        record("TA@0.4", 0, 71.0),
        record("NSC", 1, 60.0),
        record("TA@0.4", 1, 71.5),
    ]
    found = {check["what"]: check for check in acceptance_ranges.vit_checks(measured, [], [])}
    assert found["K=8: NSC - TA@0.4"]["values"] == [-2.0, -11.5]
    assert not found["K=8: NSC - TA@0.4"]["inside"]
    assert found["TA@0.4: average, mean over seeds"]["inside"]
    assert found["NSC: fall of the objective"]["inside"]
    # What was not measured is not judged.
    assert "oracle: average, mean over seeds" not in found


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"), building(tmp_path / "part") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []
    with building(tmp_path / "part") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "whole"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--list"], 0, "TA@1/K"),
        (["--help"], 0, "--train-only"),
        (["--methods", "nonsense"], 2, "no row matches 'nonsense'"),
        (["--suite", "words"], 2, "invalid choice"),
    ],
)
def test_command_line(capsys, arguments, status, message):
    try:
        found = run.main(arguments)
    except SystemExit as leaving:
        found = leaving.code
    printed = capsys.readouterr()
    assert (found, message in printed.out + printed.err) == (status, True), printed


def test_run_is_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "bench.quality.run", "--list"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "oracle" in done.stdout

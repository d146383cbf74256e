"""How rows are merged, tuned, measured and recorded, and the controls, on a small ViT suite."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace

import pytest
import torch

import nsc_merge
from bench.quality import measuring, run
from bench.quality.controls import CONTROLS, oracle, shuffled
from bench.quality.records import read_records
from bench.quality.rows import GRADIENT_FREE, ROWS, Row
from bench.quality.suite import Subset, average, evaluate, normalised
from nsc_merge.evaluation.normalise import Scores
from nsc_merge.evaluation.scoring import predict, score
from nsc_merge.methods import METHODS


def test_evaluation_is_that_of_every_task_by_itself(trained):
    result = nsc_merge.merge(trained.model, trained.adapters, method="task_arithmetic", scale=0.3)
    together = predict(trained, result, "test", share=True)
    model = result.apply(copy.deepcopy(trained.model))
    for task, (alone, _) in predict(trained, result, "test").items():
        assert torch.equal(together[task][0], alone)
        with torch.no_grad():
            parts = [trained.output(task, model, inputs) for inputs, _ in trained.labelled(task, "test")]
        torch.testing.assert_close(together[task][0], torch.cat(parts))
    assert score(trained, together) == evaluate(trained, dict.fromkeys(trained.tasks, model), "test")


def test_evaluation_runs_the_model_once_per_input(trained):
    result = nsc_merge.merge(trained.model, trained.adapters, method="task_arithmetic", scale=0.3)
    calls = []
    hook = trained.model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    try:
        evaluate(trained, result, "test")
    finally:
        hook.remove()
    # Eight tasks on two kinds of scenes, each of one batch.
    assert len(calls) == 2


def test_normalised_scores_follow_the_direction_of_the_metric(trained):
    ours = Scores({"depth": 0.2, "cls": 0.3}, {})
    reference = Scores({"depth": 0.1, "cls": 0.6}, {})
    assert normalised(trained, ours, reference) == {"depth": 50.0, "cls": 50.0}
    assert average(trained, replace(ours, metrics={"depth": 0.1, "cls": 0.9}), reference) == pytest.approx(125)


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
    assert again[0]["metrics"] == read_records(tmp_path / "vit.jsonl")[1]["metrics"]
    assert len(read_records(tmp_path / "vit.jsonl")) == 3


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
    method.options(**row.resolved(4, 8))
    if row.tuned:
        assert (method.tuned, row.options["scale"]) == ("scale", 1.0)


@pytest.mark.parametrize("best", [1.58, 3.04, 7.5])
def test_tuning_goes_on_beyond_the_grid(bench, monkeypatch, best):
    unscaled = nsc_merge.merge(bench.suite.model, bench.adapters, method="task_arithmetic", scale=1.0)
    monkeypatch.setattr(measuring, "evaluate", lambda suite, result, split: result.options["scale"])
    monkeypatch.setattr(bench, "_quality", lambda scale, by: -abs(scale - best))
    result, note = bench._tuned(unscaled, "metric")
    assert note["value"] == pytest.approx(best)
    assert result.options["scale"] == pytest.approx(best)


def test_subset_of_tasks(trained):
    subset = Subset(trained, ["count", "depth"])
    assert list(subset.tasks) == list(subset.adapters) == list(subset.calibration(4, 2)) == ["depth", "count"]
    record = measuring.Bench(subset, progress=False).record(ROWS[0])
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
    up = CONTROLS["anti_nsc"](bench.suite, bench.adapters, calibration, **options)
    assert up.history[0]["objective"] == down.history[0]["objective"]
    assert up.dead == down.dead != {}
    for path, row in down.coefficients.items():
        for task, value in row.items():
            assert up.coefficients[path][task] - 0.4 == pytest.approx(0.4 - value, abs=1e-6)
    assert bench.suite.model.state_dict().keys() == up.apply(copy.deepcopy(bench.suite.model)).state_dict().keys()


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
    reference = bench.reference["val"].losses
    before, after = (
        statistics.mean(loss / reference[task] for task, loss in evaluate(bench.suite, result, "val").losses.items())
        for result in (start, learnt)
    )
    assert after < before
    assert before == pytest.approx(learnt.history[0]["objective"], rel=1e-3)

"""Ratios, tables, acceptance checks and command lines of the quality benchmarks."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
from matplotlib.axes import Axes

from bench.quality import acceptance_ranges, picture, ratios, report, run, summary
from bench.quality.records import append_record, read_records
from bench.quality.rows import ROWS
from bench.quality.suite import Subset
from bench.quality.suites import vit


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


def test_a_line_cut_short_costs_itself_alone(tmp_path):
    """An interrupted run goes on where it was."""
    path = tmp_path / "vit.jsonl"
    record = {"suite": "vit", "seed": 0, "tasks": ["a"], "average": 1.0}
    for row in ("first", "second"):
        append_record(path, {**record, "row": row})
    path.write_bytes(path.read_bytes()[:-20])
    assert [found["row"] for found in read_records(path)] == ["first"]
    for row in ("second", "third"):
        append_record(path, {**record, "row": row})
    assert [found["row"] for found in read_records(path)] == ["first", "second", "third"]


def test_samples_are_related_to_their_quality(trained):
    records = ratios.sample_records(Subset(trained, ["depth", "cls"]))
    assert [(record["task"], record["model"]) for record in records] == [
        (task, model) for model in ("finetuned", "TA@0.4") for task in ("depth", "cls")
    ]
    for record in records:
        assert record["samples"] == 48
        assert -1 <= record["rho"]["all"] <= 1
        assert len(record["quality_by_quartile"]["target"]) == 4


def test_report_holds_what_was_measured(trained, tmp_path, capsys):
    rows = [row for row in ROWS if row.name in ("zero_shot", "finetuned", "TA@1/K", "TA@0.4")]
    run.run(trained, rows, tmp_path, log=lambda line: None)
    found = read_records(tmp_path / "vit.jsonl")
    assert report.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for record in found:
        assert f"**{record['average']:.2f}**" in printed
    assert "outside" in printed
    assert report.main(["--results", str(tmp_path), "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)[0]["sections"]
    assert any(section["title"] == "vit, K = 8" for section in sections)
    assert report.main(["--results", str(tmp_path / "nowhere")]) == 1


def write(folder, suite, tasks, averages):
    lines = [
        json.dumps({"suite": suite, "seed": seed, "tasks": tasks, "row": row, "average": average})
        for row, values in averages.items()
        for seed, average in enumerate(values)
    ]
    (folder / f"{suite}.jsonl").write_text("\n".join(lines) + "\n")


def test_the_picture_shows_what_every_seed_gains(tmp_path, capsys, monkeypatch):
    assert picture.main(["--results", str(tmp_path)]) == 1
    write(tmp_path, "llava", ["d", "e"], {"NSC": [39, 38]})
    assert picture.main(["--results", str(tmp_path)]) == 1
    assert "holds no row 'TA'; run.py makes it" in capsys.readouterr().err
    write(tmp_path, "vit", ["a", "b", "c"], {"TA": [70, 72], "oracle": [75, 79], "NSC": [71, 70, 90], "svd": [1]})
    drawn = {}
    scatter = Axes.scatter

    def watched(axis, x, y, **options):
        drawn[axis.get_title(), y[0]] = x, options["facecolors"] == "none"
        return scatter(axis, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", watched)
    assert picture.main(["--results", str(tmp_path)]) == 0
    # A seed without its reference is not shown, nor a suite without any.
    assert drawn == {("ViT, K = 3", 0): ([5, 7], True), ("ViT, K = 3", 1): ([1, -2], False)}
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    # What is measured on adapters trained anew is over their own reference, and takes the place of nothing.
    (tmp_path / "bounded").mkdir()
    write(tmp_path / "bounded", "vit", ["a", "b", "c"], {"TA": [60, 61], "distill regmean": [65, 67], "NSC": [0]})
    drawn.clear()
    assert picture.main(["--results", str(tmp_path)]) == 0
    assert [gains for gains, _ in drawn.values()] == [[5, 7], [5, 6], [1, -2]]


def test_the_summary_sets_suites_side_by_side(tmp_path, capsys):
    assert summary.main(["--results", str(tmp_path)]) == 1
    write(tmp_path, "vit", ["a", "b", "c"], {"TA@0.4": [70, 72], "TIES": [75, 71], "NSC": [71, 70]})
    write(tmp_path, "llava", ["d", "e"], {"TA@0.4": [40], "NSC": [39, 38]})
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


def test_run_is_a_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--list"])
    monkeypatch.delitem(sys.modules, "bench.quality.run")
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("bench.quality.run", run_name="__main__")
    assert not leaving.value.code
    assert "oracle" in capsys.readouterr().out

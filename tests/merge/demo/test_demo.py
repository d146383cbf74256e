"""The demo: its scenes, its shipped parts, and the command end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from safetensors import safe_open

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.demo import evaluate, train
from nsc_merge.demo import tasks as demo_tasks
from nsc_merge.demo.data import SCENES, SPLITS, digit_images, digit_split, make_scenes
from nsc_merge.demo.evaluate import distilled_outputs, load_bundle
from nsc_merge.demo.model import patch_features
from nsc_merge.demo.report import advice, render, verdict
from nsc_merge.demo.run import run_demo, shipped_assets
from nsc_merge.demo.tasks import TASKS


def command(*arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nsc_merge.commands.main", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", **changes},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_digit_splits_are_disjoint_and_complete():
    split = {name: set(rows.tolist()) for name, rows in digit_split().items()}
    assert [len(split[name]) for name in SPLITS] == [1000, 300, 497]
    assert set.union(*split.values()) == set(range(len(digit_images()[0])))


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_are_deterministic_and_well_formed(scene):
    first, second, other = (make_scenes(64, "test", scene, seed) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, second.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    assert first.pixels.shape == (64, 1, 24, 24)
    assert set(first.labels) == set(TASKS)
    for name, label in first.labels.items():
        assert torch.equal(label, second.labels[name])
    labels = first.labels
    assert set(labels["count"].tolist()) == {0, 1, 2, 3}
    assert labels["angle"].abs().max() <= 1
    torch.testing.assert_close(labels["normal"].norm(dim=1), torch.ones(64, 24, 24))
    # Segmentation and depth describe the same pixels: background is farthest.
    assert torch.equal(labels["semseg"] == 0, labels["depth"] == 1)
    assert torch.equal(labels["semseg"] == 0, first.digits == 0)


def test_bad_scene_arguments_are_refused():
    with pytest.raises(ValueError, match="split: expected one of"):
        make_scenes(1, "validation", "photo", 0)
    with pytest.raises(ValueError, match="scene: expected one of"):
        make_scenes(1, "val", "night", 0)


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_prediction_measures_as_perfect(name):
    task = TASKS[name]
    label = make_scenes(32, "test", task.scene, 1).labels[name]
    if name in ("semseg", "count"):
        perfect = torch.nn.functional.one_hot(label, task.channels).movedim(-1, 1).float()
        assert demo_tasks.measure(task, perfect, label) == 1.0
    else:
        perfect = label if name == "normal" else label[:, None]
        assert demo_tasks.measure(task, perfect, label) == pytest.approx(0.0, abs=0.05)
    assert demo_tasks.normalised(task, 2.0, 1.0) == (50.0 if task.lower_is_better else 200.0)


def test_shipped_parts_are_small_half_precision_safetensors():
    assets = shipped_assets()
    stored = [path for path in assets.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in stored) < 1.3e6
    assert {path.suffix for path in stored} == {".json", ".safetensors"}
    for path in assets.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    for name in TASKS:
        assert len(nsc_merge.load_adapter(assets / "adapters" / name, name).factors) == 32


def test_demo_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "VALIDATION_SCENES", 64)
    monkeypatch.setattr(evaluate, "TEST_SCENES", 128)
    monkeypatch.setattr(evaluate, "COARSE_SCALES", (0.3, 0.6))
    assert main(["demo", "--tasks", "depth,edge", "--steps", "2", "--json"]) == 0
    done = capsys.readouterr()
    summary = json.loads(done.out)
    out = Path("nsc-demo")
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in ("coefficients.json", "history.jsonl", "coefficients.png", "ratios.png", "predictions.png"):
        assert (out / name).stat().st_size > 0
    assert len((out / "history.jsonl").read_text().splitlines()) == 2
    merged = nsc_merge.load_adapter(out / "merged-adapter", "merged")
    assert {factor.rank for factor in merged.factors.values()} == {16}
    assert summary["methods"]["alone"]["average"] == pytest.approx(100.0)
    # The adapters are real: each is far better than the base on its task.
    assert summary["methods"]["zero_shot"]["average"] < 80
    assert summary["dead"] == {"layers.7.attention.o_proj": ["depth", "edge"]}
    assert list(summary["methods"])[-3:] == list(summary["minus_tuned"]) == ["nsc", "match", "distill"]
    averages = {name: method["average"] for name, method in summary["methods"].items()}
    for name, gap in summary["minus_tuned"].items():
        assert gap["points"] == pytest.approx(averages[name] - averages["task_arithmetic_tuned"])
        assert gap["error"] > 0
    assert summary["matching_steps"] == 2
    for stage in ("NSC merging", "feature matching", "distillation"):
        assert f"{stage}: 2/2" in done.err
    assert "\r" not in done.err
    table = render(summary)
    assert max(len(line) for line in table.splitlines() if str(out) not in line) <= 80
    assert summary["verdict"].split()[0] in table
    for words in summary["advice"].values():
        assert " ".join(words.split()) in " ".join(table.split())


def test_the_summary_names_the_pictures_that_are_there(tmp_path, monkeypatch):
    """Of tasks without maps there is none of predictions, and one that is cut short takes no other's place."""
    monkeypatch.setattr(evaluate, "VALIDATION_SCENES", 32)
    monkeypatch.setattr(evaluate, "TEST_SCENES", 64)
    monkeypatch.setattr(evaluate, "COARSE_SCALES", (0.3,))
    settings = {"tasks": ["count", "angle"], "steps": 1, "progress": False, "log": lambda line: None}
    files = run_demo(tmp_path, **settings)["files"]["plots"]
    assert [Path(file).name for file in files] == ["coefficients.png", "ratios.png"]
    assert sorted(map(str, tmp_path.glob("*.png"))) == files

    def there():
        return {file: file.read_bytes() for file in tmp_path.glob("*.png")}

    before = there()

    def full(figure, file, **_options):
        file.write(b"half")
        # Nor does a process that is killed here leave anything.
        assert there() == before
        raise OSError("no room")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="no room"):
        run_demo(tmp_path, **settings)
    assert there() == before


def test_retrain_writes_parts_that_the_demo_can_load(tmp_path, monkeypatch):
    for name, value in (
        ("_PRETRAIN_SCENES", 64),
        ("_PRETRAIN_STEPS", 3),
        ("_TRAIN_SCENES", 64),
        ("_PROBE_STEPS", 2),
        ("_PROBE_SCENES", 32),
        ("_ADAPTER_STEPS", 3),
        ("_HELD_OUT", 16),
    ):
        monkeypatch.setattr(train, name, value)
    lines: list[str] = []
    train.retrain(tmp_path, log=lines.append, progress=False)
    assert len(lines) == 1 + len(TASKS)
    bundle = load_bundle(tmp_path, list(TASKS))
    assert all(len(adapter.factors) == 32 for adapter in bundle.adapters.values())
    layout, shipped = (
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path, shipped_assets())
    )
    assert layout == shipped
    train.retrain(tmp_path, log=lines.append, progress=False)
    assert all("already there" in line for line in lines[1 + len(TASKS) :])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "--steps", "0"], 2, "--steps"),
        (["demo", "--tasks", "depth"], 2, "error: --tasks: expected two or more"),
        (["demo", "--tasks", "depth,taste"], 2, "error: --tasks: expected two or more"),
        (["demo", "--retrain"], 2, "error: --retrain: say where to write"),
        (["demo", "--assets", "nowhere"], 1, "error: assets: nowhere holds no base/model.safetensors"),
        (["cook"], 2, "invalid choice"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(arguments)
    except SystemExit as leaving:
        found = leaving.code
    error = capsys.readouterr().err
    assert (found, message in error) == (status, True), error
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "nsc-merge demo" in done.stdout


@pytest.mark.parametrize(
    ("tuned", "start", "words"),
    [
        ((2.0, 0.5), (2.0, 0.5), "beats a single coefficient"),
        ((0.4, 0.5), (2.0, 0.5), "matches a single coefficient"),
        ((-2.0, 0.5), (2.0, 0.5), "improves on its start, but"),
        ((-2.0, 0.5), (-0.1, 0.5), "does not help"),
    ],
)
def test_verdict_follows_the_numbers(tuned, start, words):
    gaps = {
        "task_arithmetic_tuned": tuned,
        "task_arithmetic_start": start,
        "task_arithmetic_uniform": (0.0, 0.5),
    }
    assert words in verdict(80.0, gaps)


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ((5.1, 0.7), "5.1 ± 0.7 points above tuned TA here"),
        ((-3.5, 0.5), "3.5 ± 0.5 points below tuned TA here"),
        ((-0.9, 0.5), "level with (-0.9 ± 0.5) tuned TA here"),
    ],
)
def test_advice_follows_the_numbers(gap, words):
    said = advice({"nsc": (-9.0, 0.1), "match": (0.0, 1.0), "distill": gap})
    assert list(said) == ["distill", "match", "nsc", "task_arithmetic_tuned"]
    assert said["distill"].startswith(f"unlabelled inputs and the tasks' heads: {words}; ")
    assert "9.0 ± 0.1 points below" in said["nsc"]
    assert "level with (+0.0 ± 1.0)" in said["match"]


def test_distillation_is_told_what_the_heads_predict():
    bundle = load_bundle(shipped_assets(), ["normal", "semseg", "count"])
    given = distilled_outputs(bundle)
    assert given["likelihood"] == {"normal": "gaussian", "semseg": "categorical", "count": "categorical"}
    pixels = make_scenes(3, "val", "photo", 5).pixels
    with torch.no_grad():
        for name, head in bundle.heads.items():
            found = given["outputs"][name](bundle.backbone, {"pixel_values": pixels})
            wanted = head(patch_features(bundle.backbone, pixels))
            assert torch.equal(found, wanted.permute(0, 2, 3, 1) if TASKS[name].dense else wanted)

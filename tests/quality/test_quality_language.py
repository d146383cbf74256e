"""The language and vision-language suites, small enough to train here."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from quality_cases import PICTURES, TEXT
from safetensors.torch import load_file

import nsc_merge
from bench.quality import ratios
from bench.quality.suite import evaluate
from bench.quality.suites import llama, llava
from bench.quality.suites.kept_adapters import kept_adapters

SUITES = {"llama": (llama, TEXT), "llava": (llava, PICTURES)}


@pytest.fixture(scope="module")
def work(language_work):
    return language_work


@pytest.fixture(scope="module", params=SUITES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def trained(work, name):
    module, settings = SUITES[name]
    lines: list[str] = []
    suite = module.load(work, 0, log=lines.append, progress=False, settings=settings, permuted=module.PERMUTED[:1])
    assert sum("adapters:" in line for line in lines) == len(module.TASKS)
    assert sum("permuted:" in line for line in lines) == 1
    return suite


def linked(work: Path, target: Path, suite: str, tasks) -> None:
    """The base and the adapters of ``tasks`` as another work folder has them."""
    adapters = target / suite / "seed0" / "adapters"
    adapters.mkdir(parents=True)
    for part in ("base", "corpus"):
        if (work / suite / part).is_dir():
            (target / suite / part).symlink_to(work / suite / part)
    for task in tasks:
        (adapters / task).symlink_to(work / suite / "seed0" / "adapters" / task)


def test_parts_are_trained_once(trained, work, name):
    module, settings = SUITES[name]
    lines: list[str] = []
    again = module.load(work, 0, log=lines.append, settings=settings, permuted=module.PERMUTED[:1])
    assert lines == []
    assert list(again.tasks) == list(trained.tasks) == list(module.TASKS)
    assert again.name == name
    assert not list(work.rglob(".*"))
    assert not trained.model.training
    assert {value.dtype for value in trained.model.parameters()} == {torch.float32}


def test_a_missing_adapter_is_trained_again_and_comes_out_the_same(trained, work, name, tmp_path):
    module, settings = SUITES[name]
    *others, last = module.TASKS
    linked(work, tmp_path, name, others)
    lines: list[str] = []
    again = module.load(tmp_path, 0, log=lines.append, progress=False, settings=settings)
    assert len(lines) == 1
    for file in trained.adapters[last].parent.rglob("*.safetensors"):
        stored = load_file(file)
        fresh = load_file(again.adapters[last].parent / file.relative_to(trained.adapters[last].parent))
        assert stored.keys() == fresh.keys()
        assert all(torch.equal(value, fresh[key]) for key, value in stored.items())
    config = (trained.adapters[last] / "adapter_config.json").read_bytes()
    assert config == (again.adapters[last] / "adapter_config.json").read_bytes()


def test_seeds_and_permuted_labels_give_other_adapters(trained, work, name, tmp_path):
    module, settings = SUITES[name]
    task = module.PERMUTED[0]
    # Only one adapter of the other seed is trained here.
    linked(work, tmp_path, name, [])
    (tmp_path / name / "seed0").rename(tmp_path / name / "seed1")
    for other in module.TASKS:
        if other != task:
            (tmp_path / name / "seed1" / "adapters" / other).symlink_to(trained.adapters[other].parent)
    seeded = module.load(tmp_path, 1, log=lambda line: None, progress=False, settings=settings)
    one, two = (nsc_merge.load_adapter(suite.adapters[task], task).factors for suite in (trained, seeded))
    low_rank = [path for path, factor in one.items() if factor.rank]
    assert all(not torch.equal(one[path].A, two[path].A) for path in low_rank)
    permuted = work / name / "seed0" / "permuted" / task / "adapter"
    other = nsc_merge.load_adapter(permuted, task).factors
    assert any(not torch.equal(one[path].B, other[path].B) for path in low_rank)


def test_adapters_along_training_are_kept(trained, work, name):
    module, settings = SUITES[name]
    task = module.PERMUTED[0]
    for kind in ("adapters", "permuted"):
        kept = kept_adapters(work, name, 0, task, kind)
        assert [entry["step"] for entry, _ in kept] == list(range(settings.steps + 1))
        start, end = (nsc_merge.load_adapter(kept[at][1], task).factors for at in (0, -1))
        final = nsc_merge.load_adapter(work / name / "seed0" / kind / task / "adapter", task).factors
        low_rank = [path for path, factor in final.items() if factor.rank]
        assert not any(start[path].B.any() for path in low_rank)
        assert all(torch.equal(end[path].B, final[path].B) for path in low_rank)
    # The curve is that of the model as it is measured elsewhere.
    alone = nsc_merge.merge(trained.model, trained.adapters, method="finetuned")
    scores = evaluate(trained, alone, "val")
    last, _ = kept_adapters(work, name, 0, task, "adapters")[-1]
    assert last["metric"] == pytest.approx(scores.metrics[task], rel=1e-4)
    assert last["loss"] == pytest.approx(scores.losses[task], rel=1e-4)
    record = ratios.training_record(trained, work, task, "adapters")
    assert record["steps"][0]["all"] == pytest.approx(record["random"], abs=0.02)


def test_samples_are_related_to_their_quality(trained):
    records = ratios.sample_records(trained)
    assert [(record["model"], record["task"]) for record in records] == [
        (model, task) for model in ("finetuned", "TA@0.4") for task in trained.tasks
    ]
    for record in records:
        assert record["samples"] == 40
        assert record["rho"].keys() == {"all", "target"}


def test_adapters_are_peft_folders_of_rank_8_on_q_and_v(trained, name):
    for task, folder in trained.adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 8, None)
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        adapter = nsc_merge.load_adapter(folder, task)
        low_rank = {path for path, factor in adapter.factors.items() if factor.rank}
        assert {path.rsplit(".", 1)[-1] for path in low_rank} == {"q_proj", "v_proj"}
        assert len(low_rank) == 12
        assert all(adapter.factors[path].B.any() for path in low_rank)
        assert not any("vision" in path for path in (*low_rank, *adapter.trained))
        # A head stays with its task; only the projector is shared.
        projector = {path for path in adapter.trained if "multi_modal_projector" in path}
        assert set(adapter.trained) == projector
        assert bool(projector) == (name == "llava")


def test_outputs_losses_and_measures_agree(trained):
    for task, info in trained.tasks.items():
        (inputs, labels), *_ = trained.labelled(task, "test")
        with torch.no_grad():
            output = trained.output(task, trained.model, inputs)
        loss = trained.loss(task, output, labels)
        assert loss.shape == ()
        assert loss.isfinite()
        quality = trained.quality(task, output, labels)
        assert quality.shape == (len(labels),)
        sign = -1 if info.lower_is_better else 1
        assert trained.measure(task, output, labels) == pytest.approx(sign * quality.mean().item(), rel=1e-5)
        if info.kind == "regression":
            assert trained.measure(task, labels[:, None], labels) == 0
        else:
            perfect = torch.nn.functional.one_hot(labels, output.shape[-1]).float()
            assert perfect.shape == output.shape
            assert trained.measure(task, perfect, labels) == 1
            assert trained.measure(task, -perfect, labels) == 0


def test_outputs_are_differentiable(trained):
    model = copy.deepcopy(trained.model)
    for task in trained.tasks:
        inputs, labels = trained.labelled(task, "val")[0]
        model.zero_grad()
        trained.loss(task, trained.output(task, model, inputs), labels).backward()
        assert all(
            value.grad is not None and value.grad.any()
            for path, value in model.named_parameters()
            if path.endswith(("q_proj.weight", "v_proj.weight")) and "vision" not in path
        )


def test_splits_have_the_sizes_asked_for(trained, name):
    settings = SUITES[name][1]
    for split, count in (("val", settings.val), ("test", settings.test)):
        for task in trained.tasks:
            batches = trained.labelled(task, split)
            assert sum(len(labels) for _, labels in batches) == count
            assert all(len(value) == len(labels) for inputs, labels in batches for value in inputs.values())


def test_calibration_is_unlabelled_and_the_same_each_time(trained):
    drawn, again = trained.calibration(5, 7), trained.calibration(5, 7)
    assert list(drawn) == list(trained.tasks)
    for task, batches in drawn.items():
        assert len(batches) == 7
        for one, two in zip(batches, again[task], strict=True):
            assert all(len(value) == 5 and torch.equal(value, two[key]) for key, value in one.items())
            assert "labels" not in one
        with torch.no_grad():
            trained.model(**batches[0])


def test_the_finetuned_reference_is_what_peft_computes(trained):
    result = nsc_merge.merge(trained.model, trained.adapters, method="finetuned")
    for task, folder in trained.adapters.items():
        inputs, _ = trained.labelled(task, "test")[0]
        alone = result.for_task(task).apply(copy.deepcopy(trained.model))
        own = PeftModel.from_pretrained(copy.deepcopy(trained.model), folder).eval()
        with torch.no_grad():
            theirs = trained.output(task, own, inputs)
            ours = trained.output(task, alone, inputs)
            base = trained.output(task, trained.model, inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["nsc", "task_arithmetic"])
def test_suites_merge(trained, method, name):
    options = {"steps": 2, "progress": False} if method == "nsc" else {"scale": 0.4}
    result = nsc_merge.merge(trained.model, trained.adapters, trained.calibration(4, 2), method=method, **options)
    scores = evaluate(trained, result, "val")
    assert set(scores.metrics) == set(trained.tasks)
    assert all(torch.tensor(list(scores.losses.values())).isfinite())
    projector = [path for path in result.coefficients if "multi_modal_projector" in path]
    assert bool(projector) == (name == "llava")

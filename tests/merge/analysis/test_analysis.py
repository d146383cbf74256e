"""Null-space ratios per sample, over training and against quality, and Proposition 1, from the definitions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.adapters import Adapter, Factor, load_adapter
from nsc_merge.analysis import (
    Tracking,
    by_quantile,
    check_bound,
    find_checkpoints,
    per_sample_ratios,
    read_log,
    sample_study,
    track,
)
from nsc_merge.analysis import bound as bound_module
from nsc_merge.analysis.adapter_overlap import null_space_ratios, overlaps
from nsc_merge.analysis.bound import summary
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.commands.main import main
from nsc_merge.evaluation.metrics import METRICS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def llama(tmp_path):
    """A decoder with two adapters, one of which touches fewer modules, and inputs with padding."""
    model = build("llama")
    write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    write_adapter(model, tmp_path / "b", 2, r=2, target_modules=["v_proj"])
    return model, {name: tmp_path / name for name in "ab"}, [KINDS["llama"].inputs(seed) for seed in (3, 4)]


def seen(model, path, batches):
    """What a linear of ``model`` is given, batch by batch."""
    inputs = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].detach())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return inputs


def projected(factor, z):
    """Eq. 3 by an explicit projector, in float64."""
    basis = torch.linalg.qr(factor.A.double().t()).Q
    inside = z.double() @ basis @ basis.t()
    return (z.double() - inside).norm(dim=-1) / z.double().norm(dim=-1)


@pytest.mark.parametrize("kind", ["coefficients", "factors", "base"])
def test_ratios_are_those_of_the_merged_model_by_an_explicit_projector(llama, kind):
    model, adapters, batches = llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "base":
        found, merged = per_sample_ratios(model, adapters, batches), model
    else:
        method = "task_arithmetic" if kind == "coefficients" else "ties"
        result = nsc_merge.merge(model, adapters, method=method, scale=0.6)
        found, merged = per_sample_ratios(model, result, batches), result.apply(copy.deepcopy(model))
    assert (found.values.shape, found.tasks) == ((6, 6, 2), ["a", "b"])
    for task, folder in adapters.items():
        factors = load_adapter(folder, task).factors
        means = []
        for path in found.paths:
            values = found.values[:, found.paths.index(path), found.tasks.index(task)]
            if path not in factors:
                assert values.isnan().all()
                continue
            expected = []
            for batch, z in zip(batches, seen(merged, path, batches), strict=True):
                ratio, mask = projected(factors[path], z), batch["attention_mask"]
                expected += [row[kept].mean() for row, kept in zip(ratio, mask.bool(), strict=True)]
            torch.testing.assert_close(values.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
            means.append(values)
        torch.testing.assert_close(found.of(task), torch.stack(means).mean(0))
        assert set(found.by_module(task)) == set(factors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_and_blocks_are_chosen(llama):
    model, adapters, batches = llama
    some = per_sample_ratios(model, adapters, batches, modules=["v_proj"])
    assert [path.rpartition(".")[2] for path in some.paths] == ["v_proj"] * 3
    last = per_sample_ratios(model, {"a": adapters["a"]}, batches, blocks="last_quarter")
    assert last.paths == ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    one = per_sample_ratios(model, {"a": adapters["a"]}, batches, modules=["v_proj"], blocks=[1])
    assert one.paths == ["model.layers.1.self_attn.v_proj"]
    every = per_sample_ratios(model, {"a": adapters["a"]}, batches)
    torch.testing.assert_close(every.of("a", ["model.layers.1.self_attn.v_proj"]), one.of("a"))
    with pytest.raises(
        ValueError, match=r"modules: expected paths or some of \['q_proj', 'v_proj'\], found 'o_proj'"
    ):
        per_sample_ratios(model, adapters, batches, modules=["o_proj"])
    with pytest.raises(ValueError, match="score_blocks: expected block numbers from 0 to 2"):
        per_sample_ratios(model, adapters, batches, blocks=[7])
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        per_sample_ratios(model, adapters, [])
    with pytest.raises(ValueError, match="gives every task its own update"):
        per_sample_ratios(model, nsc_merge.merge(model, adapters, method="finetuned"), batches)


def test_modules_trained_in_full_count_once_and_are_not_measured(tmp_path):
    model = build("llava")
    settings = {
        "r": 2,
        "target_modules": KINDS["llava"].targets,
        "modules_to_save": ["multi_modal_projector"],
    }
    folder = write_adapter(model, tmp_path / "a", 1, **settings)
    batches = [KINDS["llava"].inputs(0)]
    for policy in ("lambda", "mean"):
        result = nsc_merge.merge(
            model, {"a": folder}, method="task_arithmetic", scale=1.0, shared_modules=policy
        )
        found = per_sample_ratios(model, result, batches)
        assert not any("projector" in path for path in found.paths)
        whole = result.apply(copy.deepcopy(model))
        path = found.paths[-1]
        ratio = projected(result.adapters["a"].factors[path], seen(whole, path, batches)[0])
        mask = batches[0]["attention_mask"].bool()
        expected = torch.stack([row[kept].mean() for row, kept in zip(ratio, mask, strict=True)])
        torch.testing.assert_close(found.values[:, -1, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_inspection_measures_the_same(tmp_path):
    model = build("vit")
    folder = write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "o_proj"])
    adapters = {"a": load_adapter(folder, "a")}
    batches = [KINDS["vit"].inputs(0)]
    mean = per_sample_ratios(model, adapters, batches).of("a").mean().item()
    assert null_space_ratios(model, adapters, batches)["a"]["measured"] == pytest.approx(mean, rel=1e-5)


def test_inspected_ratios_are_means_over_tokens_however_these_are_batched(llama, tmp_path, capsys):
    model, folders, batches = llama
    adapters = {name: load_adapter(folder, name) for name, folder in folders.items()}
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    expected = []
    for path, factor in adapters["a"].factors.items():
        z = torch.cat(seen(model, path, batches))[mask].double()
        A = factor.A.double()
        inside = (z @ torch.linalg.pinv(A) @ A).square().sum(-1)
        expected.append((1 - inside / z.square().sum(-1)).clamp(min=0).sqrt().mean().item())
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for size in (1, 2, 4, 6):
        cut = [{name: value[start : start + size] for name, value in together.items()} for start in range(0, 6, size)]
        found = null_space_ratios(model, adapters, cut)["a"]["measured"]
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)

    # The files of nsc-merge eval hold labels, too.
    model.save_pretrained(tmp_path / "base")
    save_file({**together, "labels": torch.rand(6)}, tmp_path / "test.safetensors")
    named = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "test.safetensors"), "--batch-size", "4"]
    assert main(["inspect", str(folders["a"]), *named, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["null_space_ratio"]["a"]["measured"]
    assert shown == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["rows of 0", "rows twice"])
def test_overlaps_of_row_spaces_are_of_directions_that_are_there(kind):
    generator = torch.Generator().manual_seed(0)
    A, other = torch.randn(2, 4, 32, generator=generator)
    A[2:] = 0 if kind == "rows of 0" else A[:2]
    one, two = ({"q": Factor(rows, torch.randn(8, 4, generator=generator), 1.0)} for rows in (A, other))
    pair = {name: Adapter(name, factors) for name, factors in (("one", one), ("two", two))}
    rows = [torch.linalg.svd(value.double(), full_matrices=False).Vh for value in (A, other)]
    # Of two directions the mean squared cosine of the angles to the other's four.
    expected = (rows[0][:2] @ rows[1].t()).square().sum().item() / 2
    assert overlaps(pair)[0]["inputs"] == pytest.approx(expected)
    nothing = {"q": Factor(torch.zeros(4, 32), two["q"].B, 1.0)}
    assert overlaps({"none": Adapter("none", nothing), "two": pair["two"]})[0]["inputs"] is None


# Over training


@pytest.fixture
def training(tmp_path, llama):
    """Checkpoints whose A turns from random towards what the modules see, with a log."""
    model, adapters, batches = llama
    final = load_adapter(adapters["a"], "a")
    tensors = {}
    for path, factor in final.factors.items():
        # As good a plane of rank 4 as there is for these inputs.
        z = torch.cat(seen(model, path, batches)).flatten(0, 1)
        tensors[path] = torch.linalg.svd(z, full_matrices=False).Vh[:4], factor.A
    folder = tmp_path / "run"
    for step in (0, 5, 10, 20):
        shutil.copytree(adapters["a"], folder / f"checkpoint-{step}")
        weights = {}
        for path, (best, start) in tensors.items():
            mixed = (1 - step / 20) * start + step / 20 * best
            weights[f"base_model.model.{path}.lora_A.weight"] = mixed.contiguous()
            weights[f"base_model.model.{path}.lora_B.weight"] = torch.zeros(final.factors[path].B.shape)
        save_file(weights, folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    entries = [
        {"step": step, "loss": loss} for step, loss in ((0, 4.0), (5, 3.0), (10, 2.5), (20, 2.0), (30, 9.0))
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return model, folder, batches


def test_tracking_falls_as_an_adapter_turns_towards_its_inputs(training):
    model, folder, batches = training
    tracking = track(
        model, find_checkpoints(folder), batches, columns=read_log(folder / "steps.jsonl"), progress=False
    )
    assert tracking.steps == [0, 5, 10, 20]
    mean = tracking.mean()
    assert mean == sorted(mean, reverse=True)
    assert tracking.random == pytest.approx(math.sqrt(1 - 4 / 32))
    assert set(tracking.by_block()) == {"0", "1", "2"}
    assert set(tracking.by_name()) == {"q_proj", "v_proj"}
    blocks = tracking.by_block().values()
    assert mean == pytest.approx([sum(values) / 3 for values in zip(*blocks, strict=True)])
    found = tracking.correlations("loss")
    assert (found["all"], found["steps"]) == (1.0, 4)
    losses, ratios = (
        [-1.0, -0.5, -0.5],
        [after - before for before, after in itertools.pairwise(mean)],
    )
    assert found["changes"] == pytest.approx(rank_correlation(losses, ratios))
    with pytest.raises(ValueError, match=r"column: expected one of \['loss'\], found 'metric'"):
        tracking.correlations("metric")


def test_tracking_on_the_command_line(training, tmp_path, capsys):
    model, folder, batches = training
    model.save_pretrained(tmp_path / "base")
    save_file(
        {name: torch.cat([b[name] for b in batches]) for name in batches[0]}, tmp_path / "inputs.safetensors"
    )
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert (
        main(["analyse", "tracking", str(folder), *arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    expected = track(model, find_checkpoints(folder), batches, progress=False)
    assert document["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert document["correlations"]["loss"]["all"] == 1.0
    assert json.loads((tmp_path / "out" / "tracking.json").read_text()) == document
    assert (tmp_path / "out" / "tracking.png").stat().st_size > 10_000
    assert (
        main(["analyse", "tracking", str(folder), *arguments, "--modules", "v_proj", "--blocks", "1,2"]) == 0
    )
    shown = capsys.readouterr().out
    assert "4 checkpoints, steps 0 to 20, 2 modules" in shown
    assert "rho with loss over 4 steps  all +1.00" in shown
    for wrong, status, message in (
        (["--column", "metric"], 2, "--column: expected some of ['loss'], found 'metric'"),
        (["--modules", "up_proj"], 2, "--modules: expected paths or some of"),
        (["--blocks", "7"], 2, "--blocks: expected 1 to 3 last blocks, found 7"),
        (["--inputs", "nowhere"], 1, "--inputs: nowhere is missing"),
    ):
        assert main(["analyse", "tracking", str(folder), *arguments, *wrong]) == status
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["analyse", "tracking", str(tmp_path / "base"), *arguments]) == 1
    assert "expected PEFT folders whose names end in the step" in capsys.readouterr().err


def test_logs_are_read_and_wrong_ones_refused(tmp_path):
    state = {
        "log_history": [
            {"step": 5, "loss": 2, "epoch": 0.1},
            {"step": 5, "eval_loss": 1.5},
            {"step": 9, "note": "x"},
        ]
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    expected = {"loss": {5: 2.0}, "epoch": {5: 0.1}, "eval_loss": {5: 1.5}}
    assert read_log(tmp_path / "trainer_state.json") == expected
    for text in ("{}", "[1]", '{"loss": 1}', "nonsense", ""):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match="log: .*expected"):
            read_log(tmp_path / "log.jsonl")


def test_a_step_whose_loss_is_no_number_is_a_gap(training, tmp_path, capsys):
    """One overflow in a log of many steps leaves a correlation of the others, and a constant column has none."""
    steps, omega = [0, 5, 10, 15], [0.9, 0.7, 0.8, 0.6]
    columns = {"loss": {0: 4.0, 5: math.nan, 10: 3.0, 15: 2.0}, "lr": dict.fromkeys(steps, 1.0)}
    found = Tracking(steps, {"layers.0.q": omega}, 0.9, columns).correlations("loss")
    assert (found["all"], found["steps"]) == (pytest.approx(1), 3)
    model, folder, batches = training
    model.save_pretrained(tmp_path / "base")
    save_file(batches[0], tmp_path / "inputs.safetensors")
    entries = [{"step": step, "loss": loss, "lr": 1.0} for step, loss in ((0, 4.0), (5, math.nan), (10, 2), (20, 1))]
    (folder / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert main(["analyse", "tracking", str(folder), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "rho with loss over 3 steps  all +1.00" in shown
    assert "rho with lr over 4 steps  all -  changes -" in shown
    assert "nan" not in shown


def test_checkpoints_of_one_step_or_of_different_modules_are_refused(training, llama):
    model, folder, batches = training
    with pytest.raises(ValueError, match="that of step 7 and the first disagree on module"):
        track(model, [(0, folder / "checkpoint-0"), (7, llama[1]["b"])], batches, progress=False)
    with pytest.raises(ValueError, match="checkpoints: expected at least one"):
        track(model, [], batches)
    shutil.copytree(folder / "checkpoint-5", folder / "again-5")
    with pytest.raises(ValueError, match="two folders in .* say step 5"):
        find_checkpoints(folder)


# Against quality


def test_quartiles_by_hand():
    ratios = torch.tensor([0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5])
    quality = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = by_quantile(ratios, quality)
    assert found["mean"] == [1.0, 0.5, 0.5, 0.0]
    assert found["count"] == [2, 2, 2, 2]
    assert found["ratio"] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert found["error"] == pytest.approx([0, 0.5, 0.5, 0])
    assert found["rho"] == pytest.approx(rank_correlation(ratios.tolist(), quality.tolist()))
    assert found["rho"] < 0
    with pytest.raises(ValueError, match="bins: expected at least two samples in each, found 8 for 5"):
        by_quantile(ratios, quality, 5)
    with pytest.raises(ValueError, match=r"quality: expected \[N\]"):
        by_quantile(ratios, quality[:4])


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))
    with pytest.raises(ValueError, match="second: expected 2 values"):
        rank_correlation([1, 2], [1])


@pytest.fixture
def recipe(tmp_path):
    base = build("llama-cls")
    base.save_pretrained(tmp_path / "base")
    tasks = {}
    for seed, task in enumerate(("nli", "topic"), 1):
        write_adapter(
            base, tmp_path / task, seed, r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"
        )
        inputs = [KINDS["llama-cls"].inputs(10 * seed + i) for i in range(4)]
        stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
        stacked["labels"] = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(seed))
        save_file(stacked, tmp_path / f"{task}.safetensors")
        tasks[task] = {"adapter": task, "test": f"{task}.safetensors", "metric": "accuracy"}
    methods = [
        {"method": "task_arithmetic", "name": "TA 0.4", "options": {"scale": 0.4}},
        {"folder": "merged", "name": "saved"},
        "ensemble",
    ]
    adapters = {task: tmp_path / task for task in tasks}
    nsc_merge.merge(base, adapters, method="task_arithmetic", scale=0.4).save(tmp_path / "merged", "model")
    document = {"model": "base", "tasks": tasks, "methods": methods, "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


@pytest.mark.parametrize("row", ["finetuned", "TA 0.4"])
def test_quartiles_on_the_command_line(recipe, capsys, row):
    arguments = ["analyse", "quartiles", str(recipe / "eval.yaml"), "--modules", "v_proj", "--bins", "3", "--row", row]
    assert main([*arguments, "--out", str(recipe / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (recipe / "out" / "quartiles.png").stat().st_size > 5_000
    for task in ("nli", "topic"):
        model = type(build("llama-cls")).from_pretrained(recipe / "base").eval()
        chosen = {name: recipe / name for name in ([task] if row == "finetuned" else ["nli", "topic"])}
        scale = 1.0 if row == "finetuned" else 0.4
        result = nsc_merge.merge(model, chosen, method="task_arithmetic", scale=scale)
        data = load_file(recipe / f"{task}.safetensors")
        labels = data.pop("labels")
        ratios = per_sample_ratios(model, result, [data], modules=["v_proj"]).of(task)
        result.apply(model)
        with torch.no_grad():
            model.score.weight.copy_(result.adapters[task].trained["score.weight"])
            quality = METRICS["accuracy"].quality(model(**data).logits, labels)
        expected = by_quantile(ratios, quality, 3)
        for key in ("rho", "mean", "ratio"):
            assert document["tasks"][task][key] == pytest.approx(expected[key], rel=1e-4)
        assert document["tasks"][task]["samples"] == 12
        assert document["tasks"][task]["rho_others"] is not None


def test_quartiles_of_a_folder_that_says_what_was_merged(recipe, capsys):
    base = type(build("llama-cls")).from_pretrained(recipe / "base")
    adapters = {task: recipe / task for task in ("nli", "topic")}
    nsc_merge.merge(base, adapters, method="task_arithmetic", scale=0.4).save(recipe / "ta", ["coefficients", "lora"])
    arguments = ["analyse", "quartiles", str(recipe / "eval.yaml"), "--json", "--bins", "3"]
    assert main([*arguments, "--row", "TA 0.4"]) == 0
    found = [json.loads(capsys.readouterr().out)]
    assert main([*arguments, f"methods=[{{folder: {recipe / 'ta'}}}]", "--row", "ta"]) == 0
    found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tasks"] == found[1]["tasks"]


def test_wrong_rows_and_tasks_give_one_line(recipe, capsys):
    for wrong, message in (
        (["--row", "TA"], "--row: expected one of ['zero_shot', 'finetuned', 'TA 0.4', 'saved', 'ensemble']"),
        (["--row", "saved"], "does not say what was merged"),
        (["--row", "ensemble"], "--row: an ensemble is no single model"),
        (["--tasks", "nlp"], "--tasks: expected some of ['nli', 'topic'], found 'nlp'"),
    ):
        assert main(["analyse", "quartiles", str(recipe / "eval.yaml"), *wrong]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_suite_made_in_python_is_studied_too(llama):
    """All that is asked of a suite is its data, its heads and its measures."""
    model, adapters, batches = llama

    class Suite:
        tasks = dict.fromkeys(adapters)

        def labelled(self, task, split):
            return [(batch, batch["input_ids"][:, -1]) for batch in batches]

        def output(self, task, model, batch):
            return model(**batch).logits[:, -1]

        def loss(self, task, output, label):
            return None

        def measure(self, task, outputs, labels):
            return METRICS["accuracy"].measure(outputs, labels)

        def quality(self, task, outputs, labels):
            return -torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    suite = Suite()
    suite.model = model
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.4)
    found = sample_study(suite, result, ["b"], bins=2)
    assert list(found) == ["b"]
    assert found["b"]["count"] == [3, 3]


# Proposition 1


def test_the_bound_holds_and_is_what_the_proposition_says(llama):
    model, adapters, batches = llama
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
    checks = check_bound(model, result, batches)
    assert len(checks) == 9
    merged = result.apply(copy.deepcopy(model))
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    for check in checks:
        factor = load_adapter(adapters[check["task"]], check["task"]).factors[check["path"]]
        A, B = factor.A.double(), factor.scaling * factor.B.double()
        constant = torch.linalg.svdvals(A)[-1] * torch.linalg.svdvals(B)[-1]
        assert check["constant"] == pytest.approx(constant.item())
        z = torch.cat(seen(merged, check["path"], batches))[mask].double()
        effect = (z @ A.t() @ B.t()).norm(dim=-1)
        ratio = projected(factor, z)
        bound = constant * (1 - ratio.square()).sqrt() * z.norm(dim=-1)
        assert (effect >= bound).all()
        assert check["inputs"] == int(mask.sum())
        assert check["violations"] == 0
        # The inputs differ by the rounding of the merged weights.
        assert check["tightness"] == pytest.approx((effect / bound).median().item(), rel=1e-4)
        assert check["least"] == pytest.approx((effect / bound).min().item(), rel=1e-4)
    whole = summary(checks)
    assert (whole["held"], whole["modules"], whole["trivial"]) == (True, 9, 0)


def test_a_violation_would_be_seen(llama, monkeypatch):
    """With a constant too large by far, the very same check fails."""
    from nsc_merge.analysis import bound

    original = bound._Check.__init__

    def inflated(self, *arguments):
        original(self, *arguments)
        self.constant *= 1e6

    monkeypatch.setattr(bound._Check, "__init__", inflated)
    model, adapters, batches = llama
    whole = summary(check_bound(model, adapters, batches))
    assert whole["violations"] == whole["inputs"]
    assert not whole["held"]


def test_the_bound_of_many_inputs_is_judged_by_some_of_all(monkeypatch):
    """Not by those that come first: here these are easy, and the tightest and the trend come late."""
    generator = torch.Generator().manual_seed(0)
    factor = Factor(*(torch.randn(shape, generator=generator) for shape in ((4, 16), (12, 4))), 1.5)
    inputs = torch.randn(5000, 16, generator=generator)
    inputs[:1000] = torch.linalg.qr(factor.A.t()).Q[:, 0] + 0.05 * inputs[:1000]
    A, B = factor.A.double(), 1.5 * factor.B.double()
    constant = (torch.linalg.svdvals(A)[-1] * torch.linalg.svdvals(B)[-1]).item()
    z = inputs.double()
    effect = (z @ A.t() @ B.t()).norm(dim=1)
    inside = (z @ torch.linalg.pinv(A) @ A).norm(dim=1)
    ratio = (1 - (inside / z.norm(dim=1)).square()).clamp(min=0).sqrt()
    expected = rank_correlation(ratio.tolist(), (effect / z.norm(dim=1)).tolist())
    times = effect / (constant * inside)
    for most, size, error in ((10**6, 5000, 1e-6), (400, 170, 0.1), (400, 5000, 0.1)):
        monkeypatch.setattr(bound_module, "_KEPT", most)
        check = bound_module._Check("t", "q", factor)
        for part in inputs.split(size):
            check.add(part)
        found = check.document()
        assert found["inputs"] == 5000
        assert found["least"] == pytest.approx(times.min().item(), rel=1e-9)
        assert found["tightness"] == pytest.approx(times.median().item(), rel=error)
        assert found["rho"] == pytest.approx(expected, abs=error)


def test_deficient_factors_make_the_bound_trivial_or_exact(llama):
    model, adapters, batches = llama
    a = load_adapter(adapters["a"], "a")
    path = next(iter(a.factors))
    factor = a.factors[path]
    zero = nsc_merge.Factor(factor.A, torch.zeros_like(factor.B), 1.0)
    # A of rank 3 in four rows: its least singular value that is not 0 counts.
    repeated = nsc_merge.Factor(torch.cat([factor.A[:3], factor.A[:1]]), factor.B, 1.0)
    isometric = nsc_merge.Factor(
        torch.linalg.qr(factor.A.t()).Q.t().contiguous(), torch.linalg.qr(factor.B).Q.contiguous(), 2.0
    )
    found = {
        name: check_bound(model, {"a": nsc_merge.Adapter("a", {path: one})}, batches)[0]
        for name, one in (("zero", zero), ("repeated", repeated), ("isometric", isometric))
    }
    assert (found["zero"]["constant"], found["zero"]["tightness"], found["zero"]["violations"]) == (
        0.0,
        None,
        0,
    )
    sigma = torch.linalg.svdvals(repeated.A.double())
    assert sigma[-1] < 1e-6
    least = sigma[-2] * torch.linalg.svdvals(factor.B.double())[-1]
    assert found["repeated"]["constant"] == pytest.approx(least.item(), rel=1e-5)
    assert found["repeated"]["violations"] == 0
    # With orthonormal factors the bound is the effect.
    assert found["isometric"]["constant"] == pytest.approx(2.0, rel=1e-5)
    assert found["isometric"]["tightness"] == pytest.approx(1.0, rel=1e-5)
    # Their rounding to float32 may swap inputs whose effects agree to seven digits.
    assert found["isometric"]["rho"] < -0.999
    assert summary(list(found.values()))["trivial"] == 1


def test_the_bound_on_the_command_line(llama, tmp_path, capsys):
    model, adapters, batches = llama
    model.save_pretrained(tmp_path / "base")
    save_file({**batches[0], "labels": torch.zeros(3)}, tmp_path / "inputs.safetensors")
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert main(["analyse", "bound", str(adapters["a"]), *arguments, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    inputs = 6 * int(batches[0]["attention_mask"].sum())
    assert f"held at all {inputs} inputs of 6 modules" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bound.json", "bound.png"}
    assert main(["analyse", "bound", str(adapters["a"]), *arguments, "--at", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["held"] is True
    write_adapter(model, tmp_path / "dora", 3, r=2, target_modules=["v_proj"], use_dora=True)
    assert main(["analyse", "bound", str(tmp_path / "dora"), *arguments]) == 1
    assert "dora='convert'" in capsys.readouterr().err
    assert main(["analyse", "bound", str(tmp_path / "dora"), *arguments, "--dora", "convert"]) == 0
    with pytest.raises(SystemExit):
        main(["analyse", "bound", str(adapters["a"]), *arguments, "--blocks", "first"])
    assert "expected last_quarter, a number" in capsys.readouterr().err


def test_a_log_is_read_with_its_gaps_and_without_two_meanings(tmp_path):
    """transformers writes NaN where a norm overflowed."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 0.5, "grad_norm": NaN}\n{"step": 2, "loss": 0.25}\n')
    columns = read_log(log)
    assert columns["loss"] == {1: 0.5, 2: 0.25}
    assert math.isnan(columns["grad_norm"][1])
    for line, reason in (
        ('{"step": 1, "step": 2, "loss": 0.5}', "the key 'step' is given twice"),
        ('{"step": NaN, "loss": 1}', "cannot convert float NaN to integer"),
    ):
        log.write_text(line)
        with pytest.raises(ValueError, match=rf"log: .*log\.jsonl: expected JSON lines .*{reason}"):
            read_log(log)

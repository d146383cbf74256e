"""Evaluation recipes from end to end."""

from __future__ import annotations

import copy
import csv
import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from eval_cases import change, reference, rows
from PIL import Image
from safetensors.torch import load_file, save_file
from served_cases import write_base
from torch import nn
from transformers import ViTImageProcessor
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation import candidates, heads
from nsc_merge.evaluation.candidates import candidate_of, open_saved
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.metrics import cross_entropy
from nsc_merge.evaluation.rows.saved_base import check_base
from nsc_merge.evaluation.scoring import applied, joint_hits, predict
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.methods import METHODS
from nsc_merge.models.bases.placement import Placement
from nsc_merge.recipes.yaml_keys import RecipeError


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
    assert list(trail) == [step / 10 for step in range(1, 11)]
    assert {scale: trail[scale] for scale in losses} == pytest.approx(losses, rel=1e-4)
    assert trail[tuned["value"]] == min(trail.values())

    out = place / "out"
    assert json.loads((out / "results.json").read_text()) == document
    table = (out / "results.md").read_text()
    assert "| TA 0.4 |" in table
    assert "nli (acc ↑)" in table
    assert "| Hits@1 | Hits@3 | Hits@5 |" in table
    shares = found["TA 0.4"][0]["hits"]["all"]
    percents = " | ".join(f"{100 * shares[count]:.1f}" for count in "135")
    assert next(line for line in table.splitlines() if "| TA 0.4 |" in line).endswith(f"| {percents} |")
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


def test_the_base_is_of_the_revision_that_is_named(place, monkeypatch):
    asked = []

    def load(name, **given):
        asked.append((name, given["local"], given["revision"], given["trust_remote_code"]))
        raise OSError("not here")

    monkeypatch.setattr("nsc_merge.evaluation.suite.load_model", load)
    for overrides in (["model=me/base", "revision=v1"], ["model=me/base", "trust_remote_code=true"], []):
        with pytest.raises(OSError, match="not here"):
            RecipeSuite(load_eval_recipe(place / "eval.yaml", overrides).at(0))
    assert asked == [
        ("me/base", False, "v1", False),
        ("me/base", False, None, True),
        (str(place / "base"), True, None, False),
    ]
    with pytest.raises(RecipeError, match="GPUs that PyTorch"):
        RecipeSuite(load_eval_recipe(place / "eval.yaml", ["device_map={model: 98}"]).at(0))
    assert len(asked) == 3


def test_the_ensemble_and_the_joint_labels_by_hand(place):
    suite = RecipeSuite(load_eval_recipe(place / "eval.yaml", ["device=cpu"]).at(0))
    ensemble = nsc_merge.merge(suite.model, suite.adapters, method="ensemble")
    mean = 0
    for task in ("nli", "topic"):
        with applied(suite.model, ensemble.for_task(task)) as model, torch.no_grad():
            mean = mean + torch.cat([suite.output("nli", model, inputs) for inputs, _ in suite.labelled("nli", "test")])
    torch.testing.assert_close(predict(suite, ensemble, "test")["nli"][0], mean / 2)

    summed = nsc_merge.merge(suite.model, suite.adapters, method="task_arithmetic", scale=0.4)
    found = joint_hits(suite, summed, ["nli", "topic"], "logits")
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
    assert joint_hits(suite, finetuned, ["nli", "topic"], "logits") is None


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


def test_a_saved_model_is_measured_in_the_bases_dtype_and_never_quantised(place):
    """It would be a change of its own that the merge did not make."""
    placement = Placement(dtype="float16", device="cpu", quantization="bitsandbytes-4bit")
    suite = SimpleNamespace(model=build("llama-cls").to(torch.bfloat16), placement=placement, adapters={})
    found = open_saved(place / "base", suite)
    assert {value.dtype for value in found.parameters()} == {torch.bfloat16}
    assert {type(one) for one in found.modules() if hasattr(one, "in_features")} == {nn.Linear}
    own = load_file(place / "base" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, own.bfloat16())


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
    # Of what is on the hub nothing is known.
    check_base(place / "other" / "lora", "me/base")
    # Nor of one that is gone, where the record has no digests of it.
    if moved:
        file = place / "other" / "lora" / "recipe.yaml"
        with pytest.raises(ValueError, match="is an update of"):
            check_base(file.parent, str(place / "base"))
        written = yaml.safe_load(file.read_text())
        for key in ("sha256", "headers", "sha256_when_saved", "headers_when_saved"):
            written["record"].get(key, {}).pop("model", None)
        file.write_text(yaml.safe_dump(written))
        check_base(file.parent, str(place / "base"))


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
        "device=cpu",
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


def test_what_draws_has_the_seed_of_its_run_or_its_own(place):
    change(place, methods=["dare", {"method": "dare", "name": "own", "options": {"seed": 7}}])
    recipe = load_eval_recipe(place / "eval.yaml").at(0)
    suite = RecipeSuite(recipe)
    found = {row.name: candidate_of(suite, recipe, row, 4) for row in recipe.rows}
    by_seed = {seed: nsc_merge.merge(suite.model, suite.adapters, method="dare", seed=seed) for seed in (0, 4, 7)}
    path = by_seed[0].paths[0]
    for name, seed in (("dare", 4), ("own", 7)):
        same = [torch.equal(found[name].delta(path), other.delta(path)) for other in by_seed.values()]
        assert same == [one == seed for one in by_seed]


def test_tasks_without_a_head_are_left_to_the_models_own_answers():
    """Of those that generate and those of the harness, a next token is predicted: one of classes, not a value."""

    def told(**metric):
        return SimpleNamespace(generate=False, embeds=False, metric=SimpleNamespace(several=False, **metric))

    classes, values = (told(loss=one) for one in (cross_entropy, 0))
    labelled = {"nli": classes, "depth": values, "said": SimpleNamespace(generate=True)}
    recipe = SimpleNamespace(labelled=labelled, tasks=[*labelled, "quiz"])
    suite = SimpleNamespace(output=print)
    given = candidates._output_options(suite, recipe, METHODS["distill"])
    expected = {"nli": "categorical", "depth": "gaussian", "said": "categorical", "quiz": "categorical"}
    assert (given["likelihood"], list(given["outputs"])) == (expected, ["nli", "depth"])
    given = candidates._output_options(suite, recipe, METHODS["adamerging"])
    assert {name: list(one) for name, one in given.items()} == {"outputs": ["nli", "said", "quiz"]}
    # Tasks without a function would have no part in what is learnt.
    model, inputs = build("llama"), KINDS["llama"].inputs(0)
    found, ends = given["outputs"]["said"](model, inputs), inputs["attention_mask"].sum(1) - 1
    torch.testing.assert_close(found, model(**inputs).logits[torch.arange(3), ends])
    labelled["nli"] = told(loss=None, name="ndcg")
    with pytest.raises(ValueError, match=r"tasks.nli.metric: adamerging is of outputs of classes, and metric ndcg is"):
        candidates._output_options(suite, recipe, METHODS["adamerging"])


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

    shown = capsys.readouterr()
    assert "row task_arithmetic  average -  (" in shown.err
    for text in (shown.out, (place / "out" / "results.json").read_text()):
        (run,) = rows(json.loads(text, parse_constant=refused))["task_arithmetic"]
        assert run["metrics"]["topic"] is None
        assert run["normalised"]["nli"] is None
        assert run["average"] is None
    lines = list(csv.DictReader((place / "out" / "results.csv").open()))
    assert {(line["task"], line["value"], line["normalised"]) for line in lines if line["row"] == "finetuned"} == {
        ("nli", "0.0", ""),
        ("topic", "", ""),
    }


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
    # No figure would be a number of such data: no distance is infinite, and no colour is unknown.
    for name, value, way in (("depth", torch.inf, ", or NaN where none is known"), ("pixel_values", torch.nan, "")):
        data = load_file(tmp_path / "depth.safetensors")
        data[name][1, 2, 0] = value
        save_file(data, tmp_path / "wrong.safetensors")
        assert main(["eval", str(tmp_path / "vit.yaml"), f"tasks.depth.test={tmp_path / 'wrong.safetensors'}"]) == 1
        shown = capsys.readouterr().err
        assert f"error: tasks.depth.test: expected finite numbers in {name}{way}, found {value}" in shown

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


def test_images_in_folders_become_data_as_the_page_says(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[3] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(from pathlib.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_base("vit", tmp_path / "base")
    model = build("vit")
    write_adapter(model, tmp_path / "a", 1, r=2, target_modules=KINDS["vit"].targets)
    nsc_merge.merge(model, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0).apply(model)
    wanted, processor = model.config.num_labels, ViTImageProcessor.from_pretrained("base")
    (classes,) = re.findall(r"classes = (\[.*?\])", code)
    right = []
    for number in range(3 * wanted):
        pixels = torch.randint(0, 255, (12, 12, 3), generator=torch.Generator().manual_seed(number))
        place = Path("photos-test", json.loads(classes)[number % wanted], f"{number}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy().astype("uint8")).save(place)
        with torch.no_grad():
            said = model(**processor(Image.open(place), return_tensors="pt")).logits.argmax().item()
        right.append(said == number % wanted)
    Path("data").mkdir()
    exec(code, {})
    task = {"adapter": "a", "test": "data/photos-test.safetensors", "metric": "accuracy"}
    recipe = {"model": "base", "tasks": {"a": task}, "methods": ["finetuned"], "output": {"dir": "out"}}
    Path("eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", "eval.yaml", "--json"]) == 0
    found = rows(json.loads(capsys.readouterr().out))
    assert found["finetuned"][0]["metrics"]["a"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)

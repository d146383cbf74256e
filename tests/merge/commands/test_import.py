"""``nsc-merge import``: what a configuration of mergekit becomes, and what is refused; mergekit need not be there.

That the recipes compute what mergekit does is tested in tests/merge/integrations/test_mergekit.py.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mergekit_cases
import pytest
import yaml
from mergekit_cases import config
from transformers import LlamaForCausalLM
from zoo import write_adapter

from nsc_merge.commands.main import main
from nsc_merge.methods import METHODS
from nsc_merge.recipes.first.mergekit.configurations import from_mergekit
from nsc_merge.recipes.first.mergekit.methods import FAMILIES, WITHOUT_COUNTERPART
from nsc_merge.recipes.first.mergekit.text import import_said, import_summary, imported_text
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.yaml_keys import RecipeError

THREE = {"french": 0.7, "legal": 0.3, "medical": 0.5}
WAY_OUT = "python -m nsc_merge.integrations.mergekit"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return mergekit_cases.write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def imported(document: dict[str, Any], tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    return from_mergekit(file)


def scales(total: float) -> dict[str, Any]:
    return {"scale": pytest.approx({task: weight / total for task, weight in THREE.items()})}


@pytest.mark.parametrize(
    ("method", "own", "shared", "expected", "options"),
    [
        ("linear", {}, {}, "task_arithmetic", scales(1.5)),
        ("task_arithmetic", {}, {}, "task_arithmetic", scales(1)),
        ("task_arithmetic", {}, {"normalize": True, "lambda": "5e-1"}, "task_arithmetic", scales(3)),
        ("breadcrumbs", {}, {"normalize": 1}, "task_arithmetic", scales(1.5)),
        ("dare_linear", {"weight": 0.4, "density": 0.25}, {}, "dare",
         {"drop": 0.75, "rescale": "l1", "weights": dict.fromkeys(THREE, 0.4)}),
        ("dare_linear", {"density": 0.9}, {"rescale": False, "normalize": True, "lambda": 1.5}, "dare",
         {"drop": 0.1, "rescale": "none", "weights": pytest.approx(THREE)}),
        ("ties", {"density": 0.4}, {}, "ties",
         {"preset": "mergekit", "aggregate": "weight", "density": 0.4, "scale": 1.0, "weights": THREE}),
        ("ties", {"density": 2.0}, {"normalize": False, "lambda": 0.7, "rescale": True}, "ties",
         {"preset": "mergekit", "aggregate": "sum", "density": 1.0, "scale": 0.7, "weights": THREE}),
        ("della", {}, {}, "ties",
         {"preset": "mergekit", "aggregate": "weight", "density": 1.0, "scale": 1.0, "weights": THREE}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.02}, {"normalize": True, "lambda": 2}, "breadcrumbs",
         {"density": 0.6, "outliers": 0.02, "rescale": "none", "elect": False, "aggregate": "sum", "scale": 2.0,
          "weights": pytest.approx({task: weight / 1.5 for task, weight in THREE.items()})}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0}, {}, "breadcrumbs",
         {"density": 0.6, "outliers": 0.0, "rescale": "none", "elect": False, "aggregate": "sum", "scale": 1.0,
          "weights": THREE}),
        ("breadcrumbs_ties", {"density": 0.6}, {}, "breadcrumbs",
         {"density": 0.6, "outliers": 0.01, "rescale": "none", "elect": True, "aggregate": "sum", "scale": 1.0,
          "weights": THREE}),
        ("della", {"density": 0.5, "epsilon": "1e-1"}, {}, "della",
         {"density": 0.5, "epsilon": 0.1, "rescale": "l1", "elect": True, "aggregate": "weight", "scale": 1.0,
          "weights": THREE}),
        ("della_linear", {"density": 0.5}, {"rescale": False}, "della",
         {"density": 0.5, "epsilon": 0.15, "rescale": "none", "elect": False, "aggregate": "sum", "scale": 1.0,
          "weights": THREE}),
        ("dare_ties", {"density": 0.5}, {}, "dare_ties",
         {"preset": "mergekit", "aggregate": "sum", "drop": 0.5, "rescale": "l1", "scale": 1.0, "weights": THREE}),
        ("dare_ties", {"density": 0.25}, {"rescale": False, "normalize": True}, "dare_ties",
         {"preset": "mergekit", "aggregate": "weight", "drop": 0.75, "rescale": "none", "scale": 1.0,
          "weights": THREE}),
        ("della_linear", {"density": 0.5}, {}, "della",
         {"density": 0.5, "epsilon": 0.15, "rescale": "l1", "elect": False, "aggregate": "sum", "scale": 1.0,
          "weights": THREE}),
        ("nsc_task_arithmetic", {}, {}, "task_arithmetic", scales(1 / METHODS["task_arithmetic"].options().scale)),
        ("nsc_core_space", {"weight": 1}, {"scale": "1e-1", "merge": "sum", "weight": 3, "tolerance": 1},
         "core_space", {"scale": 0.1, "merge": "sum"}),
        ("nsc_knots_ties", {}, {"density": 0.3}, "knots_ties",
         {"density": 0.3, "trim_scope": "tensor", "weights": THREE}),
        ("nsc_task_arithmetic", {}, {"scale": 2}, "task_arithmetic", scales(0.5)),
    ],
)  # fmt: skip
def test_methods_and_their_parameters(method, own, shared, expected, options, tmp_path) -> None:
    document = config(method, own=own, **shared)
    if method == "linear":
        del document["base_model"]
    found = imported(document, tmp_path)
    assert (found.method.name, found.options) == (expected, options)
    assert [task.name for task in found.tasks] == list(THREE)
    assert found.base == str(Path("base").resolve())


def test_every_family_translates_where_nothing_is_dropped(tmp_path) -> None:
    found = {method: imported(config(method), tmp_path).method.name for method in FAMILIES}
    assert {method: name == "ties" for method, name in found.items()} == {
        method: family.elects for method, family in FAMILIES.items()
    }


@pytest.mark.parametrize(
    ("method", "parameters", "weights", "expected"),
    [
        # As mergekit: what adds up to nothing divides by 1.
        ("task_arithmetic", {"normalize": True}, [0.5, -0.5], [0.5, -0.5]),
        ("task_arithmetic", {"normalize": True}, [0.5, -0.45], [10, -9]),
        ("task_arithmetic", {"normalize": True}, [-0.5, -0.5], [0.5, 0.5]),
        ("linear", {}, [0.5, -0.45], [10, -9]),
        ("linear", {}, [-1, -1], [0.5, 0.5]),
        ("linear", {"normalize": False}, [0.3, 0.7], [0.3, 0.7]),
        ("linear", {"normalize": False}, [0.3, 0.75], None),
        ("linear", {}, [0.5, -0.5], None),
    ],
)
def test_weights_that_are_divided_by_their_sum(method, parameters, weights, expected, tmp_path) -> None:
    document = config(method, ("french", "legal"), **parameters)
    if method == "linear":
        del document["base_model"]
    for model, weight in zip(document["models"], weights, strict=True):
        model["parameters"]["weight"] = weight
    if expected is None:
        with pytest.raises(RecipeError, match=r"parameters\.(normalize: false multi|weight: expected weights with)"):
            imported(document, tmp_path)
        return
    shares = dict(zip(("french", "legal"), expected, strict=True))
    assert imported(document, tmp_path).options == {"scale": pytest.approx(shares)}


def test_more_than_all_is_all_of_every_model(tmp_path) -> None:
    document = config("ties", ("french", "legal"))
    for model, density in zip(document["models"], (1.2, 3), strict=True):
        model["parameters"]["density"] = density
    assert imported(document, tmp_path).options["density"] == 1
    # 1 where none is given, which is another than that of the first.
    document["models"][0]["parameters"]["density"] = 0.9
    del document["models"][1]["parameters"]["density"]
    with pytest.raises(RecipeError, match=r"density for all models, found \{'french': 0\.9, 'legal': 1\.0\}"):
        imported(document, tmp_path)


def test_weights_of_our_methods_are_1_where_none_is_given(tmp_path) -> None:
    document = config("nsc_ties", ("french", "legal"), density=0.3)
    for model in document["models"]:
        del model["parameters"]
    assert imported(document, tmp_path).options["weights"] == {"french": 1, "legal": 1}
    document["merge_method"], document["parameters"] = "nsc_fr", {}
    assert imported(document, tmp_path).method.name == "fr"
    document["models"][1]["parameters"] = {"weight": 2}
    with pytest.raises(RecipeError, match=r"weight: nsc_fr has no weights; .*found \{'french': 1\.0, 'legal': 2\.0\}"):
        imported(document, tmp_path)


def test_linear_counts_the_base(tmp_path) -> None:
    document = config("linear", ("french", "legal"))
    document["models"].insert(1, {"model": "base", "parameters": {"weight": 1.0}})
    assert imported(document, tmp_path).options == {"scale": pytest.approx({"french": 0.35, "legal": 0.15})}
    # Whether it is named as the base, too, or not.
    named = document.pop("base_model")
    assert imported(document, tmp_path).options == {"scale": pytest.approx({"french": 0.35, "legal": 0.15})}
    document["base_model"] = named
    del document["models"][1]
    with pytest.raises(RecipeError, match=r"parameters\.weight: linear takes base_model for one of the models"):
        imported(document, tmp_path)
    document["parameters"] = {"weight": 4}
    assert imported(document, tmp_path).options == {"scale": pytest.approx({"french": 0.14, "legal": 0.06})}
    document["parameters"] = {"weight": 0, "normalize": False}
    assert imported(document, tmp_path).options == {"scale": pytest.approx({"french": 0.7, "legal": 0.3})}


def test_the_ways_to_write_a_model(tmp_path) -> None:
    document = config("task_arithmetic", ("french",))
    weight = {"parameters": {"weight": [{"value": 0.2}, {"filter": "q_proj", "value": 0.9}]}}
    document["models"] = [
        {"model": f"{Path('base').resolve()}+{Path('adapters/french').resolve()}", **weight},
        {"model": {"model": {"path": "base"}, "lora": "adapters/legal"}, **weight},
        {"model": "adapters/medical", "parameters": {"weight": {"filter": "*", "value": [0.2, 0.2]}}},
        # The base has no difference to itself.
        {"model": {"model": "base", "lora": None}, "parameters": {"weight": 3}},
    ]
    assert imported(document, tmp_path).options == {"scale": dict.fromkeys(THREE, 0.2)}


@pytest.mark.parametrize(
    "same",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "./base"},
        {"tokenizer": {}},
        {"tokenizer": {"source": "base", "tokens": {}}},
    ],
)
def test_the_tokenizer_of_the_base_by_any_name(same, tmp_path) -> None:
    found = imported(changed(**same), tmp_path)
    assert found.base == str(Path("base").resolve())
    assert found.notes == []


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "auto"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "out_dtype": "float32"}, "float32"),
    ],
)
def test_the_numbers_of_the_model_that_is_written(keys, dtype, tmp_path) -> None:
    document = changed()
    del document["dtype"]
    assert imported({**document, **keys}, tmp_path).dtype == dtype


def test_places_on_the_hub_keep_their_revisions(tmp_path) -> None:
    document = config("task_arithmetic", ("french",))
    document["base_model"] = "owner/base@v1"
    document["models"][0]["model"] = "owner/base@v1+adapters/french"
    found = imported(document, tmp_path)
    assert (found.base, found.revision) == ("owner/base", "v1")
    document["base_model"] = "owner/base@"
    document["models"][0]["model"] = "owner/base+adapters/french"
    found = imported(document, tmp_path)
    assert (found.base, found.revision) == ("owner/base", None)
    document["base_model"] = "owner/base@v1"
    document["models"][0]["model"] = {"model": {"path": "owner/base", "revision": "v2"}, "lora": "adapters/french"}
    with pytest.raises(RecipeError, match=r"one base, found owner/base@v1 and owner/base@v2"):
        imported(document, tmp_path)


def test_the_recipe_that_is_written(tmp_path, capsys) -> None:
    document = {**config("dare_ties", own={"density": 0.5}, int8_mask=True), "out_dtype": "bfloat16", "extra": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "to" / "recipe.yaml"
    out.parent.mkdir()
    command = ["import", str(tmp_path / "config.yaml"), "--out", str(out)]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    recipe = load_recipe(out)
    assert recipe.model == said["base"] == str(Path("base").resolve())
    assert recipe.adapters == {task: Path("adapters", task).resolve() for task in THREE}
    assert (recipe.method, recipe.options) == ("dare_ties", said["options"])
    assert (recipe.dtype, recipe.formats) == ("bfloat16", ("model",))
    text = out.read_text()
    assert "config.yaml" in text
    assert "rank 2" in text
    flat = " ".join(text.replace("#", "").split())
    assert [note for note in said["notes"] if note not in flat] == []
    assert [note.split()[0] for note in said["notes"]] == ["mergekit", "int8_mask:", "mergekit"]
    assert main(command) == 2
    assert main([*command, "--force"]) == 0
    assert f"written   {out}" in capsys.readouterr().out
    assert main([*command[:2], "--out", "-"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"] == "dare_ties"


def test_what_is_said_of_a_recipe(tmp_path) -> None:
    document = config("dare_ties", ("french", "legal"), own={"density": 0.5})
    document["base_model"] = "owner/base@v1"
    for model in document["models"]:
        model["model"] = f"owner/base@v1+{model['model'].partition('+')[2]}"
    found = imported(document, tmp_path)
    text = imported_text(found, tmp_path / "to", "my recipe.yaml")
    written = yaml.safe_load(text)
    assert list(written) == ["model", "revision", "adapters", "method", "options", "dtype", "output"]
    assert (written["model"], written["revision"]) == ("owner/base", "v1")
    assert written["adapters"] == {task: str(Path("adapters", task).resolve()) for task in ("french", "legal")}
    assert (written["method"], written["options"], written["dtype"]) == ("dare_ties", found.options, "float32")
    assert written["output"] == {"dir": "merged", "formats": ["model"]}
    lines = text.splitlines()
    assert "#   nsc-merge run 'my recipe.yaml'" in lines
    assert "as mergekit writes it; with lora and rank:" in text
    assert "rank 4, alpha 8, 4 modules: q_proj, v_proj" in text
    assert "rank 4, alpha 4, 6 modules: q_proj, up_proj, v_proj" in text
    flat = " ".join(text.replace("#", "").split())
    assert f"{found.method.summary}. Source: {found.method.paper}." in flat
    assert "a configuration of mergekit with merge_method dare_ties" in flat
    assert import_summary(found, "out.yaml", "next it is") == {
        "recipe": "out.yaml",
        "merge_method": "dare_ties",
        "base": "owner/base",
        "tasks": written["adapters"],
        "method": "dare_ties",
        "options": found.options,
        "dtype": "float32",
        "formats": ["model"],
        "notes": found.notes,
        "next": "next it is",
    }
    assert import_said(found, "out.yaml", "next it is").splitlines() == [
        "method    dare_ties is dare_ties here",
        "adapters  french: rank 4, alpha 8",
        "          legal: rank 4, alpha 4",
        f"note      {found.notes[0]}",
        "written   out.yaml",
        "next      next it is",
    ]
    text = imported_text(imported(config("task_arithmetic"), tmp_path), tmp_path)
    assert "revision" not in yaml.safe_load(text)
    assert "an adapter for the base, and the model, which is what mergekit writes" in text
    assert "#   nsc-merge run recipe.yaml" in text.splitlines()


def test_what_mergekit_merges_otherwise_than_a_recipe_is_noted(place, tmp_path) -> None:
    base = LlamaForCausalLM.from_pretrained("base")
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    head = write_adapter(base, tmp_path / "head", 1, modules_to_save=["lm_head"], **settings)
    bias = write_adapter(base, tmp_path / "bias", 2, lora_bias=True, **settings)

    def notes(method: str, *others: Path) -> list[str]:
        document = config(method, own={"density": 0.5} if method == "ties" else {})
        own = {"parameters": {"weight": 1, **document["models"][0]["parameters"]}}
        document["models"] += [{"model": f"base+{other}", **own} for other in others]
        return [note for note in imported(document, tmp_path).notes if "no update of low rank" in note]

    assert notes("ties") == notes("task_arithmetic", head, bias) == []
    (note,) = notes("ties", head)
    assert note.startswith("lm_head: no update of low rank, which a recipe adds up, where mergekit runs ties")
    (note,) = notes("ties", bias)
    assert "biases of model.layers.0.self_attn.q_proj and 1 more: " in note
    assert WAY_OUT in note


def test_parameters_that_mergekit_looks_over_are_noted(tmp_path) -> None:
    own = {"density": 0.5, "lambda": 2, "normalize": True}
    found = imported(config("ties", own=own, densty=0.2, epsilon=0.1, normalize=True), tmp_path)
    assert found.options["scale"] == 1
    assert [note.removeprefix("mergekit has no parameter ") for note in found.notes] == [
        "densty in ties, either: left out.",
        "epsilon in ties, either: left out.",
        "lambda for one model in ties, either: left out.",
    ]
    assert imported(config("della", own={"density": 0.5, "epsilon": 0.1}, **{"lambda": 2}), tmp_path).notes[1:] == []
    assert "parameter density in linear" in imported(config("linear", own={"density": 1}, weight=1), tmp_path).notes[0]


def test_paths_beside_the_recipe_are_relative_and_low_rank_is_an_adapter_too(tmp_path, monkeypatch) -> None:
    mergekit_cases.write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(config("task_arithmetic")))
    assert main(["import", "config.yaml"]) == 0
    written = yaml.safe_load(Path("recipe.yaml").read_text())
    assert written["model"] == "base"
    assert written["adapters"]["legal"] == os.path.join("adapters", "legal")
    assert written["output"] == {"dir": "merged", "formats": ["lora", "model"]}
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0


def changed(**keys: Any) -> dict[str, Any]:
    return {**config("ties", own={"density": 0.5}), **keys}


def with_own(**parameters: Any) -> dict[str, Any]:
    document = copy.deepcopy(changed())
    document["models"][1]["parameters"] |= parameters
    return document


@pytest.mark.parametrize(
    ("document", "words", "elsewhere"),
    [
        *((changed(merge_method=name), rf"method: {name} has no counterpart", True) for name in WITHOUT_COUNTERPART),
        (changed(merge_method="tie"), r"found 'tie'; did you mean ties\?", True),
        (changed(merge_method="nsc_nsc"), r"merge_method: expected nsc_ and one of", False),
        (changed(slices=[{"sources": []}]), r"slices: picks layers", True),
        (changed(modules={"text": {}}), r"modules: merges the parts", True),
        (changed(chat_template="auto"), r"chat_template: changes the tokenizer", True),
        (changed(tokenizer_source="union"), r"tokenizer: a recipe keeps the base's.*found 'union'", True),
        (changed(tokenizer_source="adapters"), r"tokenizer: a recipe keeps the base's.*found 'adapters'", True),
        (changed(tokenizer={"source": "base", "tokens": {"a": 1}}), r"tokenizer: .*found 'tokens'", True),
        (changed(dtype="int64"), r"dtype: expected one of .* found 'int64'", False),
        (changed(base_model=None), r"base_model: ties adds differences", False),
        (changed(base_model="base+adapters/legal"), r"base_model: .*found one with an adapter", True),
        (changed(models=[]), r"models: expected a list", False),
        (changed(models=["base+gone"]), r"models\[0\]: expected model: with base\+adapter, found 'base", False),
        (changed(models={"model": "base"}), r"models: expected a list of models, found \{'model': 'base'\}", False),
        (changed(models=[{"modle": "base"}]), r"models\[0\]: expected model: with .*found \{'modle'", False),
        (changed(models=[{"model": 3}]), r"models\[0\]\.model: expected base\+adapter, .*found 3", False),
        (changed(models=[{"model": {"model": 3}}]), r"models\[0\]\.model\.model: expected a path .*found 3", False),
        (changed(tokenizer={"source": "union"}), r"tokenizer: a recipe keeps the base's.*found 'union'", True),
        (with_own(density=0), r"density: expected more than 0", False),
        (with_own(weight=True), r"weight: expected a number, found True", False),
        (with_own(weight=[]), r"weight: expected a number for every model, found none for legal", False),
        (changed(models=[{"model": "base"}]), r"models: .*found the base alone", False),
        (changed(models=[{"model": "base+gone"}]), r"models\[0\]\.model: .*'gone', which is no folder here", False),
        (changed(models=[{"model": "base+"}]), r"models\[0\]\.model: .*found 'base\+'", False),
        (
            changed(models=[{"model": {"model": "base", "override_architecture": "Other"}}]),
            r"models\[0\]\.model\.override_architecture: a recipe reads the base as what it is",
            True,
        ),
        (changed(models=[{"model": "base+a+b"}]), r"models\[0\]\.model: .*found 'base\+a\+b'", False),
        (changed(models=changed()["models"][:1] * 2), r"models: expected every adapter once", False),
        (changed(models=[*changed()["models"], {"model": "adapters"}]), r"models: expected adapters on one base", True),
        (changed(parameters={"rescale": True}), r"rescale: no method here scales up", True),
        (changed(parameters={"normalize": "maybe"}), r"normalize: expected true or false", False),
        (with_own(density=0.4), r"density: a method here has one density", True),
        (with_own(density=-1), r"density: expected more than 0", False),
        (with_own(density=[1, 0.5]), r"models\[1\]\.parameters\.density: changes from layer to layer", True),
        (with_own(weight=[{"filter": "mlp", "value": 1}, {"value": 0}]), r"weight: is of tensors called 'mlp'", True),
        (with_own(weight="much"), r"weight: expected a number, found 'much'", False),
        (with_own(weight=None), r"weight: expected a number for every model, found none for legal", False),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(document, words, elsewhere, tmp_path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "recipe.yaml"
    assert main(["import", str(tmp_path / "config.yaml"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(RecipeError, match=words):
        from_mergekit(tmp_path / "config.yaml")
    assert said.count("\n") == 1
    assert (WAY_OUT in said) == elsewhere


@pytest.mark.parametrize(
    ("method", "own", "shared", "words"),
    [
        ("nsc_fr", {}, {}, r"weight: nsc_fr has no weights"),
        ("nsc_ties", {"density": 0.3}, {}, r"density: nsc_ties has one for all, found 0\.3 for french"),
        ("nsc_ties", {}, {"desnity": 0.3}, r"parameters\.desnity: not an option of method 'ties'"),
        ("nsc_ties", {}, {"density": 3}, r"parameters\.density: expected"),
        ("linear", {}, {"normalize": False, "weight": 0}, r"normalize: false multiplies the base by .* 1\.5"),
        ("linear", {"weight": 0}, {"weight": 0}, r"weight: expected weights with a sum other than 0"),
        ("nsc_gone", {}, {}, r"merge_method: expected nsc_ and one of \['task_arithmetic', .*found 'nsc_gone'"),
    ],
)
def test_parameters_that_are_refused(method, own, shared, words, tmp_path) -> None:
    with pytest.raises(RecipeError, match=words):
        imported(config(method, own=own, **shared), tmp_path)


@pytest.mark.parametrize(("method", "name"), [("breadcrumbs", "gamma"), ("della_linear", "epsilon")])
def test_a_number_of_masks_is_one_for_all(method, name, tmp_path) -> None:
    document = config(method, own={"density": 0.5, name: 0.02})
    assert 0.02 in imported(document, tmp_path).options.values()
    document["models"][2]["parameters"][name] = 0.03
    with pytest.raises(RecipeError, match=rf"{name}: a method here has one {name} for all models, found .*0\.03"):
        imported(document, tmp_path)


def test_adapters_alone_have_a_base_by_name(tmp_path) -> None:
    document = config("linear", ("french", "legal"))
    for model in document["models"]:
        model["model"] = model["model"].removeprefix("base+")
    document["parameters"] = {"weight": 0.5}
    del document["base_model"]
    with pytest.raises(RecipeError, match="base_model: expected the model that .* were trained on, found none"):
        imported(document, tmp_path)
    # A folder with a model's configuration is a model, whatever lies beside it.
    whole = tmp_path / "whole"
    shutil.copytree("adapters/french", whole)
    shutil.copy("base/config.json", whole)
    document = changed(base_model=str(whole))
    with pytest.raises(RecipeError, match=f"models: expected adapters on one base, found {whole} and "):
        imported(document, tmp_path)


def test_what_is_at_out_stays_unless_force_says_otherwise(tmp_path, capsys) -> None:
    file, there, link = tmp_path / "config.yaml", tmp_path / "there.yaml", tmp_path / "link.yaml"
    file.write_text(yaml.safe_dump(config("task_arithmetic")))
    there.write_text("mine")
    link.symlink_to(file)
    before = file.read_text()
    for out, words in (
        (tmp_path, f"found the folder {tmp_path}; --out {tmp_path / 'recipe.yaml'} is one"),
        (there, f"{there} is there already; --force replaces it"),
        (link, f"{link} is the configuration itself"),
    ):
        assert main(["import", str(file), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    for out in (link, there):
        assert main(["import", str(file), "--out", str(out), "--force"]) == 2
    assert "there.yaml is there and reads as no recipe" in capsys.readouterr().err
    assert (there.read_text(), file.read_text(), link.is_symlink()) == ("mine", before, True)
    there.write_text("model: base\nadapters: {}\n")
    assert main(["import", str(file), "--out", str(there), "--force"]) == 0
    assert load_recipe(there).method == "task_arithmetic"


def test_files_that_are_none(tmp_path, capsys) -> None:
    (tmp_path / "config.yaml").write_text("- a list")
    assert main(["import", str(tmp_path / "gone.yaml")]) == 2
    assert main(["import", str(tmp_path / "config.yaml")]) == 2
    assert main(["import", str(tmp_path / "config.yaml"), "--force", "--out", str(tmp_path / "config.yaml")]) == 2
    assert main(["import", str(tmp_path / "config.yaml"), "--out", "-", "--json"]) == 2
    assert (tmp_path / "config.yaml").read_text() == "- a list"
    assert capsys.readouterr().err.count("\n") == 4

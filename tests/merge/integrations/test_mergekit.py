"""mergekit run for real: its LoRA models from factors, our methods in it, and recipes made of its configurations.

Any mergekit with the interface of 0.1.5 or of 0.1.4 that runs with the transformers at hand.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import mergekit_cases
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from mergekit_cases import WEIGHTS, config
from safetensors.torch import load_file, save_file

pytest.importorskip("mergekit", exc_type=ImportError)

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from nsc_merge import load_adapter, merge_factors
from nsc_merge.commands.main import main
from nsc_merge.integrations.mergekit import from_factors
from nsc_merge.integrations.mergekit.__main__ import command
from nsc_merge.integrations.mergekit.__main__ import main as wrapper
from nsc_merge.integrations.mergekit.one_tensor import methods
from nsc_merge.methods import METHODS
from nsc_merge.utils.option_checks import ChoiceError

EXAMPLE = Path(__file__).parents[3] / "examples" / "integrations" / "mergekit.yaml"
WORDS = hasattr(merge_methods, "registered_methods")
# The card asks the hub for every model; there is no tokenizer to copy.
QUIET = {"copy_tokenizer": False, "write_model_card": False, "quiet": True}
FLAGS = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
EQUAL_RANKS = ("linear", "robustmerge")
OF_FACTORS = ("core_space", "linear", "lora_lego", "robustmerge", "robustmerge_alg1")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With a checkpoint of each adapter in ``cache``, as mergekit writes them: making one draws random numbers."""
    folder = mergekit_cases.write_place(tmp_path_factory.mktemp("mergekit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        theirs(config("task_arithmetic"), folder / "first")
    assert len(list((folder / "cache").iterdir())) == 3
    return folder


@pytest.fixture(autouse=True)
def at(place, monkeypatch):
    """In the folder, with nothing loaded, and without the warnings about a base without a tokenizer."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    LoaderCache.loaders.clear()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    LoaderCache.loaders.clear()


def theirs(document: dict, out: Path, cache: str = "cache", **options) -> Tensors:
    """mergekit's own way: a dense checkpoint of each adapter."""
    LoaderCache.loaders.clear()
    settings = MergeOptions(lora_merge_cache=cache, **QUIET, random_seed=1, **options)
    run_merge(MergeConfiguration.model_validate(document), str(out / "merged"), settings)
    return load_file(out / "merged" / "model.safetensors")


def ours(document: dict, out: Path, **options) -> Tensors:
    """Without a folder for checkpoints, which mergekit refuses to go without."""
    LoaderCache.loaders.clear()
    settings = MergeOptions(**QUIET, random_seed=1, **options)
    with from_factors():
        run_merge(MergeConfiguration.model_validate(document), str(out / "ours"), settings)
    return load_file(out / "ours" / "model.safetensors")


def distance(found: Tensors, expected: Tensors, start: Tensors) -> float:
    """Of two merged models, relative to how far the second is from its base (Frobenius, over all tensors)."""
    assert found.keys() == expected.keys() == start.keys()
    away = sum(float((found[key].double() - value.double()).square().sum()) for key, value in expected.items())
    moved = sum(float((value.double() - start[key].double()).square().sum()) for key, value in expected.items())
    assert moved > 0
    return (away / moved) ** 0.5


def base() -> Tensors:
    return load_file("base/model.safetensors")


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("task_arithmetic", {}, {"lambda": 0.5}),
        ("ties", {"density": 0.5}, {}),
        ("dare_ties", {"density": 0.5}, {}),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.1}, {}),
        ("della", {"density": 0.5}, {}),
        ("ties", {"density": [1.0, 0.4], "weight": [{"filter": "q_proj", "value": 0.9}, {"value": 0.2}]}, {}),
    ],
)
def test_lora_models_from_factors_are_what_mergekit_makes_of_them(method, own, shared, tmp_path) -> None:
    document = config(method, own=own, **shared)
    expected, found = theirs(document, tmp_path), ours(document, tmp_path)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_nothing_of_mergekit_stays_changed(tmp_path) -> None:
    before = LoaderCache.get, ModelReference.merged
    with pytest.raises(RuntimeError, match="inside"), from_factors():
        assert (LoaderCache.get, ModelReference.merged) != before
        raise RuntimeError("inside")
    assert (LoaderCache.get, ModelReference.merged) == before


@pytest.mark.parametrize("method", [method.name for method in methods()])
def test_each_method_from_factors_and_from_checkpoints(method, tmp_path) -> None:
    document = config(f"nsc_{method}", tuple(mergekit_cases.ADAPTERS)[: 2 if method in EQUAL_RANKS else 3])
    weighted = METHODS[method].weighted in METHODS[method].option_names
    for model in document["models"] if not weighted else ():
        model["parameters"] = {}
    found, start = ours(document, tmp_path), base()
    names = [model["model"] for model in document["models"]]
    weights = dict(zip(names, WEIGHTS, strict=False))
    options: dict = {}
    if method == "task_arithmetic":
        options["scale"] = {name: 0.4 * weight for name, weight in weights.items()}
    elif weighted:
        options["weights"] = weights
    if "trim_scope" in METHODS[method].option_names:
        options["trim_scope"] = "tensor"
    adapters = {name: load_adapter(name.partition("+")[2], name).factors for name in names}
    expected = dict(start)
    for path in {path for factors in adapters.values() for path in factors}:
        # As tensors are called in files, which is what drops of entries are drawn by.
        name = f"{path}.weight"
        one = {task: {name: factors[path]} if path in factors else {} for task, factors in adapters.items()}
        ((_, merged),) = merge_factors(one, method, **options)
        expected[name] = (start[name].double() + merged.delta()).float()
    assert distance(found, expected, start) < 1e-6
    if method in OF_FACTORS:
        with pytest.raises(ValueError, match=r"depends on how an update is factored"):
            theirs(document, tmp_path)
    else:
        assert distance(theirs(document, tmp_path), found, start) < 1e-5


@pytest.mark.skipif(not WORDS, reason="configurations of mergekit 0.1.4 hold numbers only")
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_our_ties_with_their_preset_is_theirs_in_models_trained_in_full(density, tmp_path) -> None:
    """Of every tensor: matrices, embeddings and the vectors of norms."""
    generator = torch.Generator().manual_seed(3)
    for name in ("full-a", "full-b"):
        changed = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in base().items()}
        copied(tmp_path / name, changed)
    document = {
        "merge_method": "ties",
        "base_model": "base",
        "dtype": "float32",
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": weight, "density": density}}
            for name, weight in (("full-a", 0.7), ("full-b", 0.4))
        ],
    }
    expected = theirs(document, tmp_path)
    document["merge_method"] = "nsc_ties"
    for model in document["models"]:
        del model["parameters"]["density"]
    document["parameters"] = {"preset": "mergekit", "density": density}
    assert distance(theirs(document, tmp_path), expected, base()) < 1e-6
    # What looks at no single entries adds vectors up.
    document["merge_method"], document["parameters"] = "nsc_svd", {"scale": 0.5}
    key = "model.norm.weight"
    full = [load_file(tmp_path / name / "model.safetensors")[key] - base()[key] for name in ("full-a", "full-b")]
    found = theirs(document, tmp_path)[key] - base()[key]
    torch.testing.assert_close(found, 0.5 * (0.7 * full[0] + 0.4 * full[1]), rtol=0, atol=1e-6)


def copied(folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(Path("base/config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("linear", {}, {}),
        ("task_arithmetic", {}, {"normalize": True, "lambda": 0.8}),
        ("ties", {"density": 0.5}, {}),
        ("ties", {"density": 0.3, "weight": -0.4}, {"normalize": False, "lambda": 0.7, "int8_mask": True}),
        ("dare_ties", {}, {"normalize": True}),
        ("breadcrumbs", {"density": 1.0}, {}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, {"normalize": True}),
        ("breadcrumbs_ties", {}, {}),
        ("breadcrumbs_ties", {"density": 0.95, "gamma": 0.1}, {"rescale": True, "lambda": 0.6}),
        ("della", {}, {}),
        ("nsc_knots_ties", {}, {"density": 0.4}),
        ("nsc_ties", {}, {}),
    ],
)
def test_a_recipe_made_of_a_configuration_is_what_mergekit_computes(method, own, shared, tmp_path) -> None:
    document = config(method, own=own, **shared)
    if method == "linear":
        del document["base_model"]
    expected = (ours if method.startswith("nsc_") else theirs)(document, tmp_path)
    found = by_recipe(document, tmp_path)
    assert distance(found, expected, base()) < 1e-6


def by_recipe(document: dict, folder: Path) -> Tensors:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(document))
    recipe, out = folder / "recipe.yaml", folder / "by-recipe"
    assert main(["import", str(folder / "mergekit.yaml"), "--out", str(recipe)]) == 0
    # Float32 as mergekit's configuration says.
    assert main(["run", str(recipe), f"output.dir={json.dumps(str(out))}", "output.formats=[model]", "device=cpu"]) == 0
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_is_dropped_at_random_agrees_in_its_statistics(method, tmp_path) -> None:
    """One adapter of weight 1: what is left of each module has the same sum of magnitudes as before, and as many
    entries as the density says, up to four standard deviations.
    """
    document = config(method, ("french",), own={"weight": 1.0, "density": 0.6})
    start = base()
    full = load_adapter("adapters/french", "french").factors
    for found in (theirs(document, tmp_path), by_recipe(document, tmp_path)):
        kept = total = 0
        for path, factor in full.items():
            name, delta = f"{path}.weight", factor.delta()
            change = found[name].double() - start[name].double()
            there = change.abs() > 1e-3 * delta.abs()
            torch.testing.assert_close(change.abs().sum(), delta.abs().sum(), rtol=1e-4, atol=0)
            ratio = change[there] / delta[there]
            # Tiny entries of a sum with a weight are rounding.
            torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=0.05, atol=0)
            kept, total = kept + int(there.sum()), total + delta.numel()
        assert abs(kept / total - 0.6) < 4 * (0.6 * 0.4 / total) ** 0.5


def test_the_command_and_the_example(place, tmp_path, monkeypatch) -> None:
    out = tmp_path / "merged"
    asked = []
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id, **options: asked.append(repo_id))
    assert wrapper([str(EXAMPLE), str(out), *(flag for flag in FLAGS if "card" not in flag)]) == 0
    assert not asked  # the hub, about folders
    assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in out.iterdir()}
    document = yaml.safe_load(EXAMPLE.read_text())
    found = load_file(out / "model.safetensors")
    assert distance(by_recipe(document, tmp_path), found, base()) < 1e-6
    assert distance(found, base(), found) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "nsc_fr", "parameters": {}}, r"weight: nsc_fr has no weights; expected 1 .* found 0\.6"),
        ({"parameters": {"desnity": 0.3}}, r"parameters: expected of nsc_knots_ties .* found desnity"),
        ({"parameters": {"density": 3.0}}, r"density: expected"),
    ],
)
def test_what_is_refused_in_mergekit(change, words, tmp_path, capsys) -> None:
    document = {**yaml.safe_load(EXAMPLE.read_text()), **change}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=words):
        wrapper([str(tmp_path / "config.yaml"), str(tmp_path / "out"), *FLAGS])
    assert command([str(tmp_path / "config.yaml"), str(tmp_path / "out"), *FLAGS]) == 2
    assert re.search(f"^error: {words}", capsys.readouterr().err, re.MULTILINE)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(not WORDS, reason="configurations of mergekit 0.1.4 hold numbers only")
@pytest.mark.parametrize(("name", "value"), [("trim_scope", "global"), ("preset", "mergekti")])
def test_words_that_are_refused(name, value, tmp_path) -> None:
    document = config("nsc_ties", **{name: value})
    expected = ValueError if name == "trim_scope" else ChoiceError
    with pytest.raises(expected, match=f"{name}: .*expected"):
        ours(document, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "runs DoRA|DoRA"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_are_more_than_updates_are_refused(settings, words, tmp_path) -> None:
    from transformers import LlamaForCausalLM
    from zoo import write_adapter

    other = write_adapter(LlamaForCausalLM.from_pretrained("base"), tmp_path / "other", 9, r=2, **settings)
    document = config("task_arithmetic", ("french",))
    document["models"].append({"model": f"base+{other}", "parameters": {"weight": 0.5}})
    with pytest.raises(ValueError, match=words):
        ours(document, tmp_path)


def test_biases_and_modules_trained_in_full(tmp_path) -> None:
    """What an adapter holds beside its updates is in the model that it makes."""
    from transformers import LlamaForCausalLM
    from zoo import write_adapter

    model = LlamaForCausalLM.from_pretrained("base")
    other = write_adapter(
        model, tmp_path / "other", 9, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    document = config("ties", ("french",))
    document["models"].append({"model": f"base+{other}", "parameters": {"weight": 0.5}})
    expected, found = theirs(document, tmp_path), ours(document, tmp_path)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not torch.equal(found["lm_head.weight"], base()["lm_head.weight"])


@pytest.mark.parametrize("case", ["an adapter on the base", "another base", "a model on another base"])
def test_an_update_counts_from_the_base_of_the_merge_whatever_the_adapter_is_on(case, tmp_path) -> None:
    generator = torch.Generator().manual_seed(3)
    other = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in base().items()}
    copied(tmp_path / "other", other)
    document = config("task_arithmetic", ("french", "legal"))
    if case == "an adapter on the base":
        document["base_model"] = "base+adapters/medical"
    elif case == "another base":
        document["base_model"] = str(tmp_path / "other")
    else:
        document["models"][0]["model"] = f"{tmp_path / 'other'}+adapters/french"
    expected = theirs(document, tmp_path, str(tmp_path / "cache"))
    document |= {"merge_method": "nsc_task_arithmetic", "parameters": {"scale": 1.0}}
    start = other if case == "another base" else base()
    assert distance(ours(document, tmp_path), expected, start) < 1e-6


def test_what_the_base_s_files_have_no_place_for_is_refused_with_a_way_that_merges_it(tmp_path, monkeypatch) -> None:
    from transformers import LlamaForCausalLM
    from zoo import write_adapter

    model = LlamaForCausalLM.from_pretrained("base")
    other = write_adapter(model, tmp_path / "other", 9, r=2, target_modules=["q_proj"], lora_bias=True)
    document = config("task_arithmetic", ("french",))
    document["models"].append({"model": f"base+{other}", "parameters": {"weight": 0.5}})
    with pytest.raises(ValueError, match=r"changes \S+q_proj\.bias, .* nsc-merge import .*formats: \[lora\]"):
        ours(document, tmp_path)
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(document))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "by-recipe"
    assert main(["import", str(tmp_path / "mergekit.yaml"), "--out", str(recipe)]) == 0
    assert main(["run", str(recipe), f"output.dir={json.dumps(str(out))}", "output.formats=[lora]"]) == 0


def test_half_precision_is_rounded_as_mergekit_rounds_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(mergekit_cases.write_place(tmp_path, torch.bfloat16))
    document = {**config("task_arithmetic"), "dtype": "bfloat16"}
    expected, found = theirs(document, tmp_path), ours(document, tmp_path)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    document["dtype"] = "float32"
    wide = {"lora_merge_dtype": "float32"}
    expected = theirs(document, tmp_path / "wide", "wide-cache", **wide)
    found = ours(document, tmp_path / "wide", **wide)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_our_methods_do_not_round_updates_to_the_base_s_dtype(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(mergekit_cases.write_place(tmp_path, torch.bfloat16))
    exact = {key: value.double() for key, value in base().items()}
    for name, weight in zip(mergekit_cases.ADAPTERS, WEIGHTS, strict=True):
        for path, factor in load_adapter(f"adapters/{name}", name).factors.items():
            exact[f"{path}.weight"] += weight * factor.delta()
    assert distance(theirs(config("task_arithmetic"), tmp_path), exact, base()) > 1e-3
    found = ours(config("nsc_task_arithmetic", scale=1.0), tmp_path)
    assert distance(found, exact, base()) < 1e-6
    assert distance(by_recipe(config("task_arithmetic"), tmp_path), exact, base()) < 1e-6

"""The JSON schema of recipes: what is run it takes, what is refused it refuses."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from contextlib import nullcontext
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli_cases import make_place
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import build

from nsc_merge.commands import run
from nsc_merge.methods import METHODS
from nsc_merge.methods.method import Method
from nsc_merge.models.bases.placement import device_of
from nsc_merge.recipes import merge_recipe, preflight
from nsc_merge.recipes.adapter_keys import ADAPTER_KEYS
from nsc_merge.recipes.calibration_keys import DATA_KEYS
from nsc_merge.recipes.merge_recipe import load_recipe
from nsc_merge.recipes.placement_keys import DEVICE_MAPS, DTYPES, PLACEMENT_KEYS, QUANTIZATIONS, placement_keys
from nsc_merge.recipes.schema import described, schema
from nsc_merge.recipes.yaml_keys import RecipeError
from nsc_merge.results.layout import FORMATS, OPTIONS_OF_RUN
from nsc_merge.utils.errors import UsageError
from nsc_merge.utils.option_checks import ChoiceError
from nsc_merge.utils.yaml_text import from_yaml

ROOT = Path(__file__).parents[3]
SCHEMA = schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
LEAST = {"model": "base", "adapters": {"a": "adapters/a"}, "output": {"dir": "merged"}}


def complaints(document) -> list[str]:
    """What the schema says of a document, keys as JSON has them."""
    found = VALIDATOR.iter_errors(json.loads(json.dumps(document)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def options(method: str) -> dict:
    rule = next(rule for rule in SCHEMA["allOf"] if rule["if"]["properties"]["method"]["const"] == method)
    return rule["then"]["properties"]["options"]["properties"]


def test_what_a_check_refuses_says_what_it_would_take():
    message = r"^dead: expected one of \['init', 'tie_previous', 'zero'\], found 'x'$"
    with pytest.raises(ChoiceError, match=message) as caught:
        METHODS["nsc"].resolved({"dead": "x"}, ["a"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name, again.choices) == (str(caught.value), "dead", ["init", "tie_previous", "zero"])


def test_it_is_a_schema_of_its_draft():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_of_a_recipe_is_in_it_and_said():
    assert set(SCHEMA["properties"]) == set(merge_recipe._KEYS) >= {*PLACEMENT_KEYS}
    output = SCHEMA["properties"]["output"]
    assert set(output["properties"]) == set(merge_recipe._OUTPUT_KEYS)
    adapter, source = (SCHEMA["properties"][key]["additionalProperties"]["anyOf"][1] if key == "adapters" else
                       SCHEMA["properties"][key]["anyOf"][0]["additionalProperties"]["anyOf"][1]
                       for key in ("adapters", "calibration"))  # fmt: skip
    data = SCHEMA["properties"]["data"]["anyOf"][0]
    assert set(adapter["properties"]) == set(ADAPTER_KEYS)
    assert set(data["properties"]) == set(DATA_KEYS) == set(source["properties"]) - {"source"}
    keys = {**adapter["properties"], **source["properties"], **SCHEMA["properties"], **output["properties"]}
    assert [name for name, key in keys.items() if not key.get("description") and name != "output"] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_in_it_and_said(method):
    found = options(method)
    assert set(found) == set(METHODS[method].option_names) - set(OPTIONS_OF_RUN)
    assert [name for name, option in found.items() if not option["description"]] == []
    defaults = {name: option["default"] for name, option in found.items() if "default" in option}
    assert complaints({**LEAST, "method": method, "options": defaults}) == []


def test_choices_and_defaults_are_those_of_the_code():
    nsc = options("nsc")
    assert nsc["dead"] == {
        "enum": ["init", "tie_previous", "zero"],
        "default": "init",
        "description": nsc["dead"]["description"],
    }
    assert {"llm", "vision", "vlm"} < set(nsc["recipe"]["anyOf"][0]["enum"])
    # Which depend on the family.
    assert "default" not in nsc["steps"]
    assert options("match")["steps"]["default"] == 100
    assert options("ties")["preset"]["enum"][:2] == ["canonical", "peft"]
    assert SCHEMA["properties"]["dtype"]["enum"] == list(DTYPES)
    assert SCHEMA["properties"]["data"]["anyOf"][0]["properties"]["padding_side"]["enum"] == ["right", "left"]


def test_what_an_option_is_comes_from_the_class_that_explains_it():
    assert options("nsc")["lr"]["description"].startswith("Learning rate. Adam moves a coefficient")
    assert described(METHODS["nsc"].options)["schedule"].startswith("Of the learning rate over the steps")
    assert not any("``" in one["description"] for method in METHODS for one in options(method).values())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"modle": "base"}, "modle"),
        ({"model": 3}, "model"),
        ({"adapters": {}}, "adapters"),
        ({"adapters": ["a"]}, "adapters"),
        ({"method": "nsk"}, "method"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "32"}, "batch_size"),
        ({"options": {"stpes": 3}}, "stpes"),
        ({"options": {"steps": "many"}}, "options.steps"),
        ({"options": {"lr": "1e-3x"}}, "options.lr"),
        ({"options": {"dead": "nought"}}, "options.dead"),
        ({"options": {"state_to": "file"}}, "state_to"),
        ({"method": "task_arithmetic", "options": {"steps": 3}}, "steps"),
        ({"dtype": "float8"}, "dtype"),
        ({"device": "gpu"}, "device"),
        ({"device_map": {}}, "device_map"),
        ({"device_map": {"lm_head": "tpu"}}, "device_map"),
        ({"max_memory": {"cpu": "20 apples"}}, "max_memory"),
        ({"quantization": "int3"}, "quantization"),
        ({"full_hash": "yes"}, "full_hash"),
        ({"revision": 3}, "revision"),
        ({"trust_remote_code": "yes"}, "trust_remote_code"),
        ({"adapters": {"a": {"revision": "main"}}}, "adapters.a"),
        ({"adapters": {"a": {"adapter": "owner/a", "branch": "main"}}}, "adapters.a"),
        ({"calibration": {"a": {"text": "prompt"}}}, "calibration"),
        ({"data": {"max_length": 0}}, "data"),
        ({"data": {"sample": 3}}, "data"),
        ({"data": {"padding_side": "middle"}}, "data"),
        ({"data": {"trust_remote_code": True}}, "data"),
        ({"labels": {"a": []}}, "labels"),
        ({"labels": {"a": [1, 2]}}, "labels"),
        ({"output": {"dir": "merged", "push_to_hub": "name"}}, "output.push_to_hub"),
        ({"output": {"dir": "merged", "head": 3}}, "output.head"),
        ({"output": {"formats": ["lora"]}}, "dir"),
        ({"output": {"dir": "merged", "formats": []}}, "output.formats"),
        ({"output": {"dir": "merged", "formats": ["gguf"]}}, "output.formats"),
        ({"output": {"dir": "merged", "max_shard_size": "5 apples"}}, "output.max_shard_size"),
        ({"output": {"dir": "merged", "rank": 0}}, "output.rank"),
    ],
)
def test_what_is_refused_by_a_recipe_is_refused(change, key):
    assert complaints(LEAST) == []
    found = complaints({**LEAST, **change})
    assert len(found) >= 1
    assert any(key in one for one in found), found


@pytest.mark.parametrize(
    ("method", "given", "wrong"),
    [
        ("nsc", {"family": {"block": r"layers\.(\d+)\.", "score_modules": ["v_proj"]}}, {"family": "llama"}),
        ("match", {"family": {"causal": True}}, {"family": ["llama"]}),
        ("distill", {"regmean": {"off_diagonal": 0.9}, "family": None}, {"regmean": "yes"}),
    ],
)
def test_mappings_are_options_where_a_method_takes_them(method, given, wrong):
    """As docs/architectures.md has a family in a recipe."""
    METHODS[method].resolved(given, ["a"])
    assert complaints({**LEAST, "method": method, "options": given}) == []
    assert complaints({**LEAST, "method": method, "options": wrong}) != []


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "cuda", "cuda:1", "gpu", "mps:0", "cuda:one", "CPU"])
def test_devices_are_those_that_there_may_be(monkeypatch, name):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with nullcontext() if complaints({**LEAST, "device": name}) == [] else pytest.raises(ValueError, match="device"):
        device_of(name)


@pytest.mark.parametrize("size", ["20GiB", "20 GIB", "20gib", "1.5Mb", ".5kB", "20", "20G", "20TiB", "GB"])
def test_sizes_are_written_as_a_recipe_takes_them(size):
    given = {"device_map": "auto", "max_memory": {"cpu": size}}
    with nullcontext() if complaints({**LEAST, **given}) == [] else pytest.raises(RecipeError, match="max_memory.cpu"):
        placement_keys(given)


def test_the_least_of_all_that_is_counted_is_taken():
    least = {
        "batch_size": 1,
        "data": {"max_length": 1, "samples": 1, "seed": 0},
        "labels": {"a": ["x"]},
        "device_map": {"lm_head": 0},
        "output": {"dir": "merged", "formats": ["lora"], "rank": 1},
    }
    assert complaints({**LEAST, **least}) == []
    assert complaints({**LEAST, "device_map": "auto", "max_memory": {"cpu": 0, "0": "1GB"}}) == []


def test_nothing_is_required_but_model_adapters_and_output():
    for name in LEAST:
        without = {key: value for key, value in LEAST.items() if key != name}
        assert complaints(without) == [f": {name!r} is a required property"]


def test_the_recipes_of_help_documents_and_tests_are_taken(tmp_path):
    shown = [yaml.safe_load(block) for block in recipes_in(run._RUN)]
    assert len(shown) == 1
    shown.append(yaml.safe_load((make_place(build("llama-cls"), tmp_path) / "recipe.yaml").read_text()))
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")):
        if file.exists():
            shown += [yaml.safe_load(block) for block in recipes_in(file.read_text(encoding="utf-8"))]
    for document in shown:
        assert complaints(document) == [], document


def recipes_in(text: str) -> list[str]:
    """Blocks of indented text that begin with a recipe's first key and hold its second."""
    blocks = re.findall(r"^( *)(model: \S.*\n(?:\1[ \w#].*\n|\n)+)", text, re.MULTILINE)
    found = ["".join(line.removeprefix(indent) for line in block.splitlines(True)) for indent, block in blocks]
    return [block for block in found if re.search(r"^adapters:", block, re.MULTILINE)]


def test_the_help_of_run_is_a_recipe(capsys):
    parser = argparse.ArgumentParser()
    run.add(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["run", "--help"])
    assert "model: base" in capsys.readouterr().out


SIZES = st.from_regex(r"[0-9]{1,3}(\.[0-9])? ?[KkMmGg][Bb]", fullmatch=True)
NAMES = st.text(min_size=1, max_size=8)
SETTINGS = st.sampled_from([None, True, 0, 7, "left", "middle", "{a}", "owner/name"])
PLACES = st.one_of(st.integers(0, 7), st.sampled_from(["cpu", "disk", "cuda", "cuda:1"]))


def value_of(option: str, method: Method) -> st.SearchStrategy:
    """Values that might be an option's: those of its default's kind, of its choices, and others."""
    listed = [
        value
        for one in (options(method.name)[option], *options(method.name)[option].get("anyOf", ()))
        for value in one.get("enum", ())
    ]
    kinds = [
        st.none(),
        st.booleans(),
        st.integers(-2, 50),
        st.floats(0, 1, allow_nan=False),
        st.sampled_from(["1e-3", "2.5E-4", "1e2x"]),
        st.dictionaries(st.just("a"), st.floats(0, 1), min_size=1),
        st.lists(st.integers(0, 3), min_size=1, max_size=2),
        st.lists(NAMES, min_size=1, max_size=2),
    ]
    return st.one_of(*([st.sampled_from(listed)] * 3 if listed else []), *kinds)


@st.composite
def recipes(draw) -> dict:
    """Recipes of one task, right or wrong."""
    adapter = st.sampled_from(
        ["a", "owner/name", "owner/name@v1", {"adapter": "owner/name", "revision": "v1"}, {"adapter": "a"}, {}]
    )
    document: dict = {"model": draw(st.sampled_from(["base", "owner/name"])), "adapters": {"a": draw(adapter)}}
    method = draw(st.sampled_from(sorted(METHODS)))
    if draw(st.booleans()) or method != "nsc":
        document["method"] = method
    known = sorted(options(method))
    if known and draw(st.booleans()):
        given = draw(st.lists(st.sampled_from(known), max_size=2, unique=True))
        document["options"] = {name: draw(value_of(name, METHODS[method])) for name in given}
    keys = {
        "revision": st.one_of(st.none(), st.just("main"), st.just(3)),
        "trust_remote_code": st.sampled_from([True, False, "no"]),
        "calibration": st.sampled_from(
            [None, {}, {"a": "a"}, {"b": "a"}, {"a": {"source": "a", "samples": None}}, {"a": {"text": "a"}}]
        ),
        "data": st.one_of(st.none(), st.dictionaries(st.sampled_from(DATA_KEYS), SETTINGS, max_size=2)),
        "labels": st.sampled_from(
            [None, {}, {"a": ["x", "y"]}, {"a": {0: "x"}}, {"a": [1]}, {"a": []}, {"a": "a.txt"}]
        ),
        "batch_size": st.integers(-1, 64),
        "shared_modules": st.sampled_from(["lambda", "mean", "first", "last"]),
        "dora": st.sampled_from(["exact", "refuse", "convert", "keep"]),
        "added_tokens": st.sampled_from(["refuse", "mean", "first", "base", "all"]),
        "dtype": st.sampled_from([*DTYPES, "int8"]),
        "device": st.sampled_from(["auto", "cpu"]),
        "device_map": st.one_of(
            st.none(), st.sampled_from([*DEVICE_MAPS, "some"]), st.dictionaries(NAMES, PLACES, max_size=2)
        ),
        "max_memory": st.one_of(st.none(), st.dictionaries(st.one_of(st.just("cpu"), st.integers(0, 3)), SIZES)),
        "quantization": st.one_of(st.none(), st.sampled_from([*QUANTIZATIONS, "int3"])),
        "full_hash": st.booleans(),
    }
    for name in draw(st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True)):
        document[name] = draw(keys[name])
    output: dict = {"dir": "merged"}
    more = {
        "formats": st.one_of(st.sampled_from(FORMATS), st.lists(st.sampled_from([*FORMATS, "gguf"]), max_size=3)),
        "rank": st.one_of(st.none(), st.integers(0, 9)),
        "max_shard_size": st.one_of(st.none(), SIZES, st.just("5")),
        "dequantize": st.booleans(),
        "plots": st.booleans(),
        "head": st.sampled_from([None, "a", "b"]),
        "push_to_hub": st.sampled_from([None, "owner/name", "name"]),
        "private": st.booleans(),
    }
    for name in draw(st.lists(st.sampled_from(sorted(more)), max_size=2, unique=True)):
        output[name] = draw(more[name])
    return {**document, "output": output}


def test_what_the_checks_of_a_recipe_accept_is_accepted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("base", "a"):
        (folder / name).mkdir()
    (folder / "a.txt").write_text("x\ny\n")
    accepted = []

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(recipes())
    def check(document):
        text = yaml.safe_dump(document, allow_unicode=True)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(folder / "recipe.yaml")
            with preflight.options_at_fault(recipe, always=True):
                METHODS[recipe.method].resolved(recipe.options, list(recipe.adapters))
        except UsageError:
            return
        read = from_yaml(text)
        assert not any(isinstance(one, float) and math.isnan(one) for one in (read.get("options") or {}).values())
        assert complaints(read) == []
        accepted.append(document)

    check()
    assert len(accepted) >= 10

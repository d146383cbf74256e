"""What a dry run says of memory, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cli_cases import make_place
from zoo import build

from nsc_merge.commands.main import main
from nsc_merge.processes.group import Group
from nsc_merge.recipes.forecast import prospect
from nsc_merge.recipes.forecast.prospect import prospect_of
from nsc_merge.recipes.merge_recipe import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))


def read(place, *overrides):
    return load_recipe(place / "recipe.yaml", ["device=cpu", f"output.dir={place / 'merged'}", *overrides])


def by_name(found):
    return {way["way"]: way for way in found["ways"]}


def test_every_way_of_holding_the_base_has_its_price(place):
    found = prospect_of(read(place))
    ways = by_name(found)
    assert list(ways) == ["one device", "checkpointing", "device_map", "2 ranks", "4 ranks", "8 ranks"]
    one = ways["one device"]
    assert found["ways"][found["way"]] is one
    weights = sum(value.numel() * value.element_size() for value in build("llama-cls").parameters())
    assert one["parts"]["weights"] == weights
    assert one["bytes"] == sum(one["parts"].values())
    assert (one["received"], one["loaded"]) == (0, 0)
    assert ways["checkpointing"]["parts"]["activations"] < one["parts"]["activations"]
    assert ways["checkpointing"]["operations"] > one["operations"] > ways["2 ranks"]["operations"]
    assert ways["device_map"]["loaded"] > 0
    assert 0 < ways["2 ranks"]["received"] < ways["4 ranks"]["received"]


def test_the_recipe_says_which_way_is_its_own(place):
    spread = prospect_of(read(place, "device=auto", "device_map=auto", "options.checkpointing=true"))
    assert spread["ways"][spread["way"]]["way"] == "device_map"
    assert "checkpointing" not in by_name(spread)
    plain, narrow = prospect_of(read(place)), prospect_of(read(place, "dtype=bfloat16"))
    halves = [found["ways"][0]["parts"]["weights"] for found in (plain, narrow)]
    assert halves[0] == 2 * halves[1]
    # Four ranks of two tasks on queries and values of three blocks; on a CPU and in single precision also the merged
    # weights of all but the last values, which are measured.
    bank, folded = 4 * 2 * 4 * 3 * (64 + 48), 4 * (3 * 32 * 32 + 2 * 32 * 16)
    assert [found["ways"][0]["parts"]["adapters"] for found in (plain, narrow)] == [bank + folded, bank / 2]
    packed = prospect_of(read(place, "quantization=bitsandbytes-4bit", "output.formats=lora"))
    # Four bits, and four bytes for every 64; norms, embeddings and the head stay as they were.
    base = build("llama-cls")
    linears = sum(one.numel() for path, one in base.named_parameters() if "proj" in path)
    assert packed["ways"][0]["parts"]["weights"] == halves[0] - 4 * linears + (4 / 8 + 4 / 64) * linears


@pytest.mark.parametrize("method", ["match", "task_arithmetic"])
def test_methods_that_measure_nothing_have_none(place, method):
    assert prospect_of(read(place, "options=", f"method={method}")) is None


def test_on_a_gpu_nothing_is_folded_and_its_memory_is_shared_with_nobody(place, monkeypatch):
    monkeypatch.setattr(prospect, "device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr(prospect, "free_memory", lambda device: 0.0)
    monkeypatch.setattr(prospect, "launched_here", lambda: 2)
    for there, fits in ((150_000, False), (170_000, True), (0, True)):
        # Of some devices it is not known how much there is.
        monkeypatch.setattr(prospect, "total_memory", lambda device, there=there: there)
        found = prospect_of(read(place))
        one = found["ways"][0]
        assert (found["device_bytes"], one["fits"]) == (there, fits)
        assert one["parts"]["adapters"] == 4 * 2 * 4 * 3 * (64 + 48)


def test_of_a_base_quantised_by_others_there_is_none(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    stored = {"quant_method": "fp8", "modules_to_not_convert": []}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": stored}))
    assert prospect_of(read(place, f"model={tmp_path / 'base'}")) is None


def test_what_does_not_fit_is_not_loaded(place, monkeypatch, capsys):
    monkeypatch.setattr(prospect, "total_memory", lambda device: 170_000)
    command = ["run", str(place / "recipe.yaml"), "--dry-run", "device=cpu", "options.batch_tasks=true"]
    assert main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert "loading" not in shown.err
    ways = by_name(json.loads(shown.out)["prospect"])
    assert not ways["one device"]["fits"]
    assert ways["8 ranks"]["fits"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "): does not fit\n" in shown
    assert "note      nothing was loaded or tried, since it does not fit" in shown
    assert "2 ranks: " in shown
    assert not (place / "merged").exists()


def test_processes_of_one_cpu_share_its_memory(place, monkeypatch):
    monkeypatch.setattr(prospect, "total_memory", lambda device: 300_000)
    monkeypatch.setattr(prospect, "current", lambda: Group(0, 2))
    for here, fits in (("1", True), ("2", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        found = prospect_of(read(place, "options.batch_tasks=true"))
        own = found["ways"][found["way"]]
        assert (own["way"], own["fits"]) == ("2 ranks", fits)
        assert found["device_bytes"] == 300_000 // int(here)
        assert (own["bytes"] <= found["device_bytes"]) is fits
        # The others would be alone there.
        assert 150_000 < found["ways"][0]["bytes"] < 300_000
        assert found["ways"][0]["fits"]


def test_the_rate_of_the_steps_tried_times_the_other_ways(place, capsys):
    command = ["run", str(place / "recipe.yaml"), "--dry-run", "device=cpu", f"output.dir={place / 'merged'}"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    one = plan["prospect"]["ways"][0]
    assert plan["prospect"]["operations_per_second"] == pytest.approx(one["operations"] / plan["seconds_per_step"])
    assert one["parts"]["weights"] == plan["weights_bytes"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "estimate  one device: " in shown
    assert "s a step to compute; " in shown

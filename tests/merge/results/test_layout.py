"""Names of tasks on disk: distinct on any file system, the same each time, found again."""

from __future__ import annotations

import dataclasses
import itertools
import os
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import nsc_merge
from nsc_merge.evaluation.candidates import open_saved
from nsc_merge.results.layout import file_names, found_as, is_ours

# Each is one name to some file system, or was to an earlier release.
ALIKE = [
    ("depth v1", "depth_v1"),
    ("SST2", "sst2"),
    ("a/b", "a_b"),
    ("../c", "_c"),
    ("café", unicodedata.normalize("NFD", "café")),
    ("straße", "STRASSE"),
    ("x" * 300, "x" * 300 + "y"),
    ("é" * 150, "é" * 150 + "x"),
    ("a", "a "),
    ("a", "a."),
    ("hidden", ".hidden"),
    ("", "task"),
    ("con", "CON.txt"),
    ("a\nb", "a b"),
    ("\ud800", "_"),
]


@pytest.mark.parametrize("pair", ALIKE)
def test_names_are_distinct_for_every_file_system(pair):
    names = list(file_names(pair).values())
    folded = {unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()) for name in names}
    assert len(folded) == 2
    for name in names:
        assert len(os.fsencode(f"{name}.safetensors")) <= 255
        assert not set(name) & set('/\\:*?"<>| \n')
        assert name.strip(". ") == name != ""
        assert name.lower() not in ("con", "con.txt")
    assert dict(zip(reversed(pair), reversed(names), strict=True)) == file_names(reversed(pair))


def test_simple_names_stand_for_themselves():
    simple = ["plain", "depth_v1", "MNIST", "a.b", "x-1", "深度", "naïve", "x" * 200]
    assert file_names(simple) == dict(zip(simple, simple, strict=True))


def test_random_names_never_meet():
    names = ["".join(parts) for length in range(4) for parts in itertools.product("aA_. /+é", repeat=length)]
    assert len({name.casefold() for name in file_names(names).values()}) == len(names)


def test_only_names_of_our_own_layout_are_ours():
    ours = ["README.md", "lora/adapter_config.json", "tasks/a+0/model/model-00001-of-00002.safetensors"]
    ours += ["heads/a.safetensors", "tasks/a/config.json", "losses.png"]
    assert all(map(is_ours, ours))
    foreign = ["notes.txt", "../README.md", "/README.md", "tasks/../README.md/x", "lora/notes.txt", "README.md\n", ""]
    foreign += ["other/config.json", "tasks/config.json/x", "heads/../a.safetensors", "heads/deep/a.safetensors"]
    assert not any(map(is_ours, foreign))



@pytest.mark.parametrize("pair", ALIKE[:-1])
def test_updates_and_heads_of_two_tasks_are_saved_and_read_back(model, folders, tmp_path, pair):
    adapters = {
        name: dataclasses.replace(
            nsc_merge.load_adapter(folders[source], source), trained={"head.weight": torch.full((2, 2), float(number))}
        )
        for number, (name, source) in enumerate(zip(pair, ("plain", "mixed"), strict=True))
    }
    result = nsc_merge.merge(model, adapters, method="finetuned")
    out = result.save(tmp_path / "out", "lora")
    suite = SimpleNamespace(model=model, adapters=adapters)
    for number, (task, one) in enumerate(open_saved(out, suite).items()):
        for path in result.for_task(task).paths:
            torch.testing.assert_close(one.delta(path), result.for_task(task).delta(path), rtol=1e-6, atol=1e-6)
        head = load_file(found_as(out / "heads", task, ".safetensors"))
        assert head["head.weight"].eq(number).all()
    assert len(list((out / "heads").iterdir())) == len(list((out / "tasks").iterdir())) == 2

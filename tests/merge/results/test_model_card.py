"""What a card says can be followed: its code is run, and gives what was merged."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from zoo import KINDS, build, outputs, write_adapter

import nsc_merge
from nsc_merge.adapters import About
from nsc_merge.results.beside.serving_notes import serving_notes
from nsc_merge.results.layout import found_as

CLASSES = 10


def code_of(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(params=["vit", "llama-cls"])
def trained(request, tmp_path):
    """A base with two or three labels, and adapters that brought heads of ten."""
    model = build(request.param)
    head = next(name for name, _ in model.named_parameters() if re.search(r"(classifier|score)\.weight", name))
    assert model.get_parameter(head).shape[0] != CLASSES
    adapters = {}
    for seed, task in enumerate(("digits", "more digits")):
        folder = write_adapter(model, tmp_path / str(seed), seed, target_modules=KINDS[request.param].targets)
        heads = {head: torch.randn(CLASSES, model.get_parameter(head).shape[1])}
        if "classifier" in head:
            heads["classifier.bias"] = torch.randn(CLASSES)
        adapters[task] = replace(nsc_merge.load_adapter(folder, task), trained=heads)
    return request.param, model, adapters


@pytest.mark.parametrize("format", ["model", "lora"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["task_arithmetic", "finetuned"])
def test_the_code_of_a_card_loads_the_merge_and_a_head_of_another_size(
    trained, tmp_path, monkeypatch, format, nested, method
):
    kind, model, adapters = trained
    options = {"scale": 0.5} if method == "task_arithmetic" else {}
    result = nsc_merge.merge(model, adapters, method=method, **options)
    out = result.save(tmp_path / "out", [format] if nested else format)
    monkeypatch.chdir(out)
    names = {"base_model": copy.deepcopy(model)}
    for block in code_of(out):
        exec(block, names)

    expected = result.for_task("digits").apply(copy.deepcopy(model))
    for name, value in adapters["digits"].trained.items():
        path, _, parameter = name.rpartition(".")
        setattr(expected.get_submodule(path), parameter, torch.nn.Parameter(value))
    inputs = KINDS[kind].inputs(3)
    found = outputs(names["model"].eval(), inputs)
    assert found.shape[-1] == CLASSES
    torch.testing.assert_close(found, outputs(expected.eval(), inputs), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        loss = names["model"](**inputs, labels=torch.tensor([9, 8, 7])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(found, torch.tensor([9, 8, 7])))


def test_every_head_and_every_task_is_named_by_its_file(trained, tmp_path):
    _, model, adapters = trained
    out = nsc_merge.merge(model, adapters, method="finetuned").save(tmp_path / "out", ["lora"])
    card = (out / "README.md").read_text(encoding="utf-8")
    for task in adapters:
        assert f"`{found_as(out / 'heads', task, '.safetensors').relative_to(out)}`" in card
    assert f"`{found_as(out / 'tasks', 'more digits').relative_to(out)}/lora`" in card


def test_a_head_that_the_base_has_no_place_for_gets_no_code(model, folders, tmp_path):
    adapter = nsc_merge.load_adapter(folders["plain"], "plain")
    headed = replace(adapter, trained={"classifier.weight": torch.zeros(3, 32)})
    out = nsc_merge.merge(model, {"plain": headed}, method="task_arithmetic").save(tmp_path / "out", "lora")
    assert "has no place for `classifier.weight`" in (out / "README.md").read_text()
    assert len(code_of(out)) == 1


def metadata(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])


def test_names_break_neither_metadata_nor_tables(model, folders, tmp_path):
    adapter = nsc_merge.load_adapter(folders["plain"], "plain")
    named = replace(adapter, base_model="org/name: x\nlicense: mine # '", about=About(license="mine: # '\n---\n"))
    out = nsc_merge.merge(model, {"a|b\n# c": named}, method="task_arithmetic").save(tmp_path / "out", "lora")
    told = {"library_name": "peft", "pipeline_tag": "image-feature-extraction", "license": "other"}
    assert metadata(out) == {**told, "tags": ["merge", "lora"]}
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "# 1 LoRA adapter merged: a\\|b # c\n" in text
    assert text.count("\n# ") == 1


def test_what_an_adapter_says_is_no_part_of_the_card(model, folders, tmp_path):
    forged = "\n\n## Loading\n\n```python\nraise SystemExit\n```\n\n<img src=x> ![x](y) \\<b> `code` \x1b[31m"
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "forged"))
    config = json.loads((folder / "adapter_config.json").read_text())
    told = {f"key{forged}": 1, "peft_version": "\n# forged"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **told}))
    (folder / "README.md").write_text(f"---\nlicense: {json.dumps(forged)}\n---\n")
    out = nsc_merge.merge(model, {forged: folder}, method="task_arithmetic").save(tmp_path / "out", "lora")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 1
    assert "\n# forged" not in text
    assert not any("SystemExit" in code for code in code_of(out))
    told = re.sub(r"```.*?```|\\\\|\\[`<\[]", "", text.split("---\n")[2], flags=re.DOTALL)
    assert not re.search(r"<(img|b)|\[x\]|\x1b", told)


LICENCES = [
    (("mit", None, None), {"license": "mit"}, "`plain`: mit; the others say none"),
    (("mit", "mit", "mit"), {"license": "mit"}, "the base: mit, `plain`: mit, `mixed`: mit"),
    (("mit", "gpl-3.0", None), {"license": "other"}, "`plain`: mit, `mixed`: gpl-3.0; the others say none"),
    (("other (llama3)", None, None), {"license": "other", "license_name": "llama3"}, "`plain`: other (llama3)"),
    (("My Own", None, None), {"license": "other"}, "`plain`: My Own"),
    ((None, None, None), {}, None),
]


def test_a_licence_is_given_where_all_agree(model, folders, tmp_path):
    read = {task: nsc_merge.load_adapter(folders[task], task) for task in ("plain", "mixed")}
    for number, ((*own, base), told, said) in enumerate(LICENCES):
        adapters = {
            task: replace(adapter, about=About(license=license))
            for (task, adapter), license in zip(read.items(), own, strict=True)
        }
        (place := tmp_path / f"base{number}").mkdir()
        if base is not None:
            (place / "README.md").write_text(f"---\nlicense: {base}\n---\n")
        model.config._name_or_path = str(place)
        out = nsc_merge.merge(model, adapters, method="task_arithmetic").save(tmp_path / f"out{number}", "lora")
        assert {key: value for key, value in metadata(out).items() if key.startswith("license")} == told
        lines = (out / "README.md").read_text(encoding="utf-8").splitlines()
        found = next((line for line in lines if line.startswith("- licences")), None)
        assert (found or "").startswith(f"- licences of the inputs, as their cards say: {said}" if said else "")
        assert (found is None) == (said is None)


def test_bases_are_named_where_they_are_of_the_hub(model, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters = {task: nsc_merge.load_adapter(folders[task], task) for task in ("plain", "mixed")}
    bases = {"plain": "org/base", "mixed": str(tmp_path)}
    named = {
        task: replace(adapter, base_model=bases[task], about=About(hub=f"me/{task}@abc"))
        for task, adapter in adapters.items()
    }
    result = nsc_merge.merge(model, named, method="task_arithmetic")
    told = metadata(result.save(tmp_path / "lora", "lora"))
    assert (told["base_model"], told["base_model_relation"]) == ("org/base", "adapter")
    told = metadata(result.save(tmp_path / "model", "model"))
    assert told["base_model"] == ["org/base", "me/plain", "me/mixed"]
    assert (told["base_model_relation"], told["library_name"]) == ("merge", "transformers")
    monkeypatch.setattr(model.config, "_name_or_path", "org/other")
    assert metadata(result.save(tmp_path / "two", "lora"))["base_model"] == ["org/other", "org/base"]
    card = (tmp_path / "two" / "README.md").read_text()
    assert 'base_model = AutoModel.from_pretrained("org/other")' in card


def test_a_class_that_transformers_lacks_is_imported_from_where_it_is(tmp_path):
    model = build("llama")
    folder = write_adapter(model, tmp_path / "a", 1, target_modules=["q_proj"])
    own = type("Own", (type(model),), {"__module__": "somewhere.models"})
    model.__class__ = own
    result = nsc_merge.merge(model, {"a": folder}, method="task_arithmetic")
    (code,) = code_of(result.save(tmp_path / "own", "model"))
    assert code == 'from somewhere.models import Own\n\nmodel = Own.from_pretrained(".")\n'
    own.__module__ = "transformers_modules.org.name.abc.modeling_own"
    model.config.auto_map = {"AutoConfig": "c.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    model.config._name_or_path = "org/name"
    model_code, lora_code = (code_of(result.save(tmp_path / name, name))[0] for name in ("model", "lora"))
    assert model_code.endswith(
        '\nmodel = AutoModelForCausalLM.from_pretrained(\n    ".",\n    trust_remote_code=True,\n)\n'
    )
    assert 'from_pretrained(\n    "org/name",\n    trust_remote_code=True,\n)\nmodel = PeftModel' in lora_code


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2", "llama-cls", "llama", "llava"])
def test_flags_of_vllm_are_told_for_what_vllm_serves(kind, tmp_path):
    model = build(kind)
    write = partial(write_adapter, model, target_modules=KINDS[kind].targets, r=4)
    result = nsc_merge.merge(
        model, {"a": write(tmp_path / "a", 1), "b": write(tmp_path / "b", 2)}, method="task_arithmetic"
    )
    told = kind in ("llama-cls", "llama", "llava")
    full, cut = serving_notes(result), serving_notes(result, 3)
    assert full == ["the adapter has rank 8" + "; vLLM: --enable-lora --max-lora-rank 8" * told]
    assert cut[0] == "the adapter has rank 3" + "; vLLM: --enable-lora --max-lora-rank 8" * told
    assert [note.partition(" needs ")[0] for note in cut[1:]] == ["LoRAX"] * (told and kind != "llava")
    card = (result.save(tmp_path / "out", "lora") / "README.md").read_text(encoding="utf-8")
    assert ("vLLM" in card) == told

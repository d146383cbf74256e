"""sentence-transformers saves what it puts behind a model beside the adapters that it trains: a merge has it, too."""

from __future__ import annotations

import json
import shutil

import pytest
import served_cases
import torch
import transformers as tf
from safetensors.torch import save_file

import nsc_merge
from nsc_merge.adapters.hub import READ, SENTENCE_MODULES
from nsc_merge.results.beside import preprocessing
from nsc_merge.results.beside.next_commands import next_commands
from nsc_merge.results.beside.serving.sentence_modules import loaded_by, modules_beside, pickled_notes

PROMPTS = {"query": "search: "}
# As release 6 and release 2 write the same.
NEW = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"},
    ],
    "config_sentence_transformers.json": {"__version__": {"pytorch": "2.13"}, "prompts": {**PROMPTS, "document": ""}},
    "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
    "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True},
    "2_Dense/config.json": {"in_features": 32, "out_features": 8},
}
OLD = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "config_sentence_transformers.json": {"__version__": {"pytorch": "1.9"}, "prompts": PROMPTS},
    "sentence_bert_config.json": {"max_seq_length": 8},
    "1_Pooling/config.json": {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    },
    "2_Dense/config.json": {"in_features": 32, "out_features": 8},
}
DENSE = "2_Dense/model.safetensors"
FOLDERS = ("lora", "model")


@pytest.fixture
def case(tmp_path):
    """A base folder and two adapters of it, none with modules."""
    base = served_cases.write_base("llama", tmp_path / "base")
    return base, served_cases.write_adapters(base, tmp_path, "llama")


def put(folder, files, *, metadata=None, **changes):
    for name, value in {
        **files,
        **{name.replace("__", "/") + ".json": value for name, value in changes.items()},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    save_file({"linear.weight": torch.ones(8, 32)}, folder / DENSE, metadata)


def saved(case, out, load=tf.AutoModel.from_pretrained):
    base, adapters = case
    result = nsc_merge.merge(load(base), adapters, method="task_arithmetic")
    result.save(out, list(FOLDERS))
    card, notes = (out / "README.md").read_text(), preprocessing.preprocessing_notes(result)
    assert all(f"- {note}" in card for note in notes)
    return notes


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("cls", "cls_token"),
        ("mean", "mean_tokens"),
        ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
        ("lasttoken", "lasttoken"),
        (["mean", "cls"], "cls_token mean_tokens"),
    ],
)
def test_modules_beside_the_adapters_follow_where_the_base_has_none(case, tmp_path, new, old):
    _, adapters = case
    modes = {f"pooling_mode_{name}": name in old.split() for name in {*old.split(), "max_tokens"}}
    put(adapters["one"], {**NEW, "1_Pooling/config.json": {"pooling_mode": new}})
    put(adapters["two"], {**OLD, "1_Pooling/config.json": modes}, metadata={"format": "pt"})
    out = tmp_path / "out"
    assert saved(case, out) == [
        "pooling and prompts of sentence-transformers (modules.json) are those beside one, the base has none"
    ]
    for format in FOLDERS:
        assert all(
            (out / format / name).read_bytes() == (adapters["one"] / name).read_bytes() for name in [*NEW, DENSE]
        )


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"1_Pooling__config": {"pooling_mode": "mean"}}, "1_Pooling/config.json"),
        ({"1_Pooling__config": {"pooling_mode": ["cls", "mean"]}}, "1_Pooling/config.json"),
        ({"config_sentence_transformers": {"prompts": {"query": "find: "}}}, "config_sentence_transformers.json"),
        ({"modules": NEW["modules.json"][:2]}, "modules.json"),
    ],
)
def test_modules_that_differ_are_left_out_with_a_note(case, tmp_path, change, other):
    _, adapters = case
    put(adapters["one"], OLD)
    put(adapters["two"], NEW, **change)
    (note,) = saved(case, tmp_path / "out")
    assert f"the folders of one and two have each another {other}" in note
    assert "SentenceTransformer would take the mean of all tokens" in note
    assert not any((tmp_path / "out" / format / "modules.json").exists() for format in FOLDERS)


def test_the_bases_modules_stay_and_what_training_made_of_them_is_said(case, tmp_path):
    base, adapters = case
    put(base, OLD)
    for folder in adapters.values():
        put(folder, NEW)
    assert saved(case, tmp_path / "same") == []
    save_file({"linear.weight": torch.zeros(8, 32)}, adapters["two"] / DENSE)
    out = tmp_path / "out"
    (note,) = saved(case, out)
    assert note.startswith(f"two: its folder has modules of sentence-transformers of its own, with another {DENSE}")
    assert all((out / format / DENSE).read_bytes() == (base / DENSE).read_bytes() for format in FOLDERS)


def test_pickled_weights_of_a_module_are_named(case, tmp_path):
    base, _ = case
    put(base, OLD)
    (base / DENSE).rename(base / "2_Dense" / "pytorch_model.bin")
    (note,) = saved(case, tmp_path / "out")
    assert note.startswith("2_Dense has no model.safetensors, and pickled weights are never opened")


def test_pickled_weights_of_a_module_beside_the_adapters_are_named(case, tmp_path):
    _, adapters = case
    for folder in adapters.values():
        put(folder, NEW)
        (folder / DENSE).rename(folder / "2_Dense" / "pytorch_model.bin")
    taken, note = saved(case, tmp_path / "out")
    assert "are those beside one, the base has none" in taken
    assert note.startswith("2_Dense has no model.safetensors, and pickled weights are never opened")


def test_modules_around_a_model_in_a_folder_of_its_own_stay_where_they_are(case, tmp_path):
    _, adapters = case
    within = [{**NEW["modules.json"][0], "path": "0_Transformer"}, *NEW["modules.json"][1:]]
    put(adapters["one"], NEW, modules=within)
    assert saved(case, tmp_path / "out") == []
    assert not (tmp_path / "out" / "model" / "modules.json").exists()


def test_modules_are_spoken_of_beside_a_base_without_a_tokenizer_too(case, tmp_path):
    base, adapters = case
    for file in base.glob("*token*"):
        file.unlink()
    (base / "chat_template.jinja").unlink()
    put(adapters["one"], NEW)
    absence, note = saved(case, tmp_path / "out")
    assert "no tokenizer and no processor" in absence
    assert "those beside one, the base has none" in note


def test_damaged_modules_stop_no_merge(case, tmp_path):
    _, adapters = case
    for task, folder in adapters.items():
        put(folder, NEW)
        (folder / DENSE).write_text(task)
    (note,) = saved(case, tmp_path / "out")
    assert f"each another {DENSE}" in note
    for text in ("{", "[]", "[1]", '{"0": {"path": ""}}'):
        (adapters["one"] / "modules.json").write_text(text)
        shutil.rmtree(tmp_path / "out")
        (note,) = saved(case, tmp_path / "out")
        assert "are those beside two, the base has none" in note, text


def test_no_file_is_taken_that_a_link_beside_an_adapter_leads_to(case, tmp_path):
    _, adapters = case
    put(adapters["one"], NEW)
    (adapters["one"] / DENSE).rename(tmp_path / "own.safetensors")
    (adapters["one"] / DENSE).symlink_to(tmp_path / "own.safetensors")
    assert saved(case, tmp_path / "out")[-1].startswith("2_Dense has no model.safetensors")
    for format in FOLDERS:
        assert (tmp_path / "out" / format / "modules.json").exists()
        assert not (tmp_path / "out" / format / DENSE).exists()


def test_modules_of_an_adapter_on_the_hub_are_fetched():
    assert set(SENTENCE_MODULES) <= set(READ)


@pytest.mark.parametrize(
    ("settings", "kind", "call"),
    [
        ({}, "SentenceTransformer", 'encode("A sentence.")'),
        ({"model_type": "SparseEncoder"}, "SparseEncoder", 'encode("A sentence.")'),
        ({"model_type": "CrossEncoder"}, "CrossEncoder", 'predict([("A question?", "A sentence.")])'),
        ({"model_type": "os.system"}, "SentenceTransformer", 'encode("A sentence.")'),
    ],
)
def test_card_and_next_command_load_it_with_sentence_transformers(case, tmp_path, settings, kind, call):
    base, adapters = case
    put(base, OLD, config_sentence_transformers=settings)
    out = tmp_path / "out"
    result = nsc_merge.merge(tf.AutoModel.from_pretrained(base), adapters, method="task_arithmetic")
    result.save(out, list(FOLDERS))
    code = f'from sentence_transformers import {kind}\n\nmodel = {kind}("model")\nprint(model.{call})\n'
    assert code in (out / "README.md").read_text()
    files = [str(file.relative_to(out)) for file in out.rglob("*")]
    (command,) = next_commands(result, out, files, pushed=True)
    assert f"from sentence_transformers import {kind}; print({kind}(" in command
    assert command.endswith(f".{call})'")
    # The adapter alone is no folder of theirs.
    assert next_commands(result, out, [name for name in files if name.startswith("lora/")], pushed=True) == []
    alone = result.save(tmp_path / "alone", "lora")
    assert "from sentence_transformers" not in (alone / "README.md").read_text()


def test_an_adapter_of_a_model_with_a_head_is_none_for_the_trunk_that_is_loaded(case, tmp_path):
    base, _ = case
    for number, files in enumerate((OLD, NEW)):
        put(base, files)
        (note,) = saved(case, tmp_path / f"out{number}", served_cases.load)
        assert note.startswith("sentence-transformers loads this base without the head of LlamaForCausalLM")
    put(base, OLD, sentence_bert_config={"transformer_task": "text-generation"})
    assert saved(case, tmp_path / "generating", served_cases.load) == []


def written(folder, files=NEW, **changes):
    folder.mkdir()
    put(folder, files, **changes)
    return folder


def beside(*folders):
    """What is copied of adapters' folders, and the first word of what is told."""
    found = modules_beside({}, {folder.name: folder for folder in folders})
    return sorted(found.files), [note.split(": ")[0] for note in found.notes]


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({}, {}, True),
        ({"similarity_fn_name": "cosine"}, {"similarity_fn_name": "cosine"}, True),
        # Releases before 3 say nothing of it.
        ({}, {"similarity_fn_name": "dot"}, True),
        ({"similarity_fn_name": None}, {"similarity_fn_name": "dot"}, True),
        ({"similarity_fn_name": "cosine"}, {"similarity_fn_name": "dot"}, False),
        ({"default_prompt_name": None}, {}, True),
        ({"default_prompt_name": "query"}, {}, False),
        ({"prompts": {}}, {}, True),
        ({"prompts": {"query": ""}}, {"prompts": None}, True),
        ({"prompts": {"query": "a"}}, {"prompts": {"query": "b"}}, False),
        ({"prompts": {"query": "a"}}, {"prompts": []}, False),
        ({"__version__": 1}, {"__version__": 2}, True),
    ],
)
def test_settings_that_decide_nothing_may_differ(tmp_path, one, two, same):
    folders = [
        written(tmp_path / name, {**NEW, "config_sentence_transformers.json": told})
        for name, told in (("one", one), ("two", two))
    ]
    files, notes = beside(*folders)
    if same:
        assert files == sorted([*NEW, DENSE])
        assert notes == ["pooling and prompts of sentence-transformers (modules.json) are those beside one, the base "
                         "has none"]  # fmt: skip
    else:
        assert files == []
        (note,) = modules_beside({}, {folder.name: folder for folder in folders}).notes
        assert "have each another config_sentence_transformers.json, so that none lie here" in note


def test_weights_and_settings_of_every_module_are_compared(tmp_path):
    one = written(tmp_path / "one")
    alike = written(tmp_path / "alike", metadata={"format": "pt"})
    assert (alike / DENSE).read_bytes() != (one / DENSE).read_bytes()
    assert beside(one, alike)[0]
    assert beside(one, written(tmp_path / "more", {**NEW, "2_Dense/config.json": {"bias": True, "in_features": 32}}))[0]
    others = {
        "named": {**NEW, "2_Dense/config.json": {"in_features": 32, "out_features": 9}},
        "first": {**NEW, "2_Dense/config.json": {"in_features": 33, "out_features": 8}},
    }
    for name, files in others.items():
        assert beside(one, written(tmp_path / name, files))[0] == beside(tmp_path / name, one)[0] == []
    for name, tensors in (("values", {"linear.weight": torch.zeros(8, 32)}), ("names", {"w": torch.ones(8, 32)})):
        save_file(tensors, written(tmp_path / name) / DENSE)
        assert beside(one, tmp_path / name)[0] == []
    (written(tmp_path / "without") / DENSE).unlink()
    (written(tmp_path / "broken") / DENSE).write_bytes(b"no tensors")
    for name in ("without", "broken"):
        assert beside(one, tmp_path / name)[0] == beside(tmp_path / name, one)[0] == [], name
    # Folders without modules say nothing, nor do those whose model lies in a folder of its own.
    (tmp_path / "bare").mkdir()
    moved = [{**NEW["modules.json"][0], "path": "0_Transformer"}, *NEW["modules.json"][1:]]
    elsewhere = written(tmp_path / "elsewhere", {**NEW, "modules.json": moved})
    assert beside(tmp_path / "bare", one, elsewhere)[0] == sorted([*NEW, DENSE])
    assert modules_beside({}, {"memory": None, "bare": tmp_path / "bare"}) == ({}, [])
    for listed in ({}, [], ["x"], None):
        (elsewhere / "modules.json").write_text(json.dumps(listed))
        assert beside(elsewhere) == ([], [])


@pytest.mark.parametrize(
    ("told", "kind", "call"),
    [
        ({}, "SentenceTransformer", 'encode("A sentence.")'),
        ({"model_type": "SentenceTransformer"}, "SentenceTransformer", 'encode("A sentence.")'),
        ({"model_type": "SparseEncoder"}, "SparseEncoder", 'encode("A sentence.")'),
        ({"model_type": "MultiVectorEncoder"}, "MultiVectorEncoder", 'encode("A sentence.")'),
        ({"model_type": "CrossEncoder"}, "CrossEncoder", 'predict([("A question?", "A sentence.")])'),
        ({"model_type": "OfTomorrow"}, "SentenceTransformer", 'encode("A sentence.")'),
        ({"model_type": ["SparseEncoder"]}, "SentenceTransformer", 'encode("A sentence.")'),
        ([], "SentenceTransformer", 'encode("A sentence.")'),
        (None, "SentenceTransformer", 'encode("A sentence.")'),
    ],
)
def test_the_class_that_loads_a_folder(tmp_path, told, kind, call):
    if told is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(told))
    assert loaded_by(tmp_path) is None
    (tmp_path / "modules.json").write_text("[]")
    assert loaded_by(tmp_path) == (kind, call)


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm", "WeightedLayerPooling", "LSTM", "CNN", "SparseAutoEncoder"])
def test_modules_with_weights_of_their_own(tmp_path, kind):
    listed = [NEW["modules.json"][0], {"path": "1_Own", "type": f"sentence_transformers.models.{kind}"}]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    copied = {"modules.json": tmp_path / "modules.json"}
    (note,) = pickled_notes(copied)
    assert note.startswith("1_Own has no model.safetensors, and pickled weights are never opened or copied")
    assert pickled_notes({**copied, "1_Own/model.safetensors": tmp_path}) == []
    assert pickled_notes({}) == []
    listed[1]["type"] = "sentence_transformers.models.Pooling"
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    assert pickled_notes(copied) == []

"""Which files of a base's folder are copied beside a merge, and what is told of those that are not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served_cases import TEMPLATE, WORDS, tokenizer
from torch import nn

from nsc_merge.models import vocabulary
from nsc_merge.results.beside import preprocessing
from nsc_merge.results.beside.preprocessing import leave_out_licenses, preprocessing_notes, write_preprocessing


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer().save_pretrained(folder)
    return folder


def result_of(base: Path | str, trusted: bool = False, **adapters: Path) -> Any:
    model = nn.Module()
    model.config = SimpleNamespace(_name_or_path=str(base))
    held = {task: SimpleNamespace(source=folder) for task, folder in adapters.items()}
    inputs = {"trust_remote_code": True} if trusted else {}
    return SimpleNamespace(model=model, adapters=held, inputs=inputs)


def written(result: Any, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    write_preprocessing(result, folder)
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_what_is_copied_of_a_folder(base, tmp_path):
    own = sorted(file.name for file in base.iterdir())
    (base / "LICENSE").write_text("terms")
    (base / "modeling_own.py").write_text("raise SystemExit")
    (base / "notes.txt").write_text("mine")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    (base / "additional_chat_templates" / "rag.py").write_text("x")
    os.mkfifo(base / "vocab.txt")
    (tmp_path / "own.txt").write_text("of this machine")
    (base / "merges.txt").symlink_to(tmp_path / "own.txt")
    (base / "vocab.json").mkdir()
    named = sorted([*own, "LICENSE", "additional_chat_templates/rag.jinja"])
    assert written(result_of(base), tmp_path / "out") == named
    for name in named:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert written(result_of(base, trusted=True), tmp_path / "trusted") == sorted([*named, "modeling_own.py"])
    # What is there already stays.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "LICENSE").write_text("others")
    assert written(result_of(base), tmp_path / "other") == named
    assert (tmp_path / "other" / "LICENSE").read_text() == "others"
    assert written(result_of(""), tmp_path / "none") == written(result_of("gone"), tmp_path / "none") == []
    assert preprocessing_notes(result_of(base)) == [
        "merges.txt in the base's folder is a link to a file of another name elsewhere and is not copied: put the file "
        "itself there if it is the model's"
    ]
    (base / "merges.txt").unlink()
    assert preprocessing_notes(result_of(base)) == []
    (note,) = preprocessing_notes(result_of(base, trusted=True))
    assert note.startswith("the base's own code (modeling_own.py) lies here: who loads this with trust_remote_code")


def test_files_of_any_vocabulary_are_copied_and_larger_ones_told(base, tmp_path, monkeypatch):
    (base / "vocab.txt").write_bytes(b"x" * 5000)
    monkeypatch.setattr(preprocessing, "LARGEST", 5000)
    sizes = {file.name: file.stat().st_size for file in base.iterdir()}
    assert max(sizes.values()) == 5000
    assert "vocab.txt" in written(result_of(base), tmp_path / "one")
    assert preprocessing_notes(result_of(base)) == []
    (base / "vocab.txt").write_bytes(b"x" * 5001)
    assert "vocab.txt" not in written(result_of(base), tmp_path / "two")
    (note,) = preprocessing_notes(result_of(base))
    assert note.startswith("vocab.txt of the base is larger than ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the base was handed over in memory, and no folder is known in which its tokenizer or processor lies: "),
        ("gone/for/good", "the base was read from gone/for/good, which is no folder here, so that no tokenizer or "),
        ("owner/base", "no tokenizer or processor of owner/base was found, or none could be fetched, at the base's "),
        ("empty", "the base's folder holds no tokenizer and no processor: "),
    ],
)
def test_where_a_tokenizer_was_looked_for(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    # Of generation alone nothing is read.
    Path("empty/generation_config.json").write_text("{}")
    (note,) = preprocessing_notes(result_of(name))
    assert note.startswith(said)
    assert note.endswith("need one beside the merge, so put it there with its save_pretrained")
    result = result_of(name)
    result.model.main_input_name = "past_values"
    assert preprocessing_notes(result) == []
    result = result_of(name)
    result.model.config.model_type = "timm_wrapper"
    assert preprocessing_notes(result) == []


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}, True),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "own.Processor"}}, True),
        ("preprocessor_config.json", {"auto_map": {}}, False),
        ("preprocessor_config.json", [], False),
        ("preprocessor_config.json", None, False),
    ],
)
def test_code_that_is_named_and_not_copied_is_told(base, file, fields, named):
    (base / file).write_text("no JSON" if fields is None else json.dumps(fields))
    notes = preprocessing_notes(result_of(base))
    assert [note.startswith(f"{file} names code in the base's folder (auto_map)") for note in notes] == [True] * named


def test_a_configuration_names_no_code_that_is_not_there(tmp_path):
    file = tmp_path / "config.json"

    def left(named: Any) -> Any:
        file.write_text(json.dumps({"model_type": "own", "auto_map": named}))
        write_preprocessing(result_of(""), tmp_path)
        return json.loads(file.read_text()).get("auto_map", "gone")

    (tmp_path / "there.py").write_text("")
    for kept in ({"AutoModel": "there.Model"}, {"AutoModel": "owner/name--gone.Model"}, "anything",
                 {"AutoTokenizer": [None, "there.Fast"]}):  # fmt: skip
        assert left(kept) == kept
    assert left({"AutoModel": "gone.Model"}) == "gone"
    assert left({"AutoTokenizer": ["there.Slow", "gone.Fast"]}) == "gone"
    assert left({"AutoConfig": "there.Config", "AutoModel": "gone.Model"}) == {"AutoConfig": "there.Config"}
    file.write_text("[]")
    write_preprocessing(result_of(""), tmp_path)
    assert file.read_text() == "[]"


def test_tokenizers_beside_adapters_that_are_others_are_told(base, tmp_path):
    def adapter(name: str, **changed: Any) -> Path:
        made = tokenizer(**changed)
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    same, chats = adapter("same"), adapter("chats", template="{{ other }}")
    # As long as the base's.
    as_long = adapter("as_long", template=TEMPLATE.replace("message", "massage"))
    fewer = adapter("fewer", words=WORDS[:-2])
    # Written otherwise, and read as the same.
    config = json.loads((same / "tokenizer_config.json").read_text())
    (same / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer_config.json").write_text("no JSON")
    (tmp_path / "bare").mkdir()
    result = result_of(base, same=same, chats=chats, fewer=fewer, as_long=as_long, broken=broken,
                       bare=tmp_path / "bare")  # fmt: skip
    result.adapters["memory"] = SimpleNamespace(source=None)
    size = len(tokenizer())
    rest = "; the base's is used here: compare them before you serve prompts of this task"
    own = "its folder has a tokenizer of its own, with"
    assert preprocessing_notes(result) == [
        f"chats: {own} another chat template than the base's{rest}",
        f"fewer: {own} {size - 2} tokens where the base's has {size}{rest}",
        f"as_long: {own} another chat template than the base's{rest}",
    ]
    (absent,) = preprocessing_notes(result_of(tmp_path / "bare", chats=chats))
    assert absent.startswith("the base's folder holds no tokenizer")
    assert preprocessing_notes(result_of(broken, chats=chats)) == []
    # By its file alone, as some bases have it.
    (base / "tokenizer_config.json").unlink()
    assert [note.partition(":")[0] for note in preprocessing_notes(result) if own in note][-2:-1] == ["fewer"]


def test_no_code_beside_an_adapter_is_run(base, tmp_path):
    folder = tmp_path / "own"
    tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert preprocessing_notes(result_of(base, trusted=True, own=folder)) == []
    assert not (tmp_path / "ran").exists()


def test_new_tokens_are_of_the_tokenizer_of_the_most(base, tmp_path):
    sources = {}
    for name, more in (("one", ["x1"]), ("most", ["x1", "x2", "x3"]), ("two", ["x1", "x2"])):
        made = tokenizer()
        made.add_tokens(more)
        made.save_pretrained(tmp_path / name)
        sources[name] = tmp_path / name
    (sources["most"] / "1_Pooling").mkdir()
    (sources["most"] / "modules.json").write_text("[]")
    (sources["most"] / "adapter_config.json").write_text("{}")
    result = result_of(base, **sources)
    written(result, tmp_path / "before")
    assert (tmp_path / "before" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    setattr(result.model, vocabulary._GROWN, ("embed_tokens",))
    assert "adapter_config.json" not in written(result, tmp_path / "after")
    assert (tmp_path / "after" / "tokenizer.json").read_bytes() == (sources["most"] / "tokenizer.json").read_bytes()
    alone = result_of(base)
    setattr(alone.model, vocabulary._GROWN, ("embed_tokens",))
    written(alone, tmp_path / "alone")
    assert (tmp_path / "alone" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_licence_that_somebody_has_put_there_stays(tmp_path):
    staging, out = tmp_path / "staging", tmp_path / "out"
    for folder in (staging, out):
        (folder / "lora").mkdir(parents=True)
        for name in ("LICENSE", "NOTICE", "tokenizer.json", "lora/LICENSE"):
            (folder / name).write_text(folder.name)
    (staging / "COPYING").write_text("new")
    (out / "NOTICE").unlink()
    (out / "NOTICE").symlink_to("nowhere")
    leave_out_licenses(staging, out, {"lora/LICENSE"})
    left = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    assert left == {"tokenizer.json", "lora/LICENSE", "COPYING"}

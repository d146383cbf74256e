"""Parts of a model card by themselves: what it says where, and of what."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from nsc_merge.models import vocabulary
from nsc_merge.models.bases.placement import PLAIN
from nsc_merge.results.beside import model_card as card
from nsc_merge.results.beside.heads import Head
from nsc_merge.results.beside.loading_code import Base
from nsc_merge.results.beside.next_commands import next_commands

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
BERT = "BertForSequenceClassification"


def bert(kind: type = tf.BertModel, **config: Any) -> Any:
    return kind(tf.BertConfig(vocab_size=30, **SIZES, **config))


def adapter(license: str | None = None, notes: tuple[str, ...] = (), factors: tuple[str, ...] = ("q",)) -> Any:
    about = SimpleNamespace(license=license, hub=None)
    return SimpleNamespace(about=about, base_model=None, notes=notes, factors=dict.fromkeys(factors))


def result_of(model: nn.Module, *tasks: str, **settings: Any) -> Any:
    given = {
        "adapters": {task: adapter() for task in tasks}, "inputs": {}, "per_task": False, "paths": ["q"], "dead": {},
        "notes": [], "about": "", "method": "ties", "course": "", "is_whole": lambda path: False, **settings,
    }  # fmt: skip
    return SimpleNamespace(model=model, tasks=list(given["adapters"]), **given)


def head(count: int = 2, kind: str | None = BERT, **settings: Any) -> Head:
    tensors = {"classifier.weight": torch.zeros(count, 8), "classifier.bias": torch.zeros(count)}
    labels = tuple(f"class {number}" for number in range(count))
    return Head(**{"tensors": tensors, "kind": kind, "labels": labels, "named": True, **settings})


def metadata(model: nn.Module, *formats: str, heads: Any = None, put: str | None = None) -> dict[str, Any]:
    return card._metadata(result_of(model, "a"), list(formats), {}, heads or {}, put)


def test_what_hubs_read():
    assert metadata(bert(), "lora") == {
        "library_name": "peft", "pipeline_tag": "feature-extraction", "tags": ["merge", "lora"],
    }  # fmt: skip
    vit = tf.ViTModel(tf.ViTConfig(**SIZES, image_size=8, patch_size=4))
    assert metadata(vit, "lora", "model")["library_name"] == "transformers"
    assert metadata(vit, "model")["pipeline_tag"] == "image-feature-extraction"
    seen = tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=8, patch_size=4))
    assert metadata(seen, "model")["pipeline_tag"] == "image-classification"
    # The head that was put in says what it is for.
    assert metadata(bert(), "model", heads={"a": head()}, put="a")["pipeline_tag"] == "text-classification"
    assert metadata(bert(), "model", heads={"a": head()})["pipeline_tag"] == "feature-extraction"
    assert "pipeline_tag" not in metadata(nn.Linear(2, 2), "model")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (set(), {}),
        ({"mit"}, {"license": "mit"}),
        ({"mit", "apache-2.0"}, {"license": "other"}),
        ({"other"}, {"license": "other"}),
        ({"other (llama3.1)"}, {"license": "other", "license_name": "llama3.1"}),
        ({"My Own"}, {"license": "other"}),
        ({"-mit"}, {"license": "other"}),
    ],
)
def test_licences_as_hubs_call_them(said, told):
    assert card._license(said) == told


def test_where_each_format_and_task_lies():
    result = result_of(bert(), "a", "b", "c")
    assert card._places(result, "lora", nested=False, head=None) == ["."]
    assert card._places(result, "lora", nested=True, head="b") == ["lora"]
    result.per_task = True
    assert card._places(result, "lora", nested=False, head=None) == ["tasks/a", "tasks/b", "tasks/c"]
    assert card._places(result, "model", nested=True, head="b") == [
        "tasks/b/model", "tasks/a/model", "tasks/c/model",
    ]  # fmt: skip


def test_what_is_saved_is_loaded_as_the_class_of_the_head(tmp_path):
    model = bert()
    model.config._name_or_path = "owner/base"
    result = result_of(model, "a", inputs={"revision": "v1"})
    plain = card._saved(result, "lora", "lora", tmp_path, {}, None)
    assert (plain.format, plain.place, plain.folder, plain.kind) == ("lora", "lora", tmp_path / "lora", "BertModel")
    assert (plain.base, plain.labels, plain.tokens) == (Base("owner/base", "v1"), None, None)
    assert (plain.home, plain.remote, plain.prompts) == ("transformers", None, False)
    put = card._saved(result, "model", ".", tmp_path, {"a": head()}, "a")
    assert (put.kind, put.labels) == (BERT, "heads/a.json")
    assert card._saved(result, "model", ".", tmp_path, {"a": head(kind=None, labels=())}, "a").kind == "BertModel"
    assert card._saved(result, "model", ".", tmp_path, {"a": head(labels=())}, "a").labels is None
    setattr(model, vocabulary._GROWN, ("embeddings.word_embeddings",))
    assert card._saved(result, "lora", "lora", tmp_path, {}, None).tokens == 30


@pytest.mark.parametrize("name", [None, "owner/base"])
def test_code_without_the_name_of_a_base_says_what_it_is(name, tmp_path):
    model = bert(tf.BertForSequenceClassification)
    if name is not None:
        model.config._name_or_path = name
    result = result_of(model, "a")

    def said(format: str, heads: Any, put: str | None) -> str:
        one = card._saved(result, format, format, tmp_path, heads, put)
        return card._loading(result, one, heads, put, nested=True)

    unnamed = "`base_model` is the model that was merged on, a "
    for heads, put, what in (
        ({}, None, f"{unnamed}{BERT}:\n\n```python\n"),
        ({"a": head(3)}, "a", f"{unnamed}{BERT} of 3 classes:\n\n```python\n"),
        ({"a": head(3)}, None, f"{unnamed}{BERT}:\n\n```python\n"),
    ):
        assert said("lora", heads, put).startswith(what if name is None else "```python\n")
        assert said("model", heads, put).startswith("```python\n")
    result.per_task, result.tasks = True, ["a", "b", "c"]
    others = "\nEvery task has its own; the others are in `tasks/b/model`, `tasks/c/model`.\n"
    assert said("model", {}, None).endswith(others)


def test_code_runs_what_is_ready(tmp_path):
    model = bert(tf.BertForSequenceClassification)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    result = result_of(model, "a")

    def said(heads: Any, put: str | None) -> str:
        one = card._saved(result, "model", "model", tmp_path, heads, put)
        return card._loading(result, one, heads, put, nested=True)

    pipeline = 'classify = pipeline("text-classification", model="model")'
    assert pipeline in said({}, None)
    assert pipeline in said({"a": head()}, "a")
    # Heads that lie beside are put in first.
    alone = said({"a": head()}, None)
    assert "pipeline" not in alone
    assert "AutoModelForSequenceClassification.from_pretrained" in alone
    (tmp_path / "model" / "modules.json").write_text("[]")
    assert 'model = SentenceTransformer("model")\nprint(model.encode("A sentence."))' in said({}, None)
    assert "SentenceTransformer" not in said({"a": head()}, "a")


def test_what_is_said_of_heads(tmp_path):
    fits, bare = bert(tf.BertForSequenceClassification), bert()
    heads = {"a": head(), "b": head(3, labels=())}

    def said(model: nn.Module, heads: Any, put: str | None, *formats: str) -> list[str]:
        result = result_of(model, *heads)
        saved = [card._saved(result, name, name, tmp_path, heads, put) for name in formats]
        return card._heads(result, saved, heads, put)

    brought = "The adapters brought heads: `heads/a.safetensors` (2 classes), `heads/b.safetensors`."
    assert said(fits, heads, "a", "model") == [f"{brought} That of a is in the model.", ""]
    first, _, code = said(fits, heads, None, "model")
    assert first == f"{brought} After the code above, this puts one into `model`:"
    assert 'load_file("heads/a.safetensors")' in code
    assert 'open("heads/a.json"' in code
    assert 'open("heads' not in said(fits, {"b": heads["b"]}, None, "model")[2]
    missing = f"{brought} The base that was merged has no place for `classifier.weight`."
    lines = said(bare, heads, None, "lora", "model")
    assert lines[0] == f"{missing} {BERT} has one:"
    assert 'AutoModelForSequenceClassification.from_pretrained(\n    "model"' in lines[2]
    assert said(bare, heads, None) == [missing, ""]
    assert said(bare, heads, None, "lora") == [missing, ""]
    bare.config._name_or_path = "owner/base"
    setattr(bare, vocabulary._GROWN, ("embeddings.word_embeddings",))
    lines = said(bare, heads, None, "lora")
    assert lines[0] == f"{missing} {BERT} has one:"
    assert "model.resize_token_embeddings(30)" in lines[2]
    # The adapter is of the trunk in that class.
    assert 'model.base_model.load_adapter("lora")' in lines[2]
    unknown = {"a": head(kind=None), "b": heads["b"]}
    assert said(bare, unknown, None, "model") == [missing, ""]
    # As bert-base-uncased is loaded, whose pooler the merged model would draw at random.
    masked = bert(tf.BertForMaskedLM)
    lacks = f"{missing} {BERT} has one, and `bert.pooler.dense.weight`, which `model` lacks"
    assert said(masked, heads, None, "model") == [f"{lacks}; a merge on a base that was saved as {BERT} has both.", ""]
    masked.config._name_or_path = "owner/base"
    lines = said(masked, heads, None, "lora", "model")
    assert lines[0] == f"{lacks}:"
    assert 'AutoModelForSequenceClassification.from_pretrained(\n    "owner/base"' in lines[2]


def test_what_was_found():
    result = result_of(bert(), "a")
    told = "Method: `ties`. All settings are in `recipe.yaml`."
    assert card._found(result) == [told]
    result.about = "About."
    assert card._found(result) == ["About."]
    result.course = "It went"
    assert card._found(result) == ["About.", "", "It went."]
    shared = "2 processes shared the work, each holding a part of the base."
    result.inputs = {"record": {"processes": 2}}
    assert card._found(result) == ["About.", "", "It went.", shared]
    result.course = ""
    assert card._found(result) == ["About.", "", shared]
    result.inputs = {"record": {"processes": 1}}
    assert card._found(result) == ["About."]


def remarks(result: Any, *formats: str, **settings: Any) -> list[str]:
    given = {"rank": None, "licenses": {}, "heads": {}, "head": None, **settings}
    return card._remarks(result, list(formats), **given)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "serving_notes", lambda result, rank: [f"served {rank}"])
    monkeypatch.setattr(card, "preprocessing_notes", lambda result: ["copied"])


def test_which_remarks_are_of_which_formats():
    result = result_of(bert(), "a")
    assert remarks(result, "coefficients") == []
    assert remarks(result, "model") == ["copied"]
    assert remarks(result, "lora", "model", rank=3) == ["served 3", "copied"]
    result.inputs = {"quantization": PLAIN}
    (read,) = remarks(result, "coefficients")
    assert read == "the base's quantised files were read as the numbers that they stand for"
    result.inputs = {"quantization": "fp8"}
    loaded = "the base was quantised as it was loaded (`fp8`): give its `from_pretrained` the same"
    assert remarks(result, "lora") == ["served None", "copied", loaded]
    assert remarks(result, "model") == ["copied"]
    result.inputs, result.model.is_quantized = {}, True
    held = "the base is quantised and the model is not: it holds the numbers that the base computes with"
    assert remarks(result, "model") == ["copied", held]
    assert remarks(result, "lora") == ["served None", "copied"]


@pytest.mark.parametrize("part", ["unet", None])
def test_pipelines_of_diffusers_load_an_adapter(part, monkeypatch):
    monkeypatch.setattr(card, "part_of_pipeline", lambda model: part)
    pipeline = "pipelines of diffusers load it as well, from its folder: `pipe.load_lora_weights`"
    told = [pipeline] if part is not None else []
    result = result_of(bert(), "a", paths=["q", "v"])
    assert remarks(result, "lora") == ["served None", *told, "copied"]
    assert remarks(result, "model") == ["copied"]
    # What is trained in full is no LoRA.
    result.is_whole = lambda path: path == "v"
    assert remarks(result, "lora") == ["served None", "copied"]


@pytest.mark.parametrize(("count", "own", "told"), [(3, 2, True), (2, 2, False), (0, 2, False)])
def test_a_head_in_an_adapter_is_not_loaded_by_all(count, own, told):
    model = bert(tf.BertForSequenceClassification, num_labels=own)
    heads = {"a": head(count)}
    first, second, third = remarks(result_of(model, "a"), "lora", heads=heads, head="a")
    assert (first, third) == ("served None", "copied")
    plain = "the adapter holds the head of a (modules_to_save), which not every server loads"
    size = (
        "; the base's is of another size, so that `AutoPeftModel...from_pretrained` needs "
        f"`num_labels={count}, ignore_mismatched_sizes=True`"
    )
    assert second == (plain + size if told else plain)
    assert remarks(result_of(model, "a"), "model", heads=heads, head="a") == ["copied"]
    assert remarks(result_of(model, "a"), "lora", heads=heads) == ["served None", "copied"]


def test_what_else_is_remarked():
    result = result_of(
        bert(), adapters={"a": adapter(factors=("q", "v")), "b|c": adapter(notes=("odd", "even"))},
        dead={"q": ["a"], "v": ["a", "b"]}, notes=["noted"],
    )  # fmt: skip
    licenses = {"the base": "mit", "`a`": "apache-2.0"}
    heads = {"a": head(named=False), "b": head(), "c": head(labels=(), named=False)}
    assert remarks(result, "coefficients", licenses=licenses, heads=heads) == [
        "licences of the inputs, as their cards say: the base: mit, `a`: apache-2.0; the others say none",
        "the classes of a are numbered, as nothing names them: `save(..., labels={task: names})` does",
        "3 coefficients received no gradient, as nothing measured depends on them; modules: `q`, `v`.",
        "1 modules are not adapted by every task; the others count as 0 there.",
        "noted",
        "b\\|c: odd",
        "b\\|c: even",
    ]
    whole = {**licenses, "`b`": "mit"}
    assert remarks(result_of(bert(), "a", "b"), "coefficients", licenses=whole) == [
        "licences of the inputs, as their cards say: the base: mit, `a`: apache-2.0, `b`: mit"
    ]


def test_the_licence_of_a_base_stands_in_its_card(tmp_path: Path):
    model = bert()
    adapters = {"a": adapter("mit"), "b": adapter()}
    assert card._licenses(result_of(model, adapters=adapters)) == {"`a`": "mit"}
    model.config._name_or_path = str(tmp_path)
    assert card._licenses(result_of(model, adapters=adapters)) == {"`a`": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert card._licenses(result_of(model, adapters=adapters)) == {"the base": "gemma", "`a`": "mit"}


def test_the_card_of_a_base_on_the_hub_is_that_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def cached(name: str, file: str, revision: Any = None) -> Any:
        asked.append((name, file, revision))
        return str(tmp_path / "README.md") if revision == "abc" else object()

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert card._folder_of(Base("owner/base", "abc")) == tmp_path
    assert card._folder_of(Base("owner/base")) is None
    assert asked == [("owner/base", "README.md", "abc"), ("owner/base", "README.md", None)]


@pytest.mark.parametrize(
    ("kind", "tried"),
    [
        ("WhisperForConditionalGeneration", True),
        ("Wav2Vec2ForCTC", True),
        # A pipeline gives them no text around the audio.
        ("GraniteSpeechForConditionalGeneration", False),
        ("VoxtralForConditionalGeneration", False),
    ],
)
def test_speech_is_tried_where_a_pipeline_runs_it(kind, tried, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind]}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    commands = next_commands(result_of(bert(), "a"), tmp_path, ["config.json", "preprocessor_config.json"], pushed=True)
    assert ["automatic-speech-recognition" in command for command in commands] == [True] * tried

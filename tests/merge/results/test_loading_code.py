"""Code on a card, line by line, for the classes of transformers; tests/merge/results/test_card_code.py runs some."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nsc_merge.results.beside.loading_code import Base, Saved, block, has_chat_template, labels_of, putting, quoted

BOTH = ("tokenizer", "preprocessor")
PICTURE = '"picture.png"'
GUESSED = '"picture.png", candidate_labels=["a cat", "a dog"]'
AUTO = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
}


def saved(folder: Path, kind: str, there: tuple[str, ...] = BOTH, **settings: Any) -> Saved:
    for name in there:
        (folder / f"{name}_config.json").write_text("{}")
    given = {"format": "model", "place": "model", "folder": folder, "base": Base(None), **settings}
    return Saved(kind=kind, **given)


@pytest.mark.parametrize(
    ("kind", "tag", "done", "needed", "example"),
    [
        ("BertForSequenceClassification", "text-classification", "classify", ["tokenizer"], '"A sentence."'),
        ("BertForTokenClassification", "token-classification", "classify", ["tokenizer"], '"A sentence."'),
        ("ViTForImageClassification", "image-classification", "classify", ["image_processor"], PICTURE),
        ("SegformerForSemanticSegmentation", "image-segmentation", "classify", ["image_processor"], PICTURE),
        ("DetrForObjectDetection", "object-detection", "detect", ["image_processor"], PICTURE),
        ("OwlViTForObjectDetection", "zero-shot-object-detection", "detect", ["tokenizer", "image_processor"], GUESSED),
        ("DPTForDepthEstimation", "depth-estimation", "estimate", ["image_processor"], PICTURE),
        ("VideoMAEForVideoClassification", "video-classification", "classify", ["image_processor"], '"video.mp4"'),
        ("CLIPModel", "zero-shot-image-classification", "classify", ["tokenizer", "image_processor"], GUESSED),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", "transcribe",
         ["tokenizer", "feature_extractor"], '"speech.wav"'),
        ("Wav2Vec2ForCTC", "automatic-speech-recognition", "transcribe", ["tokenizer", "feature_extractor"],
         '"speech.wav"'),
        ("ASTForAudioClassification", "audio-classification", "classify", ["feature_extractor"], '"speech.wav"'),
    ],
)  # fmt: skip
def test_pipelines(kind, tag, done, needed, example, tmp_path):
    one = saved(tmp_path, kind)
    assert one.using(made=False) == [
        "from transformers import pipeline",
        f'{done} = pipeline("{tag}", model="model")',
        f"print({done}({example}))",
    ]
    assert one.using(made=True) == [
        f"from transformers import {', '.join(AUTO[name] for name in needed)}, pipeline",
        *(f'{name} = {AUTO[name]}.from_pretrained("model")' for name in needed),
        f'{done} = pipeline("{tag}", model=model, {", ".join(f"{name}={name}" for name in needed)})',
        f"print({done}({example}))",
    ]
    files = {"tokenizer": "tokenizer"}
    for name in needed:
        file = tmp_path / f"{files.get(name, 'preprocessor')}_config.json"
        file.unlink()
        assert one.using(made=False) == []
        file.write_text("{}")


def test_what_a_model_writes_behind_its_prompt_and_what_a_decoder_writes(tmp_path):
    told = 'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)'
    for kind, written in (
        ("LlamaForCausalLM", 'tokens[0, inputs["input_ids"].shape[1] :]'),
        ("T5ForConditionalGeneration", "tokens[0]"),
        # They read and hear: there is no encoder of the text, nor a pipeline that gives them one.
        ("Qwen2AudioForConditionalGeneration", 'tokens[0, inputs["input_ids"].shape[1] :]'),
        ("GraniteSpeechForConditionalGeneration", 'tokens[0, inputs["input_ids"].shape[1] :]'),
        ("VoxtralForConditionalGeneration", 'tokens[0, inputs["input_ids"].shape[1] :]'),
    ):
        assert saved(tmp_path, kind).using(made=True) == [
            "from transformers import AutoTokenizer",
            'tokenizer = AutoTokenizer.from_pretrained("model")',
            told,
            "tokens = model.generate(**inputs.to(model.device), max_new_tokens=32)",
            f"print(tokenizer.decode({written}, skip_special_tokens=True))",
        ]
    (tmp_path / "tokenizer_config.json").unlink()
    assert saved(tmp_path, "LlamaForCausalLM", ()).using(made=True) == []
    assert saved(tmp_path, "T5ForConditionalGeneration", ()).using(made=True) == []


def test_images_are_described_where_a_text_says_where_they_are(tmp_path):
    one = saved(tmp_path, "LlavaForConditionalGeneration")
    first, *lines = one.using(made=True)
    assert first == "from transformers import AutoProcessor"
    assert lines[0] == "from PIL import Image"
    assert lines[1] == 'processor = AutoProcessor.from_pretrained("model")'
    assert 'text=f"USER: {processor.image_token}\\nWhat is shown? ASSISTANT:"' in lines[2]
    assert lines[4].startswith('print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :]')
    (tmp_path / "chat_template.json").write_text("{}")
    lines = one.using(made=True)
    assert "from PIL import Image" not in lines
    assert '{"type": "image", "path": "picture.png"}' in lines[2]
    assert saved(tmp_path, "LlavaForConditionalGeneration", prompts=False).using(made=True) == []
    (tmp_path / "preprocessor_config.json").unlink()
    assert one.using(made=True) == []
    (tmp_path / "processor_config.json").write_text("{}")
    assert one.using(made=True) == lines
    (tmp_path / "tokenizer_config.json").unlink()
    assert one.using(made=True) == []


def test_features_of_texts_or_of_images(tmp_path):
    assert saved(tmp_path, "BertModel").using(made=True) == [
        "from transformers import AutoTokenizer",
        'prepare = AutoTokenizer.from_pretrained("model")',
        'features = model(**prepare("A sentence.", return_tensors="pt")).last_hidden_state',
    ]
    assert saved(tmp_path, "ViTModel").using(made=True) == [
        "from PIL import Image",
        "from transformers import AutoImageProcessor",
        'prepare = AutoImageProcessor.from_pretrained("model")',
        'features = model(**prepare(Image.open("picture.png").convert("RGB"), return_tensors="pt")).last_hidden_state',
    ]
    # Of both, of a decoder behind an encoder, of audio, and of what no table has, nothing is known.
    for kind in ("LayoutLMv3Model", "BartModel", "Wav2Vec2Model", "BertForQuestionAnswering", "Nobodys"):
        assert saved(tmp_path, kind).using(made=True) == [], kind
    for name in BOTH:
        (tmp_path / f"{name}_config.json").unlink()
    for kind in ("BertModel", "ViTModel"):
        assert saved(tmp_path, kind, ()).using(made=True) == []


def test_models_are_loaded_by_what_loads_any_of_their_kind(tmp_path):
    assert saved(tmp_path, "LlamaForCausalLM").loading() == [
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("model")',
    ]
    assert saved(tmp_path, "Nobodys", home="my.module", place=".").loading() == [
        "from my.module import Nobodys",
        'model = Nobodys.from_pretrained(".")',
    ]
    one = saved(tmp_path, "MyOwnForCausalLM", home="transformers_modules.x", remote="AutoModelForCausalLM")
    assert one.loading() == [
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained(\n    "model",\n    trust_remote_code=True,\n)',
    ]
    assert one.using(made=True)[1] == 'tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)'
    # What AutoModel loads may be anything.
    one = saved(tmp_path, "MyOwn", home="transformers_modules.x", remote="AutoModel")
    assert one.loading()[0] == "from transformers import AutoModel"
    assert one.using(made=True) == []


def test_adapters_are_put_on_their_base(tmp_path):
    def loading(**settings: Any) -> list[str]:
        given = {"format": "lora", "place": "lora", "base": Base("owner/base"), **settings}
        return saved(tmp_path, "BertForSequenceClassification", **given).loading()

    auto = "AutoModelForSequenceClassification"
    imported = ["from peft import PeftModel", f"from transformers import {auto}"]
    put = 'model = PeftModel.from_pretrained(base_model, "lora")'
    assert loading() == [*imported, f'base_model = {auto}.from_pretrained("owner/base")', put]
    assert loading(base=Base(None)) == [imported[0], put]
    assert loading(tokens=70) == [
        *imported,
        f'base_model = {auto}.from_pretrained("owner/base")',
        "base_model.resize_token_embeddings(70)",
        put,
    ]
    pinned = Base("owner/base", "v1")
    call = f'base_model = {auto}.from_pretrained(\n    "owner/base",\n    revision="v1",\n)'
    assert loading(base=pinned) == [*imported, call, put]
    assert loading(base=pinned, labels="heads/a.json") == [
        imported[0],
        *labels_of("heads/a.json"),
        imported[1],
        f'base_model = {auto}.from_pretrained(\n    "owner/base",\n    revision="v1",\n    num_labels=len(labels),\n'
        "    id2label=labels,\n    ignore_mismatched_sizes=True,\n)",
        put,
    ]
    # Without a name of the base its head cannot be made either.
    assert loading(base=Base(None), labels="heads/a.json") == [imported[0], put]


def test_a_head_is_put_into_a_class_that_has_a_place_for_it(tmp_path):
    one = saved(tmp_path, "ViTForImageClassification", base=Base("owner/base"), tokens=5)
    auto = "AutoModelForImageClassification"
    first = ["from safetensors.torch import load_file", *labels_of("a.json"), f"from transformers import {auto}"]
    put = 'model.load_state_dict(load_file("a.safetensors"), strict=False)'
    settings = "    num_labels=len(labels),\n    id2label=labels,\n"
    assert one.with_a_head("a.safetensors", "a.json", whole=True) == [
        *first,
        f'model = {auto}.from_pretrained(\n    "model",\n{settings})',
        put,
    ]
    lora = saved(tmp_path, one.kind, format="lora", place="lora", base=one.base, tokens=5)
    for whole, onto in ((True, "model"), (False, "model.base_model")):
        assert lora.with_a_head("a.safetensors", "a.json", whole=whole) == [
            *first,
            first[-1],
            f'model = {auto}.from_pretrained(\n    "owner/base",\n{settings}    ignore_mismatched_sizes=True,\n)',
            "model.resize_token_embeddings(5)",
            put,
            f'{onto}.load_adapter("lora")',
        ]


def test_a_head_is_put_into_a_model_that_has_a_place_for_it(tmp_path):
    lines = putting("a.safetensors", None)
    assert lines[:2] == ["import torch", "from safetensors.torch import load_file"]
    assert 'load_file("a.safetensors").items()' in lines[2]
    assert len(lines) == 3
    assert putting("a.safetensors", "a.json")[3:-1] == labels_of("a.json")
    (tmp_path / 'a "b".json').write_text(json.dumps({"id2label": {"0": "cat", "1": "dög"}}), encoding="utf-8")
    made: dict[str, Any] = {"model": SimpleNamespace(config=SimpleNamespace())}
    exec("\n".join(labels_of(str(tmp_path / 'a "b".json'))), made)
    exec(putting("a.safetensors", "a.json")[-1], made)
    assert made["model"].config.id2label == {0: "cat", 1: "dög"}
    assert made["model"].config.label2id == {"cat": 0, "dög": 1}


def test_what_is_imported_stands_first_and_once():
    lines = ["from b import y, z", "x = 1", "import json", "from a import w", "from b import x", "import json", "y = 2"]
    head = ["```python", "import json", "from a import w", "from b import x, y, z"]
    assert block(lines) == "\n".join([*head, "", "x = 1", "y = 2", "```", ""])
    assert block(["import json"]) == "```python\nimport json\n```\n"
    assert block(["x = 1"]) == "```python\nx = 1\n```\n"


def test_texts_are_quoted_as_python_takes_them():
    for text in ("a", 'a "b"', "a\\b", "ö\n"):
        assert eval(quoted(text)) == text
    assert quoted("ö") == '"ö"'


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ({"chat_template": "{{ x }}"}, True),
        ({"chat_template": ""}, False),
        ({"chat_template": None}, False),
        ({}, False),
        ([], False),
        ("not JSON", False),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, False),
        ({"chat_template": [{"name": "rag"}, "x", {"name": "default", "template": "x"}]}, True),
        ({"chat_template": []}, False),
    ],
)
def test_which_folders_have_a_chat_template(tmp_path, held, found):
    text = held if isinstance(held, str) else json.dumps(held)
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert has_chat_template(tmp_path) is found
    for ending in ("jinja", "json"):
        (tmp_path / f"chat_template.{ending}").write_text("x")
        assert has_chat_template(tmp_path)
        (tmp_path / f"chat_template.{ending}").unlink()

"""A saved merge is loaded as it lies there, by pipelines, auto classes and PEFT, with the merged model's outputs."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import served_cases
import torch
import transformers as tf
import yaml
import zoo

import nsc_merge
from nsc_merge.models.bases.loading import load_model
from nsc_merge.results.about_adapter import about_adapter
from nsc_merge.results.beside import preprocessing
from nsc_merge.results.beside.next_commands import next_commands
from nsc_merge.results.beside.serving_notes import serving_notes
from nsc_merge.results.hub import pushed_files
from nsc_merge.results.layout import is_ours, is_preprocessing

CLASSES = {
    "llama": tf.AutoModelForCausalLM,
    "llama-cls": tf.AutoModelForSequenceClassification,
    "vit": tf.AutoModelForImageClassification,
    "llava": tf.AutoModelForImageTextToText,
}
BESIDE = {
    "vit": {"preprocessor_config.json"},
    "llama": {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"},
    "llama-cls": {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"},
}
BESIDE["llava"] = {*BESIDE["llama"], "processor_config.json"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", params=CLASSES)
def saved(request, tmp_path_factory):
    """Kind, base folder, result and the folder that holds it in both formats."""
    kind, place = request.param, tmp_path_factory.mktemp(request.param)
    base = served_cases.write_base(kind, place / "base")
    adapters = served_cases.write_adapters(base, place, kind)
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic", scale=0.7)
    return kind, base, result, result.save(place / "out", ["lora", "model"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base folder and adapters of it."""
    place = tmp_path_factory.mktemp("llama")
    base = served_cases.write_base("llama", place / "base")
    return base, served_cases.write_adapters(base, place, "llama")


def merge(base, adapters, **changes):
    """With every adapter changed."""
    held = {task: replace(nsc_merge.load_adapter(folder, task), **changes) for task, folder in adapters.items()}
    model = base if isinstance(base, torch.nn.Module) else served_cases.load(base)
    return nsc_merge.merge(model, held, method="task_arithmetic")


def merged(result):
    return result.apply(copy.deepcopy(result.model)).eval()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def same(kind, found, result):
    inputs = zoo.KINDS[kind].inputs(3)
    wanted = zoo.outputs(merged(result), inputs)
    assert (wanted - zoo.outputs(result.model, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(zoo.outputs(found, inputs), wanted, rtol=1e-4, atol=1e-5)


def test_what_lies_beside_the_base_lies_beside_both_formats_byte_by_byte(saved):
    kind, base, result, out = saved
    assert {file.name for file in base.iterdir()} == {*BESIDE[kind], "config.json", "model.safetensors"}
    recorded = yaml.safe_load((out / "recipe.yaml").read_text())["record"]["files"]
    own = {"lora": {"adapter_config.json", "adapter_model.safetensors"}, "model": {"config.json", "model.safetensors"}}
    for format, names in own.items():
        assert {file.name for file in (out / format).iterdir()} == {*BESIDE[kind], *names}
        for name in BESIDE[kind]:
            assert (out / format / name).read_bytes() == (base / name).read_bytes(), name
            assert f"{format}/{name}" in recorded
            assert is_ours(f"{format}/{name}")
    assert preprocessing.preprocessing_notes(result) == []


def test_auto_classes_load_the_model(saved, tmp_path):
    kind, base, result, out = saved
    same(kind, CLASSES[kind].from_pretrained(out / "model"), result)
    served_cases.load(base).save_pretrained(tmp_path)
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (tmp_path, out / "model"))
    assert ours == theirs
    assert ours["architectures"] == [type(result.model).__name__]
    assert ours["transformers_version"] == tf.__version__


@pytest.mark.parametrize("format", ["lora", "model"])
def test_auto_classes_load_tokenizer_and_processor(saved, format):
    kind, _, _, out = saved
    folder = out / format
    if kind == "vit":
        found = tf.AutoImageProcessor.from_pretrained(folder)(served_cases.picture(1), return_tensors="pt")
        assert found["pixel_values"].shape == (1, 3, 8, 8)
        return
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w3 w1").input_ids == [9, 7]
    if kind == "llava":
        found = tf.AutoProcessor.from_pretrained(folder)(text="<image> w3", images=served_cases.picture(1))
        assert found["input_ids"] == [[5, 5, 5, 5, 9]]
    else:
        said = tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False)
        assert said == "<s>w3"


def test_peft_loads_the_adapter_with_the_merged_models_outputs(saved):
    kind, base, result, out = saved
    folder = out / "lora"
    same(kind, peft.PeftModel.from_pretrained(served_cases.load(base), folder), result)
    auto = peft.AutoPeftModelForCausalLM if kind == "llama" else peft.AutoPeftModel
    found = auto.from_pretrained(folder)
    assert type(found.get_base_model()) is type(result.model)
    same(kind, found, result)
    same(kind, CLASSES[kind].from_pretrained(folder), result)


@pytest.mark.parametrize("format", ["lora", "model"])
def test_a_pipeline_on_the_folder_says_what_the_merged_model_does(saved, format):
    kind, base, result, out = saved
    task = {
        "llama": "text-generation",
        "llama-cls": "text-classification",
        "vit": "image-classification",
        "llava": "image-text-to-text",
    }[kind]
    pipe = tf.pipeline(task, model=str(out / format))
    model = merged(result)
    if kind == "vit":
        inputs = tf.AutoImageProcessor.from_pretrained(base)(served_cases.picture(1), return_tensors="pt")
        found = pipe(served_cases.picture(1))
    elif kind == "llava":
        inputs = tf.AutoProcessor.from_pretrained(base)(
            text="<image> w3", images=served_cases.picture(1), return_tensors="pt"
        )
        found = pipe(images=served_cases.picture(1), text="<image> w3")
    else:
        inputs = tf.AutoTokenizer.from_pretrained(base)("w3 w1", return_tensors="pt")
        found = pipe("w3 w1")
    if kind in ("llama", "llava"):
        # The base's own generation configuration: five tokens at most, none drawn.
        answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert 1 <= len(answer) <= 5
        words = tf.AutoTokenizer.from_pretrained(base).decode(answer, skip_special_tokens=True)
        assert words
        assert found[0]["generated_text"].endswith(words)
    else:
        with torch.no_grad():
            scores = model(**inputs).logits.softmax(-1)[0]
        assert found[0]["label"] == model.config.id2label[scores.argmax().item()]
        assert found[0]["score"] == pytest.approx(scores.max().item(), abs=1e-5)


def test_the_configuration_is_what_peft_itself_writes_for_such_an_adapter(saved, tmp_path):
    kind, base, result, out = saved
    theirs = peft.PeftModel.from_pretrained(served_cases.load(base), out / "lora")
    theirs.save_pretrained(tmp_path)
    found, wanted = config_of(out / "lora"), config_of(tmp_path)
    assert found.pop("target_modules") == result.paths
    assert set(wanted.pop("target_modules")) == set(result.paths)
    assert found == wanted
    assert found["task_type"] == {"llama": "CAUSAL_LM"}.get(kind)
    assert found["base_model_name_or_path"] == str(base.resolve())
    assert (found["r"], found["lora_alpha"], found["revision"]) == (7, 7, None)
    assert found["peft_version"] == peft.__version__


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
MODELS = {
    "decoder": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)), None, [], "CAUSAL_LM"),
    "decoder, otherwise told": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)), "SEQ_CLS", [], "CAUSAL_LM"),
    "encoder and decoder": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
        None,
        [],
        "SEQ_2_SEQ_LM",
    ),
    "words": (lambda: tf.BertForTokenClassification(tf.BertConfig(**TINY)), "TOKEN_CLS", ["classifier"], "TOKEN_CLS"),
    "words, another's head": (lambda: tf.BertForTokenClassification(tf.BertConfig(**TINY)), None, ["pooler"], None),
    "answers": (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TINY)), None, ["qa_outputs"], "QUESTION_ANS"),
    "text without a head": (lambda: tf.LlamaModel(tf.LlamaConfig(**TINY)), None, [], "FEATURE_EXTRACTION"),
    "images without a head": (lambda: zoo.build("clip"), None, [], None),
    "images": (lambda: zoo.build("vit"), "SEQ_CLS", ["classifier"], None),
    # PEFT's class of this type loads models of text alone.
    "images and text": (lambda: zoo.build("llava"), "CAUSAL_LM", [], None),
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), "CAUSAL_LM", [], None),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_task_type_is_one_whose_class_makes_the_model(llama, case):
    build, told, whole, expected = MODELS[case]
    result = merge(*llama, about=nsc_merge.adapters.About(task_type=told))
    model = build()
    said = about_adapter(replace(result, model=model), whole)
    assert said["task_type"] == expected
    assert (said["auto_mapping"] is None) == (expected is not None)
    if expected is None:
        assert said["auto_mapping"]["base_model_class"] == type(model).__name__


def test_an_adapter_of_a_model_without_a_head_gives_its_features(tmp_path):
    model = zoo.build("llama").model
    model.save_pretrained(tmp_path / "base")
    folder = zoo.write_adapter(model, tmp_path / "one", 1, target_modules=["q_proj"])
    result = merge(tf.LlamaModel.from_pretrained(tmp_path / "base"), {"one": folder})
    out = result.save(tmp_path / "out", "lora")
    same("llama", peft.AutoPeftModelForFeatureExtraction.from_pretrained(out), result)
    same("llama", tf.AutoModel.from_pretrained(out), result)


@pytest.mark.parametrize("with_head", [True, False])
def test_the_task_type_of_a_classifier_needs_its_head(tmp_path, with_head):
    """PEFT wraps the head of such a model, and finds none to put there."""
    base = served_cases.write_base("llama-cls", tmp_path / "base")
    adapters = served_cases.write_adapters(base, tmp_path, "llama-cls", task_type="SEQ_CLS")
    result = merge(base, adapters)
    assert {adapter.about.task_type for adapter in result.adapters.values()} == {"SEQ_CLS"}
    said = about_adapter(result, ["score"] if with_head else [])
    assert said["task_type"] == ("SEQ_CLS" if with_head else None)
    assert said["auto_mapping"] == (
        None
        if with_head
        else {
            "base_model_class": "LlamaForSequenceClassification",
            "parent_library": "transformers.models.llama.modeling_llama",
        }
    )
    out = result.save(tmp_path / "out", "lora")
    changed = {**config_of(out), "task_type": "SEQ_CLS", "auto_mapping": None}
    same("llama-cls", peft.AutoPeftModel.from_pretrained(out), result)
    (out / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(KeyError, match="score"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(out)


@pytest.mark.parametrize(
    ("told", "revisions", "expected"),
    [
        (["owner/name", "owner/name"], ["v1", "v1"], ("owner/name", "v1")),
        (["owner/name", "owner/name"], ["v1", None], ("owner/name", None)),
        (["owner/name", "owner/other"], ["v1", "v1"], ("merged on", None)),
        (["no such folder", "no such folder"], [None, None], ("merged on", None)),
        ([None, None], [None, None], ("merged on", None)),
        (["elsewhere", "elsewhere"], ["v1", "v1"], ("merged on", None)),
    ],
)
def test_the_base_is_what_was_merged_on_or_the_hub_id_that_the_adapters_agree_on(
    llama, tmp_path, monkeypatch, told, revisions, expected
):
    base, adapters = llama
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    result = merge(base, adapters)
    held = {
        task: replace(adapter, base_model=name, about=replace(adapter.about, base_revision=revision))
        for (task, adapter), name, revision in zip(result.adapters.items(), told, revisions, strict=True)
    }
    said = about_adapter(replace(result, adapters=held), [])
    folders = {"merged on": str(base.resolve()), "elsewhere": str(tmp_path / "elsewhere")}
    assert said["base_model_name_or_path"] == folders.get(expected[0], expected[0])
    assert said["revision"] == expected[1]


@pytest.mark.parametrize(
    ("told", "merged_on", "expected"),
    [
        ("owner/other", ("owner/name", COMMIT), ("owner/name", COMMIT)),
        ("owner/name", ("owner/name", COMMIT), ("owner/name", COMMIT)),
        ("owner/name", ("owner/name", None), ("owner/name", "v1")),
        ("owner/other", ("owner/name", None), ("owner/name", None)),
        ("elsewhere", ("owner/name", COMMIT), ("owner/name", COMMIT)),
        ("elsewhere", ("", None), ("elsewhere", None)),
        ("owner/name", ("", None), ("owner/name", "v1")),
        ("no such folder", ("", None), ("no such folder", None)),
    ],
)
def test_a_base_of_the_hub_is_the_one_that_was_merged_on(llama, tmp_path, monkeypatch, told, merged_on, expected):
    base, adapters = llama
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = served_cases.load(base)
    model.config._name_or_path, model.config._commit_hash = merged_on
    result = merge(model, adapters)
    held = {
        task: replace(adapter, base_model=told, about=replace(adapter.about, base_revision="v1"))
        for task, adapter in result.adapters.items()
    }
    said = about_adapter(replace(result, adapters=held), [])
    wanted = str(tmp_path / "elsewhere") if expected[0] == "elsewhere" else expected[0]
    assert (said["base_model_name_or_path"], said["revision"]) == (wanted, expected[1])


def test_a_revision_is_read_and_written(llama, tmp_path):
    base, adapters = llama
    for task, folder in adapters.items():
        shutil.copytree(folder, tmp_path / task)
        config = {**config_of(folder), "base_model_name_or_path": "owner/name", "revision": "v2"}
        (tmp_path / task / "adapter_config.json").write_text(json.dumps(config))
    result = merge(base, {task: tmp_path / task for task in adapters})
    assert [one.about.base_revision for one in result.adapters.values()] == ["v2", "v2"]
    assert [one.about.task_type for one in result.adapters.values()] == [None, None]
    found = config_of(result.save(tmp_path / "out", "lora"))
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/name", "v2")


@pytest.mark.parametrize("dora", [False, True])
def test_the_command_that_tries_an_adapter_is_one_that_runs_it(llama, tmp_path, dora):
    base = llama[0]
    adapters = served_cases.write_adapters(base, tmp_path, "llama", use_dora=dora)
    result = merge(base, adapters)
    out = result.save(tmp_path / "out", "lora")
    files = [file.name for file in out.iterdir()]
    commands = next_commands(result, out, files, pushed=True)
    found = tf.AutoModelForCausalLM.from_pretrained(out)
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    with torch.no_grad():
        wanted = result.apply(served_cases.load(base)).eval()(**inputs).logits
        gap = float((found.eval()(**inputs).logits - wanted).abs().max())
    assert len(commands) == (gap < 1e-4)
    assert any("leave DoRA's magnitudes out" in note for note in serving_notes(result)) is (gap > 1e-4)


@pytest.mark.parametrize("setting", ["revision", "task_type"])
def test_a_setting_that_is_no_text_is_refused(llama, tmp_path, setting):
    base, adapters = llama
    shutil.copytree(adapters["one"], tmp_path / "one")
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({**config_of(adapters["one"]), setting: 3}))
    with pytest.raises(ValueError, match=rf"^adapters\['one'\]: {setting}: expected text, found 3$"):
        merge(base, {"one": tmp_path / "one"})


@pytest.fixture
def cached(llama, tmp_path, monkeypatch):
    """The base in a cache of the hub, as links to its blobs, and a model that was read from there."""
    base, adapters = llama
    place = tmp_path / "hub" / "models--owner--name"
    (place / "blobs").mkdir(parents=True)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    for file in base.iterdir():
        shutil.copyfile(file, place / "blobs" / f"blob-{file.name}")
        (place / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    preprocessing._fetched.cache_clear()
    model = served_cases.load(base)
    model.config._name_or_path, model.config._commit_hash = "owner/name", COMMIT
    yield base, adapters, model, place / "snapshots" / COMMIT
    preprocessing._fetched.cache_clear()


def test_a_base_of_the_hub_comes_with_its_files_at_its_commit(cached, tmp_path):
    base, adapters, model, _ = cached
    out = merge(model, adapters, base_model=None).save(tmp_path / "out", "lora")
    for name in BESIDE["llama"]:
        assert not (out / name).is_symlink()
        assert (out / name).read_bytes() == (base / name).read_bytes()
    found = config_of(out)
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/name", COMMIT)


def test_a_base_of_the_hub_without_them_or_that_cannot_be_reached_is_a_note(cached, tmp_path, monkeypatch):
    _, adapters, model, snapshot = cached
    for name in BESIDE["llama"] - {"generation_config.json"}:
        (snapshot / name).unlink()
    out = merge(model, adapters).save(tmp_path / "out", "lora")
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "recipe.yaml", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"),
    }
    note = "no tokenizer or processor of owner/name was found"
    assert note in (out / "README.md").read_text()
    preprocessing._fetched.cache_clear()
    asked = []

    def unreachable(*names, **settings):
        asked.append((names, settings["revision"]))
        raise RuntimeError("a proxy\nrefused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    out = merge(model, adapters).save(tmp_path / "two", ["lora", "model"])
    assert set(asked) == {(("owner/name",), COMMIT)}
    assert note in (out / "README.md").read_text()


def test_the_network_is_asked_for_no_folder_and_no_model_of_memory(llama, tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    base, adapters = llama
    out = merge(load_model(str(base), local=True), adapters).save(tmp_path / "out", ["lora", "model"])
    for name in BESIDE["llama"]:
        assert (out / "model" / name).read_bytes() == (out / "lora" / name).read_bytes() == (base / name).read_bytes()
    for name in ("", "owner/name", "no such folder"):
        model = served_cases.load(base)
        model.config._name_or_path = name
        out = merge(model, adapters).save(tmp_path / f"of {name.replace('/', ' ')}", "lora")
        assert {file.name for file in out.iterdir()} == {
            *("README.md", "recipe.yaml", "adapter_config.json", "adapter_model.safetensors"),
        }
        assert "put it there with its save_pretrained" in (out / "README.md").read_text()


def test_a_model_of_time_series_is_told_of_no_tokenizer(tmp_path):
    config = tf.PatchTSTConfig(d_model=8, num_attention_heads=2, ffn_dim=8, num_hidden_layers=1)
    tf.PatchTSTForPrediction(config).save_pretrained(tmp_path / "base")
    model = tf.PatchTSTForPrediction.from_pretrained(tmp_path / "base")
    folder = zoo.write_adapter(copy.deepcopy(model), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    result = nsc_merge.merge(model, {"one": folder}, method="task_arithmetic")
    assert preprocessing.preprocessing_notes(result) == []


def test_what_makes_an_embedding_of_the_outputs_comes_along(llama, tmp_path):
    """Without modules.json sentence-transformers takes the mean over all tokens, whatever the base takes."""
    base, adapters = llama
    place = tmp_path / "base"
    shutil.copytree(base, place)
    held = {
        "modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
        "config_sentence_transformers.json": '{"prompts": {"query": "search: "}}',
        "sentence_bert_config.json": '{"max_seq_length": 8}',
        "sentence_xlm-roberta_config.json": '{"max_seq_length": 8}',
        "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
        "1_SpladePooling/config.json": '{"pooling_strategy": "max"}',
        "2_Dense/config.json": '{"in_features": 32, "out_features": 8}',
        "2_Dense/model.safetensors": "weights",
        "3_LayerNorm/config.json": '{"dimension": 8}',
        "3_LayerNorm/model.safetensors": "weights",
        "4_Normalize/config.json": "{}",
        "5_LSTM/lstm_config.json": "{}",
    }
    others = ["2_Dense/run.py", "2_Dense/pytorch_model.bin", "1_Pooling/notes.txt", "onnx/config.json"]
    others += ["0_Transformer/model.safetensors", "text_encoder/model.safetensors"]
    for name, text in {**held, **dict.fromkeys(others, "")}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    out = merge(place, adapters).save(tmp_path / "out", ["lora", "model"])
    for format in ("lora", "model"):
        assert {name: (out / format / name).read_text() for name in held} == held
        assert not any((out / format / name).exists() for name in others)
    assert {*held, *(f"lora/{name}" for name in held)} <= pushed_files(out, "owner/name").keys()


def test_the_files_go_with_the_merge_that_brought_them(llama, tmp_path):
    base, adapters = llama
    out = merge(base, adapters).save(tmp_path / "out", ["lora"])
    (out / "lora" / "vocab.json").write_text("mine")
    bare = tmp_path / "bare"
    served_cases.load(base).save_pretrained(bare)
    nsc_merge.merge(served_cases.load(bare), adapters, method="task_arithmetic", scale=0.1).save(out, ["lora"])
    assert {file.name for file in (out / "lora").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "generation_config.json", "vocab.json"),
    }
    card = (out / "README.md").read_text()
    assert "- the base's folder holds no tokenizer and no processor: pipelines and servers need one" in card


def test_only_files_of_known_names_and_sound_sizes_are_copied(llama, tmp_path, monkeypatch):
    base, adapters = llama
    place = tmp_path / "base"
    shutil.copytree(base, place)
    (tmp_path / "secret").write_text("of another folder")
    (place / "additional_chat_templates").mkdir()
    kept = {
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        **dict.fromkeys(("tokenizer.model", "merges.txt", "qwen.tiktoken", "special_tokens_map.json"), "kept"),
    }
    left = ["additional_chat_templates/.hidden.jinja", "additional_chat_templates/tool.py", "modeling_own.py"]
    left += ["README.md", "training_args.bin", "model.safetensors.index.json", "optimizer.pt", ".env", "notes.json"]
    for name, text in {**kept, **dict.fromkeys(left, "left")}.items():
        (place / name).write_text(text)
    (place / "vocab.txt").symlink_to(tmp_path / "base" / "merges.txt")
    (place / "added_tokens.json").symlink_to(tmp_path / "nowhere")
    (place / "vocab.json").mkdir()
    (place / "spiece.model").write_bytes(bytes(3000))
    monkeypatch.setattr(preprocessing, "LARGEST", 2999)
    (place / "tokenizer.json").write_text("{}")
    result = merge(place, adapters)
    out = result.save(tmp_path / "out", ["lora"])
    found = {path.relative_to(out / "lora").as_posix() for path in (out / "lora").rglob("*") if path.is_file()}
    assert found == {*kept, *BESIDE["llama"], "vocab.txt", "adapter_config.json", "adapter_model.safetensors"}
    for name, text in kept.items():
        assert (out / "lora" / name).read_text() == text
        assert is_ours(f"lora/{name}")
    assert (out / "lora" / "vocab.txt").read_text() == "kept"
    others = ["a/tokenizer.json", "../tokenizer.json", "config.json", "a/b.tiktoken", "tokenizer.json\n"]
    assert not any(map(is_preprocessing, [*left, *others]))
    assert "- spiece.model of the base is larger than 0 MB and is not copied" in (out / "README.md").read_text()


def test_the_licence_of_a_base_comes_along_and_is_no_tokenizer(llama, tmp_path):
    """As licences of LLaMA ask for; who has put one of their own into the output keeps it."""
    base, adapters = llama
    place = tmp_path / "base"
    place.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, place / name)
    kept = ["LICENSE", "LICENSE.txt", "LICENSE-MODEL", "NOTICE", "Notice.md", "USE_POLICY.md"]
    for name in [*kept, "LICENSES.md", "notice.sh", "LICENSE~"]:
        (place / name).write_text(f"{name} of the base")
    result = merge(place, adapters)
    assert any("no tokenizer" in note for note in preprocessing.preprocessing_notes(result))
    out = tmp_path / "out"
    out.mkdir()
    (out / "NOTICE").write_text("own")
    result.save(out, "model")
    assert (out / "NOTICE").read_text() == "own"
    found = {file.name for file in out.iterdir() if file.is_file()}
    own = {"config.json", "model.safetensors", "generation_config.json", "README.md", "recipe.yaml"}
    assert found == {*kept, *own}
    assert (out / "LICENSE-MODEL").read_text() == "LICENSE-MODEL of the base"
    record = yaml.safe_load((out / "recipe.yaml").read_text())["record"]["files"]
    assert {*kept} - {"NOTICE"} <= {*record}
    assert "NOTICE" not in record
    (place / "LICENSE").write_text("a later one")
    merge(place, adapters).save(out, "model")
    assert (out / "LICENSE").read_text() == "a later one"
    assert (out / "NOTICE").read_text() == "own"


def test_a_link_of_another_name_elsewhere_is_not_copied(llama, tmp_path):
    base, adapters = llama
    place = Path(shutil.copytree(base, tmp_path / "base"))
    (tmp_path / "shared").mkdir()
    (place / "tokenizer.json").rename(tmp_path / "shared" / "tokenizer.json")
    (place / "tokenizer.json").symlink_to(tmp_path / "shared" / "tokenizer.json")
    (tmp_path / "secret.json").write_text('{"token": "secret"}')
    (place / "chat_template.jinja").unlink(missing_ok=True)
    (place / "chat_template.jinja").symlink_to(tmp_path / "secret.json")
    out = merge(place, adapters).save(tmp_path / "out", ["lora", "model"])
    assert not [path for path in out.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert (out / "lora" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "- chat_template.jinja in the base's folder is a link to a file of an" in (out / "README.md").read_text()

    (place / "generation_config.json").unlink()
    (place / "generation_config.json").symlink_to(tmp_path / "secret.json")
    # transformers would keep all of its keys.
    with pytest.raises(ValueError, match=r"^model: .*generation_config.json is a link to .*secret.json, a file of ano"):
        load_model(str(place), local=True)


@pytest.mark.parametrize("trusted", ["no", "by the recipe", "by the caller"])
def test_code_comes_along_only_where_it_is_trusted(llama, tmp_path, trusted):
    base, adapters = llama
    place = tmp_path / "base"
    shutil.copytree(base, place)
    fields = json.loads((place / "tokenizer_config.json").read_text())
    fields["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (place / "tokenizer_config.json").write_text(json.dumps(fields))
    (place / "tokenization_own.py").write_text("raise RuntimeError")
    model = served_cases.load(place)
    if trusted == "by the caller":
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.base.modeling_own"})
    result = merge(model, adapters)
    result.inputs.update({"trust_remote_code": True} if trusted == "by the recipe" else {})
    out = result.save(tmp_path / "out", "lora")
    card = (out / "README.md").read_text()
    assert (out / "tokenization_own.py").exists() == (trusted != "no")
    if trusted == "no":
        assert "- tokenizer_config.json names code in the base's folder (auto_map), which is not copied" in card
    else:
        assert "- the base's own code (tokenization_own.py) lies here: who loads this with" in card
        assert "not copied" not in card


@pytest.mark.parametrize("name", ["preprocessor", "processor", "video_preprocessor", "image_processor"])
def test_code_of_what_prepares_images_and_videos_is_named(llama, tmp_path, name):
    base, adapters = llama
    place = tmp_path / "base"
    shutil.copytree(base, place)
    (place / f"{name}_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "own.OwnProcessor"}}))
    (note,) = preprocessing.preprocessing_notes(merge(place, adapters))
    assert note.startswith(f"{name}_config.json names code in the base's folder (auto_map), which is not copied: ")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({}, None),
        ({"words": [*served_cases.WORDS, "more", "words"]}, "with 66 tokens where the base's has 64"),
        ({"template": "{{ messages }}"}, "with another chat template than the base's"),
    ],
)
def test_an_adapters_own_tokenizer_that_differs_is_named(llama, tmp_path, change, note):
    base, adapters = llama
    shutil.copytree(adapters["two"], tmp_path / "two")
    served_cases.tokenizer(**change).save_pretrained(tmp_path / "two")
    # Other bytes that say the same are no other tokenizer.
    file = tmp_path / "two" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    found = preprocessing.preprocessing_notes(merge(base, {"one": adapters["one"], "a\nb": tmp_path / "two"}))
    expected = f"a b: its folder has a tokenizer of its own, {note}; the base's is used here: "
    assert found == ([] if note is None else [expected + "compare them before you serve prompts of this task"])


def test_a_classifiers_head_makes_the_adapter_one_that_peft_wraps(tmp_path):
    base = served_cases.write_base("llama-cls", tmp_path / "base")
    adapters = served_cases.write_adapters(base, tmp_path, "llama-cls", task_type="SEQ_CLS", modules_to_save=["score"])
    result = merge(base, adapters)
    out = result.save(tmp_path / "out", "lora", head="one")
    assert config_of(out)["task_type"] == "SEQ_CLS"
    with torch.no_grad():
        result.model.score.weight.copy_(result.adapters["one"].trained["score.weight"])
    same("llama-cls", peft.AutoPeftModelForSequenceClassification.from_pretrained(out), result)
    same("llama-cls", tf.AutoModelForSequenceClassification.from_pretrained(out), result)

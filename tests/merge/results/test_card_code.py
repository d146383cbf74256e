"""Every block of Python on a card is run, where the base has what belongs beside it."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace

import peft
import pytest
import served_cases
import torch
import transformers as tf
import zoo

import nsc_merge
from nsc_merge.results.beside.next_commands import next_commands

LABELS = ["tabby", "siamese", "manx", "persian"]


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run(code, folder):
    """A block by itself, in the folder of the merge, which has a picture; what it made."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        served_cases.picture(1).resize((16, 16)).save("picture.png")
        made: dict = {}
        exec(code, made)
        return made
    finally:
        os.chdir(before)


def made_by(kind, place):
    base = served_cases.write_base(kind, place / "base")
    return served_cases.load(base), {
        task: nsc_merge.load_adapter(folder, task)
        for task, folder in served_cases.write_adapters(base, place, kind).items()
    }


def headed(kind, adapters):
    """The adapters with heads of four classes and of two."""
    name = {"vit": "classifier", "vit-bare": "classifier"}.get(kind, "score")
    generator = torch.Generator().manual_seed(4)
    with_heads = {}
    for (task, adapter), count in zip(adapters.items(), (4, 2), strict=True):
        head = {f"{name}.weight": torch.randn(count, 32, generator=generator)}
        if name == "classifier":
            head["classifier.bias"] = torch.randn(count, generator=generator)
        with_heads[task] = replace(adapter, trained=head)
    return with_heads


def expected(result, task, inputs):
    """The merged trunk and the task's head, put together by hand."""
    model = result.apply(copy.deepcopy(result.model)).eval()
    head = result.adapters[task].trained
    with torch.no_grad():
        if "classifier.weight" in head:
            trunk = getattr(model, "vit", model)
            states = trunk(**inputs).last_hidden_state[:, 0]
            return states @ head["classifier.weight"].t() + head["classifier.bias"]
        states = model.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return states[torch.arange(len(last)), last] @ head["score.weight"].t()


@pytest.fixture(scope="module", params=["vit", "llama-cls"])
def classifier(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    model, adapters = made_by(request.param, place)
    return request.param, nsc_merge.merge(model, headed(request.param, adapters), method="task_arithmetic")


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("template", [True, False])
def test_every_block_generates_as_the_merged_model(kind, template, tmp_path):
    model, adapters = made_by(kind, tmp_path)
    if not template:
        (tmp_path / "base" / "chat_template.jinja").unlink()
    result = nsc_merge.merge(model, adapters, method="task_arithmetic")
    formats = ["lora", "model"] if template else ["model"]
    out = result.save(tmp_path / "out", formats)
    merged = result.apply(copy.deepcopy(model)).eval()
    code = blocks(out)
    assert len(code) == len(formats)
    for block in code:
        assert ("apply_chat_template" in block) == template
        made = run(block, out)
        wanted = merged.generate(**made["inputs"], max_new_tokens=32)
        assert torch.equal(made["tokens"], wanted)
        assert wanted.shape[1] > made["inputs"]["input_ids"].shape[1]


def test_the_base_gets_the_tokens_that_adapters_added(tmp_path):
    base = served_cases.write_base("llama", tmp_path / "base")
    resized = served_cases.load(base)
    size = len(resized.get_input_embeddings().weight) + 3
    resized.resize_token_embeddings(size, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(resized, config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    longer = served_cases.tokenizer()
    longer.add_tokens(["one more", "another"])
    longer.save_pretrained(tmp_path / "a")
    (tmp_path / "own.txt").write_text("of this machine")
    (tmp_path / "a" / "merges.txt").symlink_to(tmp_path / "own.txt")
    result = nsc_merge.merge(
        served_cases.load(base), {"a": tmp_path / "a"}, method="task_arithmetic", added_tokens="mean"
    )
    out = result.save(tmp_path / "out", ["lora", "model"])
    tokens = torch.tensor([[3, size - 1, 5]])
    first, second = (run(block, out)["model"](tokens).logits for block in blocks(out))
    assert first.shape[-1] == size
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    for place in (out / "lora", out / "model"):
        assert (place / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
        assert not (place / "merges.txt").exists()


@pytest.mark.parametrize(
    ("given", "chats"),
    [
        (None, False),
        ("{{ messages[0].content }}", True),
        ([{"name": "rag", "template": "{{ messages[0].content }}"}], False),
        ([{"name": "rag", "template": ""}, {"name": "default", "template": "{{ messages[0].content }}"}], True),
    ],
    ids=["null", "text", "no default", "default"],
)
def test_a_template_in_the_tokenizers_configuration_counts_where_one_is_taken_by_itself(given, chats, tmp_path):
    """For the card and for the command that is printed after a merge."""
    model, adapters = made_by("llama", tmp_path)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": given}))
    result = nsc_merge.merge(model, adapters, method="task_arithmetic")
    out = result.save(tmp_path / "out", "model")
    (block,) = blocks(out)
    assert ("apply_chat_template" in block) == chats
    run(block, out)
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    assert ("Hello!" in next_commands(result, out, files, pushed=True)[0]) == chats


@pytest.mark.parametrize("format", ["lora", "model"])
def test_the_code_of_a_card_puts_in_a_head_and_its_labels(classifier, format, tmp_path):
    kind, result = classifier
    out = result.save(tmp_path / "out", format, labels={"one": LABELS})
    load, put = blocks(out)
    made = run(load + put, out)
    inputs = zoo.KINDS[kind].inputs(3)
    wanted = expected(result, "one", inputs)
    torch.testing.assert_close(zoo.outputs(made["model"], inputs), wanted, rtol=1e-4, atol=1e-5)
    assert made["classify"].model.config.id2label == dict(enumerate(LABELS))
    example = str(out / "picture.png") if kind == "vit" else "w1 w2"
    assert {one["label"] for one in made["classify"](example, top_k=4)} == set(LABELS)


def test_a_head_that_was_put_in_is_served_with_its_labels(classifier, tmp_path):
    kind, result = classifier
    out = result.save(tmp_path / "out", ["lora", "model"], head="one", labels={"one": LABELS})
    inputs = zoo.KINDS[kind].inputs(3)
    wanted = expected(result, "one", inputs)
    lora, model = blocks(out)
    for made, found in ((run(lora, out), "model"), (run(model, out), "classify")):
        served = made[found] if found == "model" else made[found].model
        torch.testing.assert_close(zoo.outputs(served, inputs), wanted, rtol=1e-4, atol=1e-5)
        assert made["classify"].model.config.id2label == dict(enumerate(LABELS))
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["id2label"], config["label2id"]["manx"]) == ({str(n): label for n, label in enumerate(LABELS)}, 2)
    assert config["architectures"] == [type(result.model).__name__]
    adapter = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["classifier" if kind == "vit" else "score"]
    assert adapter["task_type"] == (None if kind == "vit" else "SEQ_CLS")
    if kind == "llama-cls":
        auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            out / "lora", num_labels=4, ignore_mismatched_sizes=True
        )
        torch.testing.assert_close(zoo.outputs(auto, inputs), wanted, rtol=1e-4, atol=1e-5)
        assert "needs `num_labels=4, ignore_mismatched_sizes=True`" in (out / "README.md").read_text()
    # What was handed over stays as it was.
    assert len(result.model.config.id2label) == (2 if kind == "vit" else 3)


@pytest.mark.parametrize(
    ("kind", "head", "format"),
    [
        ("vit-bare", None, "lora"),
        ("vit-bare", "two", "lora"),
        ("vit-bare", "two", "model"),
        ("llama", None, "lora"),
        ("llama", None, "model"),
        ("llama", "two", "lora"),
    ],
)
def test_a_base_without_a_head_becomes_a_classifier(kind, head, format, tmp_path):
    zoo_kind = kind.removesuffix("-bare")
    base = served_cases.write_base(zoo_kind, tmp_path / "base")
    model = served_cases.load(base)
    if kind == "vit-bare":
        tf.ViTModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(base)
        model = served_cases.load(base)
    adapters = {
        task: nsc_merge.load_adapter(folder, task)
        for task, folder in served_cases.write_adapters(base, tmp_path, zoo_kind).items()
    }
    result = nsc_merge.merge(model, headed(kind, adapters), method="task_arithmetic")
    task = head or "one"
    out = result.save(tmp_path / "out", format, head=head, labels={"two": ["no", "yes"]})
    inputs = zoo.KINDS[zoo_kind].inputs(3)
    made = run(blocks(out)[-1], out)
    served = made["classify"].model
    wanted = expected(result, task, inputs)
    torch.testing.assert_close(zoo.outputs(served, inputs), wanted, rtol=1e-4, atol=1e-5)
    labels = ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"] if head is None else ["no", "yes"]
    assert served.config.id2label == dict(enumerate(labels))
    document = json.loads((out / "heads" / "two.json").read_text())
    kinds = {"vit": "ViTForImageClassification", "llama": "LlamaForSequenceClassification"}
    assert document["architecture"] == kinds[zoo_kind]
    assert (document["num_labels"], document["label2id"]) == (2, {"no": 0, "yes": 1})


def test_features_of_a_base_without_a_head(tmp_path):
    base = served_cases.write_base("vit", tmp_path / "base")
    tf.ViTModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(base)
    adapters = served_cases.write_adapters(base, tmp_path, "vit")
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic")
    out = result.save(tmp_path / "out", ["lora", "model"])
    merged = result.apply(copy.deepcopy(result.model)).eval()
    for block in blocks(out):
        made = run(block, out)
        with torch.no_grad():
            pixels = made["prepare"](served_cases.picture(1).resize((16, 16)), return_tensors="pt")
            wanted = merged(**pixels).last_hidden_state
        torch.testing.assert_close(made["features"], wanted, rtol=1e-4, atol=1e-5)

"""Tasks whose answers are generated: as long as the longest label of any batch, by models of every build."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from architectures import ARCHITECTURES
from harness_cases import WORDS, tokenizer
from peft import PeftModel
from safetensors.torch import save_file
from zoo import IMAGE_TOKEN, KINDS, LANGUAGE, build, images_and_text, write_adapter

from nsc_merge import merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation import heads, scoring
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.metrics import METRICS
from nsc_merge.evaluation.scoring import applied, predict, score
from nsc_merge.evaluation.suite import RecipeSuite


@pytest.mark.parametrize(("test", "validation"), [((2, 4), None), ((2, 4), (3, 6)), ((5, 2), (3,))])
def test_answers_are_as_long_as_the_longest_label(tmp_path, monkeypatch, test, validation):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    prompts = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    written = heads.GeneratingHead(6)(model, prompts)
    task = {"adapter": "caption", "generate": True, "metric": "exact_match"}
    for key, lengths in (("test", test), ("validation", validation)):
        if lengths is not None:
            task[key] = key
            (tmp_path / key).mkdir()
            for number, length in enumerate(lengths):
                labels = written[:, :length].contiguous()
                save_file({**prompts, "labels": labels}, tmp_path / key / f"{number}.safetensors")
    recipe = {"model": "base", "tasks": {"caption": task}, "methods": ["task_arithmetic"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml").at(0))
    for split in ("test",) if validation is None else ("test", "val"):
        predicted = predict(suite, suite.model, split)
        outputs, _ = predicted["caption"]
        assert outputs.shape[1] == max(*test, *(validation or ()))
        assert torch.equal(outputs[: len(written)], written[:, : outputs.shape[1]])
        assert score(suite, predicted).metrics["caption"] == 1


@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_what_an_encoder_read_is_no_part_of_the_answer(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), dict(architecture.inputs())
    inputs.pop("decoder_input_ids")
    if "attention_mask" in inputs:
        # Encoders read their texts padded behind.
        inputs["attention_mask"][0, 5:] = 0
    model.generation_config.decoder_start_token_id = start = 4
    model.generation_config.eos_token_id = None
    written = torch.full((2, 1), start)
    with torch.no_grad():
        for _ in range(3):
            logits = model(**inputs, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
    # A base that asks for beams, as those for summaries do, is decoded greedily all the same.
    model.generation_config.num_beams = 4
    assert torch.equal(heads.GeneratingHead(3)(model, inputs), written[:, 1:])


def test_what_an_encoder_reads_of_raw_data_stands_at_its_beginning(tmp_path, monkeypatch):
    """BART's positions count padding: in front of a text, it would be read at others than it was trained at."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ARCHITECTURES["BART"].build()
    # As a trained model tells places and words apart.
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.dim() == 2:
            value.data = torch.randn(value.shape, generator=generator) * (2 / value.shape[1] ** 0.5)
    model.save_pretrained(tmp_path / "base")
    tool = tokenizer()
    tool.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"])
    texts = [" ".join(WORDS[:length]) for length in (2, 7, 4)]
    rows = [{"text": text, "summary": " ".join(WORDS[9:14])} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"adapter": "adapter", "test": "rows.jsonl", "metric": "exact_match", "generate": True}
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["zero_shot"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml").at(0))
    ((inputs, labels),) = suite.labelled("t", "test")
    written = suite.output("t", suite.model, inputs)
    for read, mask, said in zip(inputs["input_ids"], inputs["attention_mask"], written, strict=True):
        alone = tool(tool.decode(read[mask.bool()]), return_tensors="pt")["input_ids"]
        expected = heads.GeneratingHead(labels.shape[1])(suite.model, {"input_ids": alone})
        assert torch.equal(said, expected[0])
    assert len(set(map(tuple, written.tolist()))) == 3


def test_prompts_given_as_embeddings_are_no_part_of_the_answer():
    model, inputs = build("llama"), KINDS["llama"].inputs(0)
    prompts = {name: value.flip(1) for name, value in inputs.items()}
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(prompts["input_ids"]).detach(),
        "attention_mask": prompts["attention_mask"],
    }
    expected = heads.GeneratingHead(4)(model, prompts)
    assert torch.equal(heads.GeneratingHead(4)(model, embedded), expected)


def test_captions_that_end_are_those_of_labels_without_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    prompts = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    model.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = end = int(heads.GeneratingHead(6)(model, prompts)[0, 4])
    model.save_pretrained(tmp_path / "base")
    written = heads.GeneratingHead(6)(model, prompts)
    ends = written == end
    assert ends[0, 4]
    labels = written.masked_fill(ends, heads.IGNORE)
    save_file({**prompts, "labels": labels}, tmp_path / "test.safetensors")
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"])
    task = {"adapter": "adapter", "test": "test.safetensors", "metric": "cider", "generate": True}
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["finetuned"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "eval.yaml"), "--json"]) == 0
    found = {row["row"]: row["runs"][0] for row in json.loads(capsys.readouterr().out)["rows"]}["zero_shot"]
    shared = METRICS["cider"].measure(labels, labels)
    assert found["metrics"]["t"] == pytest.approx(shared)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_on_which_side_texts_are_padded_changes_no_score(tmp_path, monkeypatch, capsys, name):
    """Padding is not asked for a text's first token, and no position of a model that counts them is its."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ARCHITECTURES[name].build() if name == "GPT-2" else build("llama")
    model.save_pretrained(tmp_path / "base")
    modules = ["c_attn"] if name == "GPT-2" else ["q_proj"]
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=modules)
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(6, 60, (6, 8), generator=generator), torch.tensor([8, 3, 5, 8, 2, 7])
    mask = (torch.arange(8) < lengths[:, None]).long()
    behind = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, heads.IGNORE)}
    front = {
        key: torch.stack([row.roll(8 - int(length)) for row, length in zip(value, lengths, strict=True)])
        for key, value in behind.items()
    }
    assert front["attention_mask"][1].tolist() == [0] * 5 + [1] * 3
    losses = {}
    for side, data in (("behind", behind), ("front", front)):
        save_file(data, tmp_path / f"{side}.safetensors")
        task = {"adapter": "adapter", "test": f"{side}.safetensors", "metric": "perplexity"}
        recipe = {"model": "base", "tasks": {"t": task}, "methods": ["finetuned"], "output": {"dir": side}}
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["eval", str(tmp_path / "eval.yaml"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["rows"]
        losses[side] = {row["row"]: row["runs"][0]["losses"]["t"] for row in found}
    with torch.no_grad():
        logits = [model(input_ids=row[None, :length]).logits[0, :-1] for row, length in zip(ids, lengths, strict=True)]
    told = torch.cat([row[1:length] for row, length in zip(ids, lengths, strict=True)])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), told).item()
    assert losses["front"] == pytest.approx(losses["behind"], rel=1e-5)
    assert losses["front"]["zero_shot"] == pytest.approx(expected, rel=1e-5)


def test_logits_of_a_decoder_of_its_own_are_those_of_the_labels_where_they_stand(tmp_path, monkeypatch, capsys):
    """transformers moves the labels of T5 into the decoder's inputs, where those of LLaMA say the next token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ARCHITECTURES["T5"].build()
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "adapter", 1, r=2, target_modules=["q"])
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 80, (4, length), generator=generator) for length in (7, 5))
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
        # Half of the labels are what the model says, which is said of those in front.
        for place in (1, 3):
            labels[:, place] = tuned(input_ids=ids, labels=labels).logits[:, place].argmax(-1)
        expected = tuned(input_ids=ids, labels=labels)
    share = (expected.logits.argmax(-1) == labels).float().mean().item()
    assert share >= 0.4
    data = {"input_ids": ids, "labels": labels}
    save_file(data, tmp_path / "bare.safetensors")
    moved = model.prepare_decoder_input_ids_from_labels(labels)
    save_file({**data, "decoder_input_ids": moved}, tmp_path / "test.safetensors")
    task = {"adapter": "adapter", "test": "test.safetensors", "metric": "accuracy"}
    recipe = {"model": "base", "tasks": {"t": task}, "methods": ["finetuned"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(tmp_path / "eval.yaml"), "--json"]) == 0
    found = {row["row"]: row["runs"][0] for row in json.loads(capsys.readouterr().out)["rows"]}["finetuned"]
    assert found["metrics"]["t"] == pytest.approx(share)
    assert found["losses"]["t"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert main(["eval", str(tmp_path / "eval.yaml"), f"tasks.t.test={tmp_path / 'bare.safetensors'}"]) == 1
    assert "tasks.t.test: expected decoder_input_ids beside" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("metric", ["accuracy", "perplexity", "exact_match", "f1"])
@pytest.mark.parametrize(("batch_size", "numbers"), [(2, 1), (5, 2**28)])
def test_of_texts_only_what_is_asked_for_is_kept(tmp_path, monkeypatch, metric, batch_size, numbers):
    """Logits over a vocabulary are large: none is held once a batch is measured, and by an ensemble those of 3 answers
    among 12 tokens, of some batches at a time.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (9, 12), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    # Some of them are what the model says, so that no figure is 0.
    labels = ids.clone()
    labels[::2, 1:] = logits[::2, :-1].argmax(-1)
    labels[:, :-3] = -100
    labels[3, 2], labels[3, -2:] = ids[3, 2], -100
    labels[5] = -100
    save_file({"input_ids": ids, "labels": labels}, tmp_path / "test.safetensors")
    task = {"adapter": "a", "test": "test.safetensors", "metric": metric}
    recipe = {"model": "base", "tasks": {"a": task}, "methods": ["task_arithmetic"], "output": {"dir": "out"}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({**recipe, "batch_size": batch_size}))
    suite = RecipeSuite(load_eval_recipe(tmp_path / "eval.yaml", ["device=cpu"]).at(0))
    alone = merge(suite.model, suite.adapters, method="ensemble")
    assert predict(suite, alone, "test")["a"][0].classes.shape == (9, 11)
    predicted = predict(suite, suite.model, "test")
    assert predicted["a"][0].classes.shape == predicted["a"][0].surprise.shape == (9, 11)
    assert predicted["a"][0].size == model.config.vocab_size
    expected = METRICS[metric].measure(logits[:, :-1], labels[:, 1:])
    assert expected > 0
    found = score(suite, predicted)
    assert found.metrics["a"] == pytest.approx(expected, rel=1e-5)
    loss = METRICS[metric].loss(logits[:, :-1], labels[:, 1:])
    assert found.losses["a"] == pytest.approx(loss.item(), rel=1e-5)
    each = METRICS[metric].quality(logits[:, :-1], labels[:, 1:])
    assert suite.quality("a", *predicted["a"]).tolist() == pytest.approx(each.tolist(), rel=1e-5, nan_ok=True)

    other = write_adapter(suite.model, tmp_path / "b", 2, r=2, target_modules=["q_proj", "v_proj"])
    pair = merge(suite.model, {"a": suite.adapters["a"], "b": other}, method="ensemble")
    each = []
    for one in "ab":
        with applied(suite.model, pair.for_task(one)) as own, torch.no_grad():
            each.append(own(input_ids=ids).logits[:, :-1])
    mean = (each[0] + each[1]) / 2
    monkeypatch.setattr(scoring, "_HELD", numbers)
    events = []
    enter, keep = scoring.applied, suite.kept
    monkeypatch.setattr(scoring, "applied", lambda *args: events.append("model") or enter(*args))
    monkeypatch.setattr(suite, "kept", lambda *args: events.append("kept") or keep(*args))
    held = predict(suite, pair, "test")
    batches = len(suite.labelled("a", "test"))
    at_once = 1 if numbers == 1 else batches
    assert events == [*["model"] * 2, *["kept"] * at_once] * (batches // at_once)
    found = score(suite, held)
    assert found.metrics["a"] == pytest.approx(METRICS[metric].measure(mean, labels[:, 1:]), rel=1e-5)
    assert found.losses["a"] == pytest.approx(METRICS[metric].loss(mean, labels[:, 1:]).item(), rel=1e-5)
    assert held["a"][0].classes.shape == (9, 3)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Samples of two images each, a batch a file, and one with a single image; and what the model says of them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model = build("llava")
    model.save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "a", 1, r=2, target_modules=LANGUAGE)
    said = []
    for split, seeds in (("test", (1, 2, 3)), ("val", (4, 5, 6))):
        (tmp_path / split).mkdir()
        for number, (seed, images) in enumerate(zip(seeds, (2, 2, 1), strict=True)):
            one = images_and_text(seed)
            one["attention_mask"] = torch.ones_like(one["attention_mask"])
            # Four tokens an image.
            words = one["input_ids"][:, 4:].clamp(min=6)
            places = torch.full((3, 4 * images), IMAGE_TOKEN)
            ids = torch.cat([places, words], 1)
            pixels = torch.randn(3 * images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            with torch.no_grad():
                logits = model(**inputs).logits
            labels = torch.full_like(ids, -100)
            labels[:, -1] = logits[:, -2].argmax(-1)
            labels[0, -1] = 7
            said.append((split, logits[:, :-1], labels[:, 1:]))
            save_file({**inputs, "labels": labels}, tmp_path / split / f"{number}.safetensors")
    task = {"adapter": "a", "test": "test", "validation": "val", "metric": "accuracy"}
    methods = [{"method": "task_arithmetic", "tune": "loss"}, {"method": "nsc", "options": {"steps": 2}}]
    recipe = {"model": "base", "tasks": {"a": task}, "methods": methods, "output": {"dir": "out", "plots": False}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path, said


def test_samples_of_several_images_are_measured(pictures, capsys):
    place, said = pictures
    assert main(["eval", str(place / "eval.yaml"), "seeds=[0, 1]"]) == 0
    document = json.loads((place / "out" / "results.json").read_text())
    runs = {row["row"]: row["runs"][0] for row in document["rows"]}
    right = [(o.argmax(-1) == y)[y != -100] for split, o, y in said if split == "test"]
    assert runs["zero_shot"]["metrics"]["a"] == pytest.approx(torch.cat(right).double().mean().item())
    assert set(runs) == {"zero_shot", "finetuned", "task_arithmetic", "nsc"}
    # The same samples in another split are found, whatever their images.
    assert main(["eval", str(place / "eval.yaml"), "tasks.a.validation=test"]) == 1
    assert "tasks.a.validation: tune needs data beside those that are measured" in capsys.readouterr().err


def test_samples_of_several_images_are_not_cut_out_of_one_file(pictures, capsys):
    place, _ = pictures
    assert main(["eval", str(place / "eval.yaml"), "tasks.a.test=test/0.safetensors"]) == 1
    shown = capsys.readouterr().err
    assert "expected tensors with one and the same number of rows" in shown
    assert "a batch whose samples have several images each is a file of its own in a folder" in shown

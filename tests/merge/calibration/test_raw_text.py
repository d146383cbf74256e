"""Text as a person would encode it by hand with transformers, to the bit."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from raw_cases import CHAT, PARTS, WORDS, llama_config, text_base, tokenizer, write_rows
from safetensors.torch import save_file
from tokenizers import normalizers, processors
from transformers import AutoConfig, AutoModel, LlamaForCausalLM

import nsc_merge
from nsc_merge.calibration.batch_files import Batches
from nsc_merge.calibration.batch_summary import Summary, summary
from nsc_merge.calibration.raw import encoding
from nsc_merge.calibration.raw.drawing import place_of
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

TEXTS = [" ".join("abcdefgh"[: 1 + number * 5 % 8]) for number in range(11)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text, "label": 1} for text in TEXTS])


def made(source, base, batch_size=3, **settings):
    return batches_of(source, str(base), DataSettings(**settings), batch_size, "calibration.a")


def by_hand(texts, batch_size, *, padding_side="right", pad=True, **given):
    """Batches of texts in the order of the draw."""
    tool = tokenizer(pad=pad)
    if not pad:
        tool.pad_token = tool.eos_token
    order = sorted(range(len(texts)), key=lambda number: place_of(0, number))
    lengths = [len(tool(texts[number], **given)["input_ids"]) for number in order]
    places = sorted(range(len(order)), key=lambda place: lengths[place])
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    batches = [batches[number] for number in sorted(range(len(batches)), key=lambda number: place_of(0, number))]
    tool.padding_side = padding_side
    return [
        tool([texts[order[place]] for place in batch], padding=True, return_tensors="pt", **given) for batch in batches
    ]


def assert_equal(batches, expected, names=("attention_mask", "input_ids")):
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert sorted(batch) == sorted(names)
        for name in names:
            assert batch[name].dtype is torch.int64
            assert torch.equal(batch[name], wanted[name]), name


@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_those_made_by_hand(base, file, batch_size, side):
    batches = made(file, base, batch_size, padding_side=side)
    assert_equal(batches, by_hand(TEXTS, batch_size, padding_side=side))


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_samples_are_cut_as_the_tokenizer_cuts_them(base, file, side):
    tool = tokenizer()
    tool.truncation_side = side
    batches = made(file, base, 1, max_length=4, truncation_side=side)
    found = sorted(batch["input_ids"][0].tolist() for batch in batches)
    assert found == sorted(tool(text, truncation=True, max_length=4)["input_ids"] for text in TEXTS)
    assert max(map(len, found)) == 4
    with pytest.raises(ValueError, match=r"^calibration.a: .*row \d+: expected at most 4 tokens, found \d;"):
        made(file, base, max_length=4, truncation=False)


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_is_said_how_many_samples_are_cut(base, file, caplog, side):
    longer = sum(len(tokenizer()(text)["input_ids"]) > 4 for text in TEXTS)
    assert 0 < longer < len(TEXTS)
    made(file, base, max_length=4, truncation_side=side)
    (said,) = caplog.messages
    end = {"right": "end", "left": "beginning"}[side]
    wanted = rf"longer than 4 tokens, as are {longer} of the {len(TEXTS)} samples; cut at the {end} "
    assert re.match(rf"calibration.a: .*, row \d+: {wanted}", said)
    caplog.clear()
    made(file, base, max_length=9)
    assert not caplog.messages


def test_samples_are_no_longer_than_the_model_has_positions(tmp_path, file):
    base = text_base(tmp_path / "base")
    llama_config(max_position_embeddings=5).save_pretrained(base)
    assert max(batch["input_ids"].shape[1] for batch in made(file, base)) == 5
    with pytest.raises(ValueError, match=r"expected at most 5 tokens, found \d; give truncation: true$"):
        made(file, base, truncation=False)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "mpnet", "bert"])
def test_a_base_whose_positions_begin_behind_its_padding_runs_on_the_longest_samples(tmp_path, file, kind):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(
        kind, vocab_size=len(WORDS), max_position_embeddings=8, pad_token_id=1, bos_token_id=2, eos_token_id=2, **sizes
    )
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (batch,) = made(file, tmp_path / "base", len(TEXTS))
    assert batch["input_ids"].shape[1] == (8 if kind == "bert" else 6)
    model(**batch)


def test_without_a_pad_token_the_last_token_pads_and_none_is_added(tmp_path, file):
    base = text_base(tmp_path / "base", pad=False)
    batches = made(file, base)
    assert_equal(batches, by_hand(TEXTS, 3, pad=False))
    padded = torch.cat([batch["input_ids"][batch["attention_mask"] == 0] for batch in batches])
    assert set(padded.tolist()) == {WORDS.index("</s>")}


def test_padding_is_masked_where_the_tokenizer_makes_no_mask(tmp_path, base, file):
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": ["input_ids"]}))
    batches = made(file, base, tokenizer=str(tmp_path))
    assert_equal(batches, by_hand(TEXTS, 3))
    assert any((batch["attention_mask"] == 0).any() for batch in batches)


def test_samples_of_a_model_without_a_mask_are_not_padded(base, file, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids: None)
    batches = list(made(file, base))
    assert all(set(batch) == {"input_ids"} for batch in batches)
    found = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert sorted(found) == sorted(tokenizer()(TEXTS)["input_ids"])
    assert max(len(batch["input_ids"]) for batch in batches) > 1


def test_only_inputs_of_the_model_are_kept(base, file, monkeypatch):
    tool = tokenizer()
    tool.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    monkeypatch.setattr(encoding, "tokenizer_of", lambda *given: tool)
    assert "token_type_ids" in tool("a")
    assert made(file, base).names == ["attention_mask", "input_ids"]


def test_a_template_over_columns(tmp_path, base):
    rows = [{"q": "a b", "a": "c"}, {"q": "d", "a": "e f g"}]
    batches = made(write_rows(tmp_path / "x.jsonl", rows), base, 2, text="user : {q}\nassistant : {a}")
    assert_equal(batches, by_hand(["user : a b\nassistant : c", "user : d\nassistant : e f g"], 2))


def test_text_that_brings_its_first_token_gets_no_second_one(tmp_path, base):
    rows = [{"text": "<s> a b"}, {"text": "a b"}]
    (batch,) = made(write_rows(tmp_path / "x.jsonl", rows), base, 2)
    assert batch["input_ids"].tolist() == [tokenizer()("a b")["input_ids"]] * 2


CHATS = [
    [{"role": "system", "content": "h"}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}],
    [{"role": "user", "content": "d"}],
]


@pytest.mark.parametrize("form", ["openai", "sharegpt", "parts"])
def test_chats_are_encoded_as_the_chat_template_has_it(tmp_path, base, form):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = {
        "openai": [{"messages": chat} for chat in CHATS],
        "sharegpt": [
            {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in chat]}
            for chat in CHATS
        ],
        "parts": [
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]}
            for chat in CHATS
        ],
    }[form]
    batches = made(write_rows(tmp_path / "x.jsonl", rows), base, 1)
    found = sorted(batch["input_ids"][0].tolist() for batch in batches)
    expected = [tokenizer().apply_chat_template(chat, tokenize=True, return_dict=False) for chat in CHATS]
    assert found == sorted(expected)
    assert all(ids.count(WORDS.index("<s>")) == 1 for ids in found)


def test_a_chat_that_the_user_ends_ends_with_the_prompt_for_an_answer(tmp_path):
    """As the model sees it in use, and ``distill`` where it has the model answer; an answer that is there gets none."""
    asking = CHAT + "{% if add_generation_prompt %}assistant :{% endif %}"
    base = text_base(tmp_path / "base", chat=asking)
    asked = [{"role": "user", "content": "a"}]
    called = [*asked, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}]
    for chat, end in ((asked, "a assistant :"), (called, "c assistant :"), (called[:2], "assistant : b")):
        batches = made(write_rows(tmp_path / "x.jsonl", [{"messages": chat}]), base)
        assert batches.first.endswith(end)


def test_a_chat_template_that_reads_parts_gets_parts(tmp_path):
    base = text_base(tmp_path / "base", chat=PARTS)
    batches = made(write_rows(tmp_path / "x.jsonl", [{"messages": CHATS[1]}]), base)
    assert batches.first == "user : d"


def test_chats_that_no_template_takes_are_refused(tmp_path, base):
    file = write_rows(tmp_path / "x.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(ValueError, match="row 1: holds a chat, and there is no chat template beside the base; name a"):
        made(file, text_base(tmp_path / "none", chat=None))
    strict = CHAT + "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(ValueError, match=r"row 1: the chat template refuses it: Roles must alternate$"):
        made(file, text_base(tmp_path / "strict", chat=strict))
    pictured = [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]
    with pytest.raises(ValueError, match="row 1: a message holds an image, and the base takes text alone"):
        made(write_rows(tmp_path / "y.jsonl", pictured), base)


def test_a_tokenizer_that_is_named_is_taken(tmp_path, file):
    llama_config().save_pretrained(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"^calibration.a: beside the base: .*holds no tokenizer"):
        made(file, tmp_path / "base")
    named = text_base(tmp_path / "named")
    assert_equal(made(file, tmp_path / "base", tokenizer=str(named)), by_hand(TEXTS, 3))
    with pytest.raises(FileNotFoundError, match="^calibration.a: tokenizer: .*nowhere is missing; expected a folder"):
        made(file, tmp_path / "base", tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="^calibration.a: beside the base: the tokenizer of .*base cannot be loaded: "):
        made(file, tmp_path / "base")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, file):
    base = text_base(tmp_path / "base")
    llama_config(vocab_size=10).save_pretrained(base)
    with pytest.raises(ValueError, match=r"row \d+: the tokenizer gives token \d+, the base has 10; expected the tok"):
        made(file, base)


def test_a_sample_of_no_token_is_refused(tmp_path):
    base = text_base(tmp_path / "base")
    tool = tokenizer()
    tool.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    tool.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tool.save_pretrained(base)
    with pytest.raises(ValueError, match=r"row 2: holds no token; expected text"):
        made(write_rows(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "z"}]), base)


def test_the_hash_is_of_the_samples_whatever_the_batches(base, file):
    first = made(file, base)
    raw = file.read_bytes()
    assert first.sha256["texts.jsonl"] == hashlib.sha256(raw).hexdigest()
    assert set(first.sha256) == {"texts.jsonl", "samples"}
    assert made(file, base, 5, padding_side="left").sha256 == first.sha256
    others = [made(file, base, seed=1), made(file, base, samples=10), made(file, base, max_length=3)]
    assert len({first.sha256["samples"], *(other.sha256["samples"] for other in others)}) == 4
    by_hand = hashlib.sha256()
    for number in sorted(range(len(TEXTS)), key=lambda number: place_of(0, number)):
        encoded = tokenizer()(TEXTS[number], return_tensors="pt")
        for name in ("attention_mask", "input_ids"):
            value = encoded[name][0]
            by_hand.update(f"{name} torch.int64 [{len(value)}] ".encode() + value.numpy().tobytes())
    assert first.sha256["samples"] == by_hand.hexdigest()
    assert first.first == "<s> " + TEXTS[min(range(len(TEXTS)), key=lambda number: place_of(0, number))]


def test_batches_stay_what_they_are_in_another_dtype(base, file):
    first = made(file, base)
    other = first.to(torch.bfloat16)
    assert (other.sha256, other.first) == (first.sha256, first.first)


def test_a_summary_counts_rows_tokens_and_padding():
    ids = torch.ones(2, 4, dtype=torch.long)
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}
    assert summary(Batches([masked, {"input_ids": ids[:1]}])) == Summary(3, 2, 4.5, 0.25)
    assert summary([{"pixel_values": torch.zeros(5, 3, 2, 2)}]) == Summary(5, 1, 0.0, 0.0)


def test_in_python_a_setting_is_a_keyword(base, file):
    batches = nsc_merge.calibration_data(file, base, batch_size=3, padding_side="left")
    assert_equal(batches, by_hand(TEXTS, 3, padding_side="left"))
    listed = nsc_merge.calibration_data([{"text": text} for text in TEXTS], base, batch_size=3)
    assert_equal(listed, by_hand(TEXTS, 3))
    with pytest.raises(ValueError, match="^calibration_data: sample: no such setting; did you mean samples?"):
        nsc_merge.calibration_data(file, base, sample=3)
    with pytest.raises(FileNotFoundError, match="^source: prompts/french.jsonl is missing"):
        nsc_merge.calibration_data("prompts/french.jsonl", base)
    with pytest.raises(FileNotFoundError, match=r"^model: .*nowhere is missing; expected a folder or a hub id"):
        nsc_merge.calibration_data(file, base / "nowhere")
    with pytest.raises(ValueError, match="^batch_size: expected a whole number of at least 1, found 0"):
        nsc_merge.calibration_data(file, base, batch_size=0)


def test_one_function_takes_raw_data_and_safetensors(tmp_path, base, file):
    ids = torch.arange(10).view(5, 2)
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    kept = batches_of(tmp_path / "inputs.safetensors", str(base), DataSettings(), 2, "calibration.a")
    assert torch.equal(torch.cat([batch["input_ids"] for batch in kept]), ids)
    assert list(kept.sha256) == ["inputs.safetensors"]
    assert_equal(batches_of(file, str(base), DataSettings(), 3, "calibration.a"), by_hand(TEXTS, 3))


@pytest.mark.parametrize("name", ["SpeechT5ForSpeechToSpeech", "Pix2StructForConditionalGeneration"])
def test_models_that_take_more_are_refused(tmp_path, file, name):
    kind = name.partition("For")[0].lower()
    AutoConfig.for_model(kind, architectures=[name]).save_pretrained(tmp_path)
    message = f"^calibration.a: a {kind} does not run on text, images or audio alone.*decoder_.*safetensors$"
    with pytest.raises(ValueError, match=message):
        made(file, tmp_path)

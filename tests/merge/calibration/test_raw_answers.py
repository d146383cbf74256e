"""Labels of raw samples, as tokens and numbers: where they stand beside the inputs of each kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_cases import WHISPER_WORDS, audio_base, noise, write_wave
from raw_cases import WORDS, gemma_base, paligemma_base, picture, text_base
from test_raw_decoders import base as decoder_base

from nsc_merge.calibration.raw.labels import ANSWER_COLUMNS, Labelling
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

pytestmark = pytest.mark.usefixtures("offline")


def labelled(source: Any, base: Path, labelling: Labelling, batch_size: int = 1, **settings: Any) -> Any:
    return batches_of(source, str(base), DataSettings(**settings), batch_size, "tasks.t.test", labelling=labelling)


def ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


def test_what_begins_a_text_begins_no_answer(tmp_path):
    text_base(tmp_path / "base")
    rows = [{"text": "a b", "answer": "c d"}]
    (behind,) = labelled(rows, tmp_path / "base", Labelling("answer"))
    assert behind["input_ids"].tolist() == [ids("<s> a b c d </s>")]
    assert behind["labels"].tolist() == [[-100, -100, -100, *ids("c d </s>")]]
    assert behind["attention_mask"].tolist() == [[1] * 6]
    (beside,) = labelled(rows, tmp_path / "base", Labelling("answer", generated=True))
    assert beside["input_ids"].tolist() == [ids("<s> a b")]
    assert beside["labels"].tolist() == [ids("c d </s>")]


@pytest.mark.parametrize(("kind", "of_answers"), [(gemma_base, 0), (paligemma_base, 1)])
def test_what_is_written_is_of_its_own_kind(tmp_path, kind, of_answers):
    """Of Gemma 3 it is text, whatever images are; PaliGemma tells it from what it reads."""
    kind(tmp_path / "base")
    rows = [{"image": picture(0), "text": "a b", "answer": "c d"}]
    (prompt,) = labelled(rows, tmp_path / "base", Labelling("answer", generated=True))
    (behind,) = labelled(rows, tmp_path / "base", Labelling("answer"))
    assert behind["input_ids"][:, -3:].tolist() == [ids("c d </s>")]
    assert behind["labels"].tolist() == [[-100] * prompt["input_ids"].shape[1] + ids("c d </s>")]
    kinds = [name for name in prompt if name.endswith("token_type_ids")]
    assert kinds
    for name in ("input_ids", *kinds):
        assert behind[name][:, :-3].equal(prompt[name]), name
    for name in kinds:
        assert behind[name][:, -3:].tolist() == [[of_answers] * 3], name
    assert behind["pixel_values"].equal(prompt["pixel_values"])


@pytest.mark.parametrize(("kind", "positions"), [("bart", 12), (None, 64)])
def test_an_answer_ends_where_positions_end(tmp_path, kind, positions):
    place = tmp_path / "base"
    if kind is None:
        text_base(place)
        prompt = ids("<s> a b")
        room = positions - len(prompt) - 1  # </s>
    else:
        decoder_base(place, kind)
        room = positions - 1  # of which the last, </s>, is read of nobody
    (batch,) = labelled([{"text": "a b", "answer": "c " * room}], place, Labelling("answer"))
    assert batch["decoder_input_ids" if kind else "input_ids"].shape == (1, positions)
    with pytest.raises(ValueError, match=f"row 1: expected at most {positions} tokens, found .* of its answer; give a"):
        labelled([{"text": "a b", "answer": "c " * (room + 1)}], place, Labelling("answer"))


def test_answers_of_a_decoder_are_padded_behind(tmp_path):
    decoder_base(tmp_path, "bart")
    rows = [{"text": "a", "answer": "c"}, {"text": "a", "answer": "d e f"}]
    (batch,) = labelled(rows, tmp_path, Labelling("answer"), 2, padding_side="left")
    assert sorted(batch["labels"].tolist()) == sorted([[*ids("c </s>"), -100, -100], ids("d e f </s>")])


def test_a_decoder_is_not_asked_for_what_its_encoder_reads(tmp_path):
    decoder_base(tmp_path, "t5")
    with pytest.raises(ValueError, match="row 1: labels: the encoder reads that very text; expected another column"):
        labelled([{"text": "a b"}], tmp_path, Labelling("answer", "text"))


def test_only_the_last_turn_is_the_answer(tmp_path):
    text_base(tmp_path)
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
    turns = [{"role": role, "content": content} for role, content in said]
    (batch,) = labelled([{"messages": turns}], tmp_path, Labelling("answer", generated=True))
    assert batch["input_ids"].tolist() == [ids("<s> user : a assistant : b user : c")]
    assert batch["labels"].tolist() == [ids("d e </s>")]
    for open_chat in (turns[:3], turns[1:2]):
        with pytest.raises(ValueError, match="row 1: no column of labels, such as answer, in messages"):
            labelled([{"messages": open_chat}], tmp_path, Labelling("answer", generated=True))
    # In parts, as data of models that see have them; of an image that it holds nothing is measured.
    parts = [{"type": "text", "text": "d "}, {"type": "text", "text": "e", "index": None}]
    (again,) = labelled(
        [{"messages": [*turns[:3], {"role": "assistant", "content": parts}]}], tmp_path,
        Labelling("answer", generated=True),
    )  # fmt: skip
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    drawn = [*turns[:3], {"role": "assistant", "content": [*parts, {"type": "image"}]}]
    with pytest.raises(ValueError, match="row 1: no column of labels, such as answer, in messages"):
        labelled([{"messages": drawn}], tmp_path, Labelling("answer", generated=True))
    # A column says the answer to the chat as it stands.
    (batch,) = labelled([{"messages": turns, "answer": "f"}], tmp_path, Labelling("answer", generated=True))
    assert batch["input_ids"].tolist() == [ids("<s> user : a assistant : b user : c assistant : d e")]
    assert batch["labels"].tolist() == [ids("f </s>")]


def test_what_whisper_is_to_write_stands_in_a_column_of_any_name(tmp_path):
    """Also in that of texts, which it does not read."""
    audio_base(tmp_path / "base", "whisper")
    write_wave(tmp_path / "clips" / "0.wav", noise(0.2))
    row = {"file_name": "0.wav", "text": "ab"}
    (tmp_path / "clips" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    named, found = (
        labelled(tmp_path / "clips", tmp_path / "base", Labelling("answer", column)) for column in ("text", None)
    )
    assert named.sha256["samples"] == found.sha256["samples"]


def test_whisper_predicts_an_answer_behind_all_that_begins_one(tmp_path):
    """Start, language, task and times: the last of these predicts the first token of the answer."""
    audio_base(tmp_path / "base", "whisper")
    write_wave(tmp_path / "clips" / "0.wav", noise(0.2))
    (tmp_path / "clips" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.wav", "text": "ab"}) + "\n")
    begins = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    begin, answer, end = ([WHISPER_WORDS.index(word) for word in words] for words in (begins, "ab", ["<|endoftext|>"]))
    (behind,) = labelled(tmp_path / "clips", tmp_path / "base", Labelling("answer"))
    assert behind["decoder_input_ids"].tolist() == [begin + answer]
    assert behind["decoder_attention_mask"].tolist() == [[1] * 6]
    assert behind["labels"].tolist() == [[-100, -100, -100, *answer, *end]]
    (beside,) = labelled(tmp_path / "clips", tmp_path / "base", Labelling("answer", generated=True))
    assert beside["decoder_input_ids"].tolist() == [begin]
    assert beside["labels"].tolist() == [answer + end]


def test_ctc_ends_with_the_audio(tmp_path):
    from transformers import Wav2Vec2CTCTokenizer

    letters = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abc"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    audio_base(tmp_path / "base", "ctc", vocab_size=len(letters), pad_token_id=0)
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path / "base")
    write_wave(tmp_path / "clips" / "0.wav", noise(0.2))
    row = {"file_name": "0.wav", "sentence": "ab"}
    (tmp_path / "clips" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (batch,) = labelled(tmp_path / "clips", tmp_path / "base", Labelling("answer", generated=True))
    assert batch["labels"].tolist() == [[letters["a"], letters["b"]]]


def test_an_answer_with_half_a_character_is_refused(tmp_path):
    text_base(tmp_path / "base")
    with pytest.raises(ValueError, match="row 1: holds .*, half of a character"):
        labelled([{"text": "a", "answer": "b \ud800"}], tmp_path / "base", Labelling("answer"))


def test_labels_are_nothing_that_a_text_is_read_without():
    """A column of answers may be called as one that is read beside a text usually is."""
    Labelling("answer").check_read("text", DataSettings(), ["text", "sentence"], "sentence", "a")
    with pytest.raises(ValueError, match="a: column 'text' would be read alone, beside sentence; expected text: text"):
        Labelling("answer").check_read("text", DataSettings(), ["text", "sentence", "answer"], "answer", "a")


def test_a_second_text_holds_no_label():
    settings = DataSettings(text="premise", text_pair="{hypothesis} {label}")
    with pytest.raises(ValueError, match="text_pair: .* holds the column 'label' of the labels, which the model would"):
        Labelling("class").column_in(["premise", "hypothesis", "label"], settings, "a", text=True)


def test_what_the_columns_of_labels_are_called():
    for name in ("answer", "completion", "response", "output", "target", "summary", "highlights", "sentence"):
        assert name in ANSWER_COLUMNS
        assert Labelling("answer").column_in(["text", name], DataSettings(), "a", text=True) == name
        assert Labelling("class").column_in(["text", name], DataSettings(), "a", text=True) is None
    for name in ("label", "labels", "class", "score"):
        assert Labelling("value").column_in(["text", name], DataSettings(), "a", text=True) == name
    # What is said in audio, or written in an image, and no class of it.
    assert Labelling("answer").column_in(["image", "text"], DataSettings(), "a", text=False) == "text"
    assert Labelling("class").column_in(["image", "text"], DataSettings(), "a", text=False) is None


@pytest.mark.parametrize(
    ("classes", "label", "number"),
    [
        (["1", "2"], 0, 0),
        (["1", "2"], 1, None),
        (["1", "2"], "2", 1),
        (["1", "2"], "0", None),
        (["0", "2", "1"], "1", 2),
        (["0", "2", "1"], 0, 0),
        (["0", "2", "1"], 1, None),
        (["1", "cat"], "0", None),
        (["1", "cat"], "cat", 1),
        (["0", "1"], True, 1),
        (["no", "yes"], "1", 1),
        (["no", "yes"], 2, None),
        ((), 7, 7),
        ((), "7.0", 7),
        ((), "7.5", None),
        ((), float("inf"), None),
        ((), [1], None),
    ],
)
def test_numbers_that_may_be_names_are_refused(classes, label, number):
    labelling = Labelling("class", classes=classes)
    if number is not None:
        assert labelling.number_of(label, "row 1") == number
        return
    with pytest.raises(ValueError, match="row 1: "):
        labelling.number_of(label, "row 1")


@pytest.mark.parametrize("answer", [True, "  ", ["a", False], [["a"]], {"said": "a"}])
def test_what_is_no_text_is_no_answer(tmp_path, answer):
    text_base(tmp_path)
    with pytest.raises(ValueError, match="row 1: expected a text, or a list of texts, as its answer, found"):
        labelled([{"text": "a", "answer": answer}], tmp_path, Labelling("answer", generated=True))


def test_a_column_of_labels_called_text_is_not_read(tmp_path):
    text_base(tmp_path)
    rows = [{"prompt": "a", "text": "b"}]
    (batch,) = labelled(rows, tmp_path, Labelling("answer", "text", generated=True))
    assert batch["input_ids"].tolist() == [ids("<s> a")]
    assert batch["labels"].tolist() == [ids("b </s>")]
    (batch,) = labelled(rows, tmp_path, Labelling("class", "text", classes=["a", "b"]))
    assert batch["input_ids"].tolist() == [ids("<s> a")]
    assert batch["labels"].tolist() == [1]

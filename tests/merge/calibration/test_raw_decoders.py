"""Raw text for models with an encoder, whose decoder has inputs of its own: what transformers makes of labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raw_cases import WORDS, text_base, tokenizer, write_rows
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import nsc_merge
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    "bart": {
        **{f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
        "d_model": 8,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "max_position_embeddings": 12,
    },
}
CLASSES = {"t5": "T5", "bart": "Bart"}
ASKED = ["a b c", "b", "d e f g", "h a", "c c"]
ANSWERS = ["e", "f g h", "a b", "c d e f g", " "]


def base(folder: Path, kind: str, head: str = "ForConditionalGeneration", **changed: Any) -> Path:
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, **changed}
    config = AutoConfig.for_model(
        kind, vocab_size=len(WORDS), architectures=[CLASSES[kind] + head], num_labels=3, **SIZES[kind], **numbers
    )
    config.save_pretrained(folder)
    tool().save_pretrained(folder)
    return folder


def tool() -> Any:
    made = tokenizer(chat=None)
    ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made.backend_tokenizer.post_processor = ends
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"question": asked, "answer": answer} for asked, answer in zip(ASKED, ANSWERS, strict=True)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def made(file: Path, place: Path, batch_size: int = 2, **settings: Any) -> Any:
    return batches_of(file, str(place), DataSettings(text="question", **settings), batch_size, "calibration.a")


def read(batches: Any, name: str = "decoder_input_ids") -> dict[str, list[int]]:
    """What the decoder reads without its padding, by what the encoder reads."""
    found = {}
    for batch in batches:
        assert batch[name].dtype is torch.int64
        sides = [(batch["input_ids"], batch["attention_mask"]), (batch[name], batch[f"{name[:-9]}attention_mask"])]
        for row in range(len(batch["input_ids"])):
            asked, own = (ids[row][mask[row] == 1] for ids, mask in sides)
            found[tool().decode(asked, skip_special_tokens=True)] = own.tolist()
    return found


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_decoder_reads_what_transformers_makes_of_labels(file, tmp_path, kind, side):
    place = base(tmp_path / "base", kind)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(place))
    batches = made(file, place, target="answer", padding_side=side)
    found = read(batches)
    labels = tool()(text_target=ANSWERS, padding=True, return_tensors="pt")
    moved = model.prepare_decoder_input_ids_from_labels(labels["input_ids"])
    for asked, answer, row, mask in zip(ASKED, ANSWERS, moved, labels["attention_mask"], strict=True):
        # Of a blank answer nothing but the start is read.
        assert found[asked] == row[: mask.sum() if answer.strip() else 1].tolist()
    for batch in batches:
        # An answer begins where the decoder does, wherever the question is padded.
        assert batch["decoder_input_ids"][:, 0].tolist() == [2] * len(batch["input_ids"])
        assert batch["attention_mask"][:, 0 if side == "right" else -1].all()
        assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("kind", SIZES)
def test_without_a_target_the_decoder_reads_its_start(file, tmp_path, kind):
    found = read(made(file, base(tmp_path / "base", kind, decoder_start_token_id=7)))
    assert found == {asked: [7] for asked in ASKED}


def test_a_model_without_a_head_writes_too(file, tmp_path):
    place = base(tmp_path / "base", "t5", "Model")
    model = AutoModel.from_config(AutoConfig.from_pretrained(place))
    found = nsc_merge.calibration_data(file, model, text="question", target="answer", tokenizer=str(place))
    assert read(found)["d e f g"] == tool()(text_target="a b")["input_ids"][-1:] + tool()("a b")["input_ids"][:-1]


# BART numbers positions whatever the mask says.
@pytest.mark.parametrize(("kind", "side"), [("t5", "right"), ("t5", "left"), ("bart", "right")])
def test_a_classifiers_decoder_reads_the_input_as_it_does_by_itself(file, tmp_path, kind, side):
    place = base(tmp_path / "base", kind, "ForSequenceClassification")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(place)).eval()
    for batch in made(file, place, padding_side=side):
        found = model(**batch).logits
        for row, mask in enumerate(batch["attention_mask"]):
            alone = {name: batch[name][row : row + 1, mask == 1] for name in ("input_ids", "attention_mask")}
            torch.testing.assert_close(found[row], model(**alone).logits[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="calibration.a: .*target: 'answer' is named, and the base writes no text"):
        made(file, place, target="answer")


def test_a_long_target_is_cut_at_its_end_or_refused(file, tmp_path, caplog):
    place = base(tmp_path / "base", "bart")
    whole = read(made(file, place, target="answer"))
    cut = read(made(file, place, target="answer", max_length=4, truncation_side="left"))
    assert cut["h a"] == whole["h a"][:4] == [2, 9 + 2, 9 + 3, 9 + 4]
    (said,) = [one for one in caplog.messages if "cut at the end" in one]
    assert "longer than 4 tokens, as are 1 of the 5 samples" in said
    with pytest.raises(ValueError, match=r"row 4: its target: expected at most 5 tokens, found 6; give a larger max"):
        made(file, place, target="answer", max_length=5, truncation=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "answers"}, "target: column 'answers' is not there; did you mean answer"),
        ({"target": "{answer"}, "target: a '{' alone in the template"),
        ({"target": ""}, "target: expected text, found ''"),
    ],
)
def test_targets_that_cannot_be_are_refused(file, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        made(file, base(tmp_path / "base", "t5"), **settings)


def test_a_target_with_half_a_character_is_refused(tmp_path):
    rows = [{"question": "a", "answer": "b \ud800"}]
    with pytest.raises(ValueError, match=r"row 1: holds '\\ud800', half of a character"):
        made(rows, base(tmp_path / "base", "t5"), target="answer")


def test_a_base_whose_decoder_begins_with_nothing_is_refused(file, tmp_path):
    place = base(tmp_path / "base", "t5", decoder_start_token_id=None)
    with pytest.raises(ValueError, match=r"calibration.a: the configuration of .*base has no decoder_start_token_id"):
        made(file, place)


def test_a_decoder_alone_has_no_target(file, tmp_path):
    with pytest.raises(ValueError, match="target: 'answer' is named, and the base writes no text behind an encoder"):
        made(file, text_base(tmp_path / "base"), target="answer")


def test_an_encoder_that_sees_is_refused(file):
    """Into whose text each processor places images in a way of its own."""

    def forward(input_ids: Any, pixel_values: Any, decoder_input_ids: Any) -> None:
        """Never called."""

    model = SimpleNamespace(config=SimpleNamespace(model_type="sees", decoder_start_token_id=2), forward=forward)
    with pytest.raises(ValueError, match=r"a sees does not run on text, images or audio alone \(it takes dec"):
        batches_of(file, model, DataSettings(text="question"), 2, "calibration.a")


def test_targets_are_part_of_what_samples_are(file, tmp_path):
    place = base(tmp_path / "base", "t5")
    kinds = [made(file, place).sha256["samples"], made(file, place, target="answer").sha256["samples"]]
    assert len(set(kinds)) == 2
    template = made(file, place, target="{answer}").sha256["samples"]
    assert template == kinds[1]

"""Raw audio in the midst of text: what the processors of models that read and hear make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from audio_cases import RATE, noise
from PIL import Image
from raw_cases import text_base, tokenizer
from zoo import write_adapter

import nsc_merge
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

WAVES = [noise(seconds, seed) for seed, seconds in enumerate((0.4, 0.9, 1.5))]
HEARD = [{"array": wave, "sampling_rate": RATE} for wave in WAVES]
SAID = {"type": "text", "text": "a b"}
TOKENS = {"audio_token": "<|AUDIO|>", "begin": "<|audio_bos|>", "end": "<|audio_eos|>"}
PLACE = "<|audio_bos|><|AUDIO|><|audio_eos|>"
PARTS = (
    "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}{% if p['type'] == 'audio' %}"
    + PLACE
    + "{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def processor(template: str = PARTS) -> Any:
    words = tokenizer(chat=None, extra=TOKENS)
    return tf.Qwen2AudioProcessor(tf.WhisperFeatureExtractor(feature_size=8, chunk_length=2), words, template)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tool = processor()
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 24}
    heard = {"model_type": "qwen2_audio_encoder", "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 1}
    config = tf.Qwen2AudioConfig(
        audio_config={**heard, "encoder_ffn_dim": 8, "num_mel_bins": 8, "max_source_positions": 100},
        text_config={"model_type": "qwen2", **sizes, "num_key_value_heads": 2, "intermediate_size": 8},
        audio_token_index=tool.audio_token_id,
        architectures=["Qwen2AudioForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path / "base")
    tool.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made(source: Any, base: Path, batch_size: int = 1, **settings: Any) -> Any:
    return batches_of(source, str(base), DataSettings(**settings), batch_size, "calibration.a")


def by_hand(text: str, waves: list[Any]) -> dict[str, torch.Tensor]:
    return dict(processor()(text=[text], audio=waves, return_tensors="pt", audio_kwargs={"sampling_rate": RATE}))


def assert_same(batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize(
    "row",
    [
        {"audio": HEARD[0], "prompt": "a b"},
        {"audio": HEARD[0], "prompt": "<audio>a b"},
        {"audio": [HEARD[0]], "prompt": "<|AUDIO|> a b"},
        {"audio": HEARD[0], "messages": [{"role": "user", "content": "a b"}]},
        {"audio": HEARD[0], "conversations": [{"from": "human", "value": "<audio>\na b"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": HEARD[0]}, SAID]}]},
        {"audio": HEARD[0], "messages": [{"role": "user", "content": [{"type": "audio"}, SAID]}]},
    ],
    ids=["column", "placed", "token", "chat", "sharegpt", "parts", "part and column"],
)
def test_a_row_is_what_the_processor_makes_of_it(row, place):
    (batch,) = made([row], place)
    # A text with the model's own token is taken as it is.
    said = row.get("prompt", "")
    assert_same(batch, by_hand(said if "<|AUDIO|>" in said else f"user : {PLACE}a b ", WAVES[:1]))


def test_samples_stand_together_and_the_model_takes_them(place):
    rows = [{"audio": one, "prompt": said} for one, said in zip(HEARD, ("a b c", "d", "e"), strict=True)]
    model = tf.Qwen2AudioForConditionalGeneration(tf.AutoConfig.from_pretrained(place)).eval()
    batches = made(rows, place, 3)
    (batch,) = batches
    assert batch["input_features"].shape == (3, 8, 200)
    logits = model(**batch).logits
    for row, mask in enumerate(batch["attention_mask"]):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone |= {name: alone[name][:, mask == 1] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(logits[row][mask == 1], model(**alone).logits[0], rtol=1e-4, atol=1e-5)
    assert batches.first.count("<|AUDIO|>") == 1


def test_two_recordings_and_none(place):
    rows = [{"audio": HEARD[:2], "prompt": "a"}, {"audio": None, "prompt": "b"}]
    heard, silent = sorted(made(rows, place), key=len, reverse=True)
    assert_same(heard, by_hand(f"user : {PLACE}{PLACE}a ", WAVES[:2]))
    assert set(silent) == {"input_ids", "attention_mask"}


def test_text_is_cut_and_audio_is_not(place, caplog):
    (batch,) = made([{"audio": HEARD[0], "prompt": "a b c d e f g h"}], place, max_length=7)
    whole = by_hand(f"user : {PLACE}a b c d e f g h ", WAVES[:1])
    # The first token is one of the text's.
    count = int((whole["input_ids"] == processor().audio_token_id).sum())
    assert torch.equal(batch["input_ids"], whole["input_ids"][:, : count + 7])
    assert torch.equal(batch["input_features"], whole["input_features"])
    assert "longer than 7 tokens" in caplog.text
    caplog.clear()
    wave = noise(2.5, 7)
    (batch,) = made([{"audio": {"array": wave, "sampling_rate": RATE}, "prompt": "a"}], place)
    assert_same(batch, by_hand(f"user : {PLACE}a ", [wave[:32_000]]))
    assert "row 1: longer than 2 s, as are 1 of the 1 samples' audio; cut at the end" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": HEARD[:2], "prompt": "<|AUDIO|> a"}, "as many recordings as places .*found 2 recordings and 1"),
        ({"audio": HEARD[0]}, r"holds audio alone \(audio .*the base takes text beside them: .*clips/1.wav"),
        ({"audio": HEARD[0], "prompt": " "}, "row 1: holds audio and no text in column 'prompt'"),
        ({"audio": HEARD[0], "messages": []}, "row 1: holds audio and no message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
            "row 1: holds images, and Qwen2AudioProcessor takes none",
        ),
        ({"audio": {"bytes": b"no", "path": None}, "prompt": "a"}, "the audio cannot be decoded by libsndfile"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row, message, place):
    with pytest.raises(ValueError, match=message):
        made([row], place, **({"messages": "messages"} if row.get("messages") == [] else {}))


def test_a_second_text_is_not_passed_over(place):
    row = {"audio": HEARD[0], "question": "a", "hint": "b"}
    with pytest.raises(ValueError, match="row 1: text_pair: Qwen2AudioProcessor takes one text beside images or audio"):
        made([row], place, text="question", text_pair="hint")
    (batch,) = made([row], place, text="{question} {hint}")
    assert_same(batch, by_hand(f"user : {PLACE}a b ", WAVES[:1]))


def test_a_text_base_refuses_audio_in_a_chat(tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}
    with pytest.raises(ValueError, match="row 1: a message holds audio, and the base takes text alone"):
        made([row], text_base(tmp_path / "text"))


def test_a_base_without_its_processor_is_told(place):
    (place / "processor_config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="calibration.a: "):
        made([{"audio": HEARD[0], "prompt": "a"}], place)


def test_images_and_audio_in_one_row(tmp_path):
    """Of Gemma 3n, whose processor has places for both."""
    names = ("audio_token", "boa_token", "eoa_token", "image_token", "boi_token", "eoi_token")
    words = tokenizer(chat=None, extra={name: f"<{name}>" for name in names})
    tool = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(), tf.SiglipImageProcessor(size={"height": 8, "width": 8}), words,
        audio_seq_length=3, image_seq_length=2,
    )  # fmt: skip
    tool.save_pretrained(tmp_path)
    tf.Gemma3nConfig(architectures=["Gemma3nForConditionalGeneration"]).save_pretrained(tmp_path)
    picture = Image.new("RGB", (8, 8), "red")
    row = {"shown": picture, "said": HEARD[0], "prompt": "a b"}
    (batch,) = made([row], tmp_path)
    expected = tool(
        text=["<s> <image_token><audio_token>\na b"], images=[picture], audio=[WAVES[0]], return_tensors="pt",
        text_kwargs={"add_special_tokens": False},
    )  # fmt: skip
    assert_same(batch, {name: value for name, value in expected.items() if name in batch})
    assert {"input_features", "input_features_mask", "pixel_values"} < set(batch)


def _gemma(folder: Path) -> tf.Gemma3nProcessor:
    names = ("audio_token", "boa_token", "eoa_token", "image_token", "boi_token", "eoi_token")
    words = tokenizer(chat=None, extra={name: f"<{name}>" for name in names})
    tool = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(feature_size=8), tf.SiglipImageProcessor(size={"height": 8, "width": 8}), words,
        audio_seq_length=3, image_seq_length=2,
    )  # fmt: skip
    tool.save_pretrained(folder)
    tf.Gemma3nConfig(architectures=["Gemma3nForConditionalGeneration"]).save_pretrained(folder)
    return tool


def test_as_many_frames_as_tokens_are_frames(tmp_path):
    tool = _gemma(tmp_path)
    wave = {"array": noise(0.42), "sampling_rate": RATE}
    frames = tool.feature_extractor([wave["array"]], return_tensors="pt")["input_features"].shape[1]
    (few,) = made([{"audio": wave, "prompt": "a"}], tmp_path)
    more = frames - few["input_ids"].shape[1]
    rows = [{"audio": wave, "prompt": "a" + " a" * count} for count in (more, 0)]
    (batch,) = made(rows, tmp_path, 2)
    assert batch["input_ids"].shape == batch["input_features_mask"].shape == (2, frames)
    # Of the longer alone, which has as many of both.
    (alone,) = made(rows[:1], tmp_path)
    assert alone["input_ids"].shape == alone["input_features_mask"].shape == (1, frames)


def test_what_gemma_would_cut_by_itself_is_said(tmp_path, caplog):
    _gemma(tmp_path)
    wave = noise(30.5)
    (batch,) = made([{"audio": {"array": wave, "sampling_rate": RATE}, "prompt": "a"}], tmp_path, max_seconds=40)
    assert "longer than 30 s, as are 1 of the 1 samples' audio" in caplog.text
    (shorter,) = made([{"audio": {"array": wave[: 30 * RATE], "sampling_rate": RATE}, "prompt": "a"}], tmp_path)
    assert_same(batch, shorter)


def test_what_a_processor_hears_in_pieces_is_taken_whole(tmp_path, caplog):
    """Of Audio Flamingo 3, whose extractor takes half a minute, and whose processor ten."""
    words = tokenizer(chat=None, extra={"audio_token": "<sound>"})
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, return_attention_mask=True)
    tool = tf.AudioFlamingo3Processor(extractor, words, max_audio_len=3)
    tool.save_pretrained(tmp_path)
    tf.AudioFlamingo3Config(architectures=["AudioFlamingo3ForConditionalGeneration"]).save_pretrained(tmp_path)
    wave = noise(3.5)
    count = 2 * RATE + 800
    rows = [{"audio": {"array": one, "sampling_rate": RATE}, "prompt": "a"} for one in (wave[:count], wave)]
    for row, seconds, heard in ((rows[0], 30, wave[:count]), (rows[1], 2, wave[: 2 * RATE])):
        (batch,) = made([row], tmp_path, max_seconds=seconds)
        expected = tool(
            text=["<sound>\na"], audio=[heard], return_tensors="pt", audio_kwargs={"sampling_rate": RATE}
        )
        assert_same(batch, dict(expected))
    caplog.clear()
    (batch,) = made([rows[1]], tmp_path)
    assert len(batch["input_features"]) == 3
    assert "longer than 3 s" in caplog.text


def test_a_merge_of_raw_audio_is_that_of_its_inputs(place, tmp_path):
    torch.manual_seed(0)
    model = tf.Qwen2AudioForConditionalGeneration(tf.AutoConfig.from_pretrained(place)).eval()
    folders = {
        task: write_adapter(model, tmp_path / task, n, r=2, target_modules=["q_proj", "v_proj"])
        for n, task in enumerate("ab")
    }
    rows = [{"audio": one, "prompt": "a b"} for one in HEARD]
    raw = nsc_merge.calibration_data(rows, place, batch_size=2)
    ready = [dict(batch) for batch in raw]
    found = [
        nsc_merge.merge(model, folders, {"a": data, "b": data}, "nsc", steps=2, progress=False) for data in (raw, ready)
    ]
    assert found[0].history[0]["omega"] == found[1].history[0]["omega"]

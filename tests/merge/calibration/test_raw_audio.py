"""Raw audio: what a model's own feature extractor makes of each recording, whatever it is stored as."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers as tf
from audio_cases import (
    MODELS,
    RATE,
    START,
    WHISPER_WORDS,
    audio_base,
    model_of,
    noise,
    whisper_words,
    write_wave,
)
from raw_cases import text_base, vision_base, write_rows
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from zoo import write_adapter

import nsc_merge
from nsc_merge.calibration.raw.reading import batches_of
from nsc_merge.calibration.raw.settings import DataSettings

SECONDS = [0.3, 0.5, 0.41, 0.5, 0.62]
SAID = ["ab c", "h", "de fg", "a", "b b"]
WAVES = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for number, wave in enumerate(WAVES):
        write_wave(tmp_path / "clips" / f"{number}.wav", wave)
    rows = [{"path": f"clips/{number}.wav", "sentence": said} for number, said in enumerate(SAID)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def made(source: Any, place: Path, batch_size: int = 2, **settings: Any) -> Any:
    return batches_of(source, str(place), DataSettings(**settings), batch_size, "calibration.a")


def by_hand(name: str, waves: Any = WAVES) -> dict[str, torch.Tensor]:
    """As the extractor pads them: to the longest, where its model has no length of its own."""
    padding = {"padding": True} if name in ("ctc", "without a mask", "speech to text") else {}
    return dict(MODELS[name][2]()(list(waves), sampling_rate=RATE, return_tensors="pt", **padding))


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_those_of_the_feature_extractor(name, file, tmp_path):
    target = {"target": "sentence"} if name in ("whisper", "speech to text") else {}
    batches = made(file, audio_base(tmp_path / "base", name), **target)
    main = next(iter(by_hand(name, WAVES[:1])))
    # By their first values: each is another, and none is scaled by what stands beside it.
    alone = [by_hand(name, [wave]) for wave in WAVES]
    left = set(range(len(WAVES)))
    for batch in batches:
        rows = [next(n for n in left if torch.equal(alone[n][main][0, :20], row[:20])) for row in batch[main]]
        left -= set(rows)
        expected = by_hand(name, [WAVES[row] for row in rows])
        for key, value in expected.items():
            torch.testing.assert_close(batch[key], value.to(batch[key].dtype), rtol=0, atol=1e-6)
        assert set(batch) - set(expected) == ({"decoder_input_ids", "decoder_attention_mask"} if target else set())
        assert torch.isfinite(model_of(name)(**batch).logits).all()
    assert not left
    assert {"samples", "audio", "rows.jsonl"} == set(batches.sha256)


def test_frames_of_unequal_recordings_are_padded_together(tmp_path):
    """Of an extractor that makes a spectrogram with a mask."""
    place = audio_base(tmp_path / "base", "speech to text")
    waves = [noise(seconds, 1) for seconds in (0.4, 0.6)]
    (batch,) = made([{"audio": {"array": wave, "sampling_rate": RATE}} for wave in waves], place)
    expected = [by_hand("speech to text", [wave])["input_features"][0] for wave in waves]
    for row, one in enumerate(expected):
        assert torch.equal(batch["input_features"][row, : len(one)], one)
        assert not batch["input_features"][row, len(one) :].any()
        assert batch["attention_mask"][row].tolist() == [1] * len(one) + [0] * (len(expected[1]) - len(one))


def test_a_column_of_recordings_is_told_from_others(file, tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    path = str(write_wave(tmp_path / "said.wav", WAVES[0]))
    (batch,) = made([{"speaker": 3, "known": None, "words": "a b", "clip": path}], place)
    assert torch.equal(batch["input_values"], by_hand("ctc", WAVES[:1])["input_values"])


def test_recordings_of_a_model_without_a_mask_are_not_padded(file, tmp_path):
    """As those of wav2vec2-base were trained; two of one length stand together."""
    sizes = [batch["input_values"].shape for batch in made(file, audio_base(tmp_path / "base", "without a mask"), 8)]
    assert sorted(sizes) == [(1, 4800), (1, 6560), (1, 9920), (2, 8000)]


def test_whispers_decoder_reads_what_its_labels_are_made_of(file, tmp_path):
    place = audio_base(tmp_path / "base", "whisper")
    found = {}
    for batch in made(file, place, target="sentence"):
        for ids, mask in zip(batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True):
            found[whisper_words().decode(ids[mask == 1], skip_special_tokens=True)] = ids[mask == 1].tolist()
    prefix = [f"<|{one}|>" for one in ("startoftranscript", "de", "transcribe", "notimestamps")]
    for said in SAID:
        # The usual collator cuts the first token off, which the model then puts in front.
        labels = torch.tensor([whisper_words()(text_target=said)["input_ids"][1:]])
        moved = shift_tokens_right(labels, 0, START)[0]
        assert found[said] == moved.tolist()
        assert found[said][:4] == [WHISPER_WORDS.index(one) for one in prefix]


def test_without_a_target_whispers_answer_begins_with_language_and_task(file, tmp_path):
    place = audio_base(tmp_path / "base", "whisper")
    for batch in made(file, place):
        assert batch["decoder_input_ids"].tolist() == [[START, *whisper_words().prefix_tokens[1:]]] * len(
            batch["decoder_input_ids"]
        )
        model_of("whisper")(**batch)


def test_a_decoder_whose_tokenizer_begins_nothing_reads_its_start(file, tmp_path):
    for batch in made(file, audio_base(tmp_path / "base", "speech to text")):
        assert batch["decoder_input_ids"].tolist() == [[1]] * len(batch["input_features"])


def test_targets_are_cut_at_the_decoders_positions(tmp_path, caplog):
    place = audio_base(tmp_path / "base", "whisper")
    rows = [{"audio": {"array": WAVES[0], "sampling_rate": RATE}, "said": "a b c d e f g h"}]
    (batch,) = made(rows, place, target="said")
    assert batch["decoder_input_ids"].shape == (1, 11)
    assert "longer than 12 tokens" in caplog.text
    model_of("whisper")(**batch)


def _folder(tmp_path: Path) -> Path:
    """As datasets' audiofolder has it."""
    rows = [{"file_name": f"clips/{number}.wav", "sentence": said} for number, said in enumerate(SAID)]
    return write_rows(tmp_path / "metadata.jsonl", rows).parent


def _stored() -> datasets.Dataset:
    held = []
    for number, wave in enumerate(WAVES):
        raw = io.BytesIO()
        soundfile.write(raw, wave, RATE, format="WAV", subtype="FLOAT")
        held.append({"bytes": raw.getvalue(), "path": f"{number}.wav"})
    made = datasets.Dataset.from_dict({"audio": held, "sentence": SAID})
    return made.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())


def _parquet(tmp_path: Path) -> Path:
    _stored().to_parquet(tmp_path / "held.parquet")
    return tmp_path / "held.parquet"


def _addresses(tmp_path: Path) -> list[dict[str, str]]:
    raw = [base64.b64encode((tmp_path / "clips" / f"{number}.wav").read_bytes()).decode() for number in range(5)]
    return [{"audio": f"data:audio/wav;base64,{one}", "sentence": said} for one, said in zip(raw, SAID, strict=True)]


@pytest.mark.parametrize(
    "source",
    [
        _folder,
        lambda tmp_path: _stored(),
        lambda tmp_path: _stored().to_iterable_dataset(),
        _parquet,
        _addresses,
        lambda tmp_path: [
            {"audio": {"array": wave.tolist(), "sampling_rate": RATE, "path": None}, "sentence": said}
            for wave, said in zip(WAVES, SAID, strict=True)
        ],
        lambda tmp_path: [
            {"where": str(tmp_path / "clips" / f"{number}.wav"), "sentence": said} for number, said in enumerate(SAID)
        ],
    ],
    ids=["audiofolder", "dataset", "iterable", "parquet", "addresses", "arrays", "paths"],
)
def test_the_same_samples_whatever_they_are_stored_as(source, file, tmp_path):
    place = audio_base(tmp_path / "base", "whisper")
    expected = made(file, place, target="sentence")
    found = made(source(tmp_path), place, target="sentence")
    assert found.sha256["samples"] == expected.sha256["samples"]


def test_a_folder_and_a_list_of_recordings_alone(file, tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    expected = made(file, place)
    folder = made(tmp_path / "clips", place)
    arrays = made([{"array": wave, "sampling_rate": RATE} for wave in WAVES], place)
    assert folder.sha256["samples"] == arrays.sha256["samples"] == expected.sha256["samples"]
    assert set(folder.sha256) - set(arrays.sha256) == {"audio"}
    assert folder.first in [f"{number}.wav" for number in range(5)]
    # Pictures that lie beside, as of covers, are not what is meant.
    from PIL import Image

    for number in range(9):
        Image.new("RGB", (4, 4)).save(tmp_path / "clips" / f"{number}.png")
    assert made(tmp_path / "clips", place).sha256["samples"] == expected.sha256["samples"]


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_channels_are_averaged_and_rates_are_brought_to_the_models(rate, tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    wave = np.stack([noise(0.5, 1, rate), noise(0.5, 2, rate)], 1)
    (batch,) = made([{"audio": str(write_wave(tmp_path / "a.wav", wave, rate))}], place)
    expected = by_hand("ctc", [soxr.resample(wave.mean(1), rate, RATE)])
    assert batch["input_values"].shape == (1, 8000)
    torch.testing.assert_close(batch["input_values"], expected["input_values"], rtol=1e-4, atol=1e-5)


def test_packed_formats_are_decoded(tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    wave = noise(0.5, 3)
    for name in ("a.flac", "a.ogg", "a.mp3"):
        write_wave(tmp_path / name, wave)
        (batch,) = made([{"audio": str(tmp_path / name)}], place)
        decoded, rate = soundfile.read(tmp_path / name, dtype="float32")
        assert rate == RATE
        expected = by_hand("ctc", [decoded])["input_values"]
        # Decoders of mp3 round otherwise in parts than as a whole.
        torch.testing.assert_close(batch["input_values"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rate", [RATE, 22_050, 44_100])
def test_long_recordings_are_cut(side, rate, tmp_path, caplog):
    """At the model's own rate: a file of which only what is needed is read gives what all of it would."""
    place = audio_base(tmp_path / "base", "ctc")
    wave = noise(3.0, 4, rate)
    write_wave(tmp_path / "a.wav", wave, rate)
    kept = [str(tmp_path / "a.wav"), {"array": wave, "sampling_rate": np.int64(rate)}]
    whole = soxr.resample(wave, rate, RATE) if rate != RATE else wave
    part = whole[:16_000] if side == "right" else whole[-16_000:]
    expected = by_hand("ctc", [part])["input_values"]
    for one in kept:
        caplog.clear()
        (batch,) = made([{"audio": one}], place, max_seconds=1.0, truncation_side=side)
        torch.testing.assert_close(batch["input_values"], expected, rtol=1e-4, atol=1e-4)
        end = {"right": "end", "left": "beginning"}[side]
        assert f"row 1: longer than 1 s, as are 1 of the 1 samples' audio; cut at the {end}" in caplog.text
    with pytest.raises(ValueError, match=r"row 1: expected at most 1 s of audio, found more; give truncation: true"):
        made([{"audio": kept[0]}], place, max_seconds=1, truncation=False)
    caplog.clear()
    made([{"audio": kept[0]}], place, max_seconds=3)
    assert not caplog.messages


# Two seconds, and 64 frames of 25 ms each 10 ms.
@pytest.mark.parametrize(("name", "samples"), [("whisper", 32_000), ("ast", 400 + 63 * 160)])
def test_what_an_extractor_would_cut_by_itself_is_said(name, samples, tmp_path, caplog):
    place = audio_base(tmp_path / "base", name)
    for extra, said in ((0, False), (200, True)):
        caplog.clear()
        wave = noise(4.0, 5)[: samples + extra]
        (batch,) = made([{"audio": {"array": wave, "sampling_rate": RATE}}], place)
        assert ("cut at the end" in caplog.text) is said
        main = next(iter(batch))
        assert torch.equal(batch[main], by_hand(name, [wave])[main])
    with pytest.raises(ValueError, match="a larger max_seconds where the model takes more"):
        made([{"audio": {"array": noise(4.0), "sampling_rate": RATE}}], place, truncation=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("clips/9.wav", "row 1: clips/9.wav is missing; paths of audio files are relative"),
        ("https://a.org/a.wav", "https://a.org/a.wav is not here; download it"),
        (3, r"row 1: expected the path of an audio file, or \{array, sampling_rate\} .*found 3"),
        ("data:audio/wav;base64,?", "row 1: the audio in the row is not base64"),
        ({"bytes": b"nothing", "path": "a.wav"}, r"row 1: a.wav cannot be decoded by libsndfile: .*ffmpeg -i"),
        ({"array": [1, 2], "sampling_rate": RATE}, r"row 1: array: expected finite .*\[samples\], found int64 \[2\]"),
        ({"array": [[0.1], [0.2]], "sampling_rate": RATE}, r"array: expected finite .*found float64 \[2, 1\]"),
        ({"array": [0.1, float("nan")], "sampling_rate": RATE}, "array: expected finite samples"),
        ({"array": [0.1] * 900, "sampling_rate": 0}, "sampling_rate: expected samples of a second, found 0"),
        ({"array": [0.1] * 900, "sampling_rate": 800.5}, "sampling_rate: expected samples of a second, found 800.5"),
        ({"array": [0.1] * 900, "sampling_rate": True}, "sampling_rate: expected samples of a second, found True"),
        ({"array": [[0.1], []], "sampling_rate": RATE}, "row 1: array: expected samples as numpy has them, found list"),
        ({"array": torch.ones(900).bfloat16(), "sampling_rate": RATE}, "samples as numpy has them, found Tensor"),
        ({"array": [], "sampling_rate": RATE}, "row 1: the audio holds no sample"),
        ({"array": [0.1] * 20, "sampling_rate": RATE}, "row 1: expected at least 45 samples of audio, found 20"),
        (None, "row 1: holds no audio in column 'audio'"),
    ],
)
def test_audio_that_cannot_be_taken_is_refused(value, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        made([{"audio": value}], audio_base(tmp_path / "base", "ctc"))


def test_the_least_of_samples_makes_one_position(tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    (batch,) = made([{"audio": {"array": noise(1.0)[:45], "sampling_rate": RATE}}], place)
    assert model_of("ctc")(**batch).logits.shape[1] == 1


def test_a_file_of_no_sample_is_refused(tmp_path):
    write_wave(tmp_path / "a.wav", np.zeros(0, dtype=np.float32))
    with pytest.raises(ValueError, match="a.wav holds no sample"):
        made([{"audio": str(tmp_path / "a.wav")}], audio_base(tmp_path / "base", "ctc"))


def test_a_recording_of_which_several_are_made_is_refused(tmp_path, monkeypatch):
    place = audio_base(tmp_path / "base", "ctc")
    # As Cohere's extractor cuts what is longer than half a minute.
    pieces = {"input_values": torch.zeros(2, 800), "attention_mask": torch.ones(2, 800)}
    monkeypatch.setattr("nsc_merge.calibration.raw.inputs.audio.processed", lambda *given, **named: pieces)
    with pytest.raises(ValueError, match=r"row 1: the feature extractor makes 2 pieces of 0.1 s of audio"):
        made([{"audio": {"array": np.zeros(1600), "sampling_rate": RATE}}], place)


def test_silence_that_becomes_no_number_is_refused(tmp_path):
    place = audio_base(tmp_path / "base", "speech to text")
    with pytest.raises(ValueError, match="row 1: the feature extractor makes input_features of it that is not finite"):
        made([{"audio": {"array": np.zeros(8000), "sampling_rate": RATE}}], place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio": "sound"}, "audio: column 'sound' is not there"),
        ({"text": "sentence"}, "text: is named, and the base takes audio alone"),
        ({"image": "path"}, "image: 'path' is named, and the base takes no images"),
        ({"target": "sentence"}, "target: 'sentence' is named, and the base writes no text behind an encoder"),
        ({"max_seconds": 0}, "max_seconds: expected a finite number above 0"),
        ({"max_seconds": "long"}, "max_seconds: expected a finite number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, file, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(file, audio_base(tmp_path / "base", "ctc"), **settings)


def test_rows_without_audio_and_bases_that_take_none_are_told(file, tmp_path):
    place = audio_base(tmp_path / "base", "ctc")
    with pytest.raises(ValueError, match="no column of audio: question .*; write audio: NAME, or give a folder of"):
        made([{"question": "a"}], place)
    with pytest.raises(ValueError, match=r"several columns of audio, \['a', 'b'\]"):
        made([{"a": "x.wav", "b": "y.flac"}], place)
    with pytest.raises(ValueError, match="audio: 'path' is named, and the base takes no audio"):
        made(file, text_base(tmp_path / "text"), text="sentence", audio="path")


def test_a_base_without_its_extractor_is_told(file, tmp_path):
    tf.AutoConfig.for_model("wav2vec2", architectures=["Wav2Vec2ForCTC"]).save_pretrained(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="beside the base: .*base holds no processor"):
        made(file, tmp_path / "base")
    other = vision_base(tmp_path / "vision")
    with pytest.raises(ValueError, match="calibration.a: "):
        made(file, tmp_path / "base", processor=str(other))
    extractor = audio_base(tmp_path / "other", "ctc")
    assert len(made(file, tmp_path / "base", processor=str(extractor))) == 3


def test_packages_that_are_missing_are_named(file, tmp_path, monkeypatch):
    place = audio_base(tmp_path / "base", "ctc")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"\d.wav: reading it needs soundfile: pip install 'nsc-kernels\[data\]'"):
        made(file, place)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ValueError, match="row 1: reading it needs soxr"):
        made([{"audio": {"array": WAVES[0], "sampling_rate": 8000}}], place)


def test_a_merge_of_raw_speech_is_that_of_its_inputs(file, tmp_path):
    place = audio_base(tmp_path / "base", "whisper")
    model = model_of("whisper")
    folders = {
        task: write_adapter(model, tmp_path / task, n, r=2, target_modules=["q_proj", "v_proj"])
        for n, task in enumerate("ab")
    }
    raw = nsc_merge.calibration_data(file, place, batch_size=2, target="sentence")
    ready = [dict(batch) for batch in raw]
    found = [
        nsc_merge.merge(model, folders, {"a": data, "b": data}, "nsc", steps=2, progress=False) for data in (raw, ready)
    ]
    assert found[0].history[0]["omega"] == found[1].history[0]["omega"]
    for path in found[0].paths:
        assert torch.equal(found[0].delta(path), found[1].delta(path))

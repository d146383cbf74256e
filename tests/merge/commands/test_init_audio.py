"""A first recipe for models of audio, and what it merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from audio_cases import audio_base, model_of, noise, write_wave
from init_cases import ADAPTERS, write_lines, written

import nsc_merge
from nsc_merge.commands.main import main

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    found = {}
    for kind in ("whisper", "ctc"):
        folder = found[kind] = tmp_path_factory.mktemp(kind)
        model = model_of(kind)
        model.save_pretrained(folder / "base")
        audio_base(folder / "base", kind)
        for seed, task in enumerate(("one", "two"), 1):
            zoo.write_adapter(
                model, folder / "adapters" / task, seed, r=1 + seed, target_modules=["q_proj", "v_proj"]
            )
        for number in range(6):
            write_wave(folder / "clips" / f"{number}.wav", noise(0.2 + 0.05 * number, number))
        rows = [{"file_name": f"{number}.wav", "transcription": "ab c"[: 1 + number]} for number in range(6)]
        write_lines(folder / "clips" / "metadata.jsonl", rows)
        write_lines(folder / "said.jsonl", [{"path": f"clips/{n}.wav", "words": "a b"} for n in range(6)])
    return found


@pytest.fixture
def at(places, monkeypatch):
    def go(kind: str) -> None:
        monkeypatch.chdir(places[kind])
        Path("recipe.yaml").unlink(missing_ok=True)

    return go


def test_what_was_said_is_read_by_the_decoder(at, capsys):
    at("whisper")
    assert main(["init", *ADAPTERS, "--data", "clips"]) == 0
    said = capsys.readouterr().out
    assert "6 rows of file_name, transcription; audio in column 'file_name', for the decoder column 'tr" in said
    document = written()
    assert document["data"]["target"] == "transcription"
    assert document["data"]["max_seconds"] == 30.0
    assert document["data"]["max_length"] == 512
    assert "text" not in document["data"]
    assert main(["init", *ADAPTERS, "--data", "said.jsonl", "--text", "words", "--force"]) == 0
    assert written()["data"]["target"] == "words"
    assert main(["init", *ADAPTERS, "--data", "said.jsonl", "--force"]) == 0
    assert "target" not in written()["data"]


def test_audio_alone(at, capsys):
    at("ctc")
    assert main(["init", *ADAPTERS, "--data", "clips"]) == 0
    assert "6 rows of file_name, transcription; audio in column 'file_name'," in capsys.readouterr().out
    assert not {"target", "text", "max_length"} & set(written()["data"])
    (Path("clips") / "metadata.jsonl").rename("kept")
    try:
        assert main(["init", *ADAPTERS, "--data", "clips", "--force"]) == 0
    finally:
        Path("kept").rename(Path("clips") / "metadata.jsonl")
    assert "6 audio files" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["whisper", "ctc"])
def test_a_run_is_the_merge_of_the_same_batches(at, kind, tmp_path):
    at(kind)
    assert main(["init", *ADAPTERS, "--data", "clips"]) == 0
    run = ["run", "recipe.yaml", "batch_size=3", "options.steps=2", f"output.dir={tmp_path / 'merged'}"]
    assert main([*run, "--dry-run"]) == 0
    assert main(run) == 0
    base = type(model_of(kind)).from_pretrained("base")
    target = {"target": "transcription"} if kind == "whisper" else {}
    samples = written()["data"]["samples"]
    data = nsc_merge.calibration_data("clips", base, samples=samples, batch_size=3, **target)
    adapters = {task: f"adapters/{task}" for task in ("one", "two")}
    options = {**written()["options"], "steps": 2}
    wanted = nsc_merge.merge(base, adapters, dict.fromkeys(adapters, data), progress=False, **options)
    assert nsc_merge.load_result(tmp_path / "merged").coefficients == wanted.coefficients
    assert (tmp_path / "merged" / "model" / "preprocessor_config.json").is_file()

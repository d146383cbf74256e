"""Bases, adapters and raw data for first recipes, and what the command writes of them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
from safetensors.torch import save_file
from served_cases import WORDS, picture, write_adapters, write_base
from zoo import text

from nsc_merge.commands.main import main
from nsc_merge.recipes.schema import schema
from nsc_merge.utils.yaml_text import from_yaml

VALIDATOR = jsonschema.Draft202012Validator(schema())
HEADS = {"vit": {"modules_to_save": ["classifier"]}, "llama": {}, "llava": {}}
ADAPTERS = ("adapters/one", "adapters/two", "--base", "base")


def make_places(tmp_path_factory) -> dict[str, Path]:
    """Kind -> folder with a base, adapters and raw data of every form."""
    found = {}
    for kind, config in HEADS.items():
        place = found[kind] = tmp_path_factory.mktemp(kind)
        base = write_base(kind, place / "base")
        write_adapters(base, place / "adapters", kind, task_type="CAUSAL_LM" if kind == "llama" else None, **config)
    rows = [{"question": f"{WORDS[n]} {WORDS[n + 1]}", "answer": WORDS[2 * n]} for n in range(12)]
    write_lines(found["llama"] / "prompts.jsonl", rows)
    chats = found["llama"] / "chats"
    chats.mkdir()
    for task in ("one", "two"):
        said = [{"role": "user", "content": f"{WORDS[3]} {task}"}, {"role": "assistant", "content": WORDS[4]}]
        write_lines(chats / f"{task}.jsonl", [{"messages": said}] * 3)
    inputs = found["llama"] / "inputs"
    inputs.mkdir()
    for task in ("one", "two"):
        save_file(text(1), inputs / f"{task}.safetensors")
    for folder in (found["vit"] / "photos", found["llava"] / "images"):
        folder.mkdir()
        for number in range(6):
            picture(number).save(folder / f"{number}.png")
    pairs = [{"image": f"images/{number}.png", "prompt": f"{WORDS[number]} {WORDS[7]}"} for number in range(6)]
    write_lines(found["llava"] / "pairs.jsonl", pairs)
    labels = {"id2label": {"0": "cat", "1": "dog"}}
    (found["vit"] / "adapters" / "one" / "config.json").write_text(json.dumps(labels))
    return found


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def go(places: dict[str, Path], monkeypatch, kind: str) -> Path:
    """Go to the folder of a kind, in which there is no recipe yet."""
    monkeypatch.chdir(places[kind])
    for file in ("recipe.yaml", "recipe.schema.json"):
        Path(file).unlink(missing_ok=True)
    return places[kind]


def written(file: str = "recipe.yaml") -> dict:
    """The recipe that lies there, which the schema takes."""
    document = from_yaml(Path(file).read_text(encoding="utf-8"))
    assert [error.message for error in VALIDATOR.iter_errors(json.loads(json.dumps(document)))] == []
    return document


def refused(capsys, *arguments: str) -> str:
    """What an init says that writes nothing."""
    assert main(["init", *arguments]) != 0
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    assert not Path("recipe.yaml").exists()
    return found.err


def summary_of(capsys, *arguments: str) -> str:
    assert main(["init", *ADAPTERS, *arguments, "--force", "--json"]) == 0
    return capsys.readouterr().out

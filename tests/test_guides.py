"""Guides, notebooks and example scripts are carried out as they stand.

What a guide ends with is the base plus the update that the adapters' own files say.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import nsc_merge
from guide_player import ROOT, Block, agrees, blocks, play, rewritten

GUIDES = ROOT / "docs" / "guides"
EXAMPLES = ROOT / "examples"
KINDS = ("text", "vision", "vlm")

pytestmark = pytest.mark.skipif(not GUIDES.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Kind of a guide -> the folder in which it was carried out, and its blocks."""
    done: dict[str, tuple[Path, list[Block]]] = {}

    def once(kind: str) -> tuple[Path, list[Block]]:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            done[kind] = folder / "small", play(GUIDES / f"{kind}.md", folder)
        return done[kind]

    return once


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_prints_what_it_says(kind, played):
    said = [block for block in played(kind)[1] if block.expected is not None]
    assert len(said) >= 6
    for block in said:
        assert agrees(block.expected, block.printed), f"{block.code}\nprints\n{block.printed}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_to_a_served_folder_is_three_commands(kind):
    page = (GUIDES / f"{kind}.md").read_text(encoding="utf-8")
    way = page[page.index("## Three commands") : page.index("## Serving it")]
    told = [(what, code) for what, code, _ in blocks(way)]
    assert [what for what, _ in told] == ["sh"] * 3
    assert [shlex.split(code)[:2] for _, code in told] == [["nsc-merge", "init"], *[["nsc-merge", "run"]] * 2]
    assert len(page.splitlines()) < 200


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_an_account_or_a_server_is_a_command(kind, played):
    from nsc_merge.commands.main import build_parser

    page = (GUIDES / f"{kind}.md").read_text(encoding="utf-8")
    lines = [line for what, code, _ in blocks(page) if what == "console" for line in code.splitlines()]
    pushed = [build_parser().parse_args(shlex.split(line)[1:]) for line in lines if line.startswith("nsc-merge ")]
    assert [one.push_to_hub for one in pushed] == ["OWNER/NAME"]
    served = [line for line in lines if line.startswith("vllm serve")]
    ranks = {rank for line in served for rank in re.findall(r"--max-lora-rank (\d+)", line)}
    run = next(block.printed for block in played(kind)[1] if block.code.startswith("nsc-merge run recipe.yaml opt"))
    assert ranks == set(re.findall(r"--max-lora-rank (\d+)", run))
    assert len(served) == (0 if kind == "vision" else 2)


def updated(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's weights plus what coefficients and the adapters' own files say, in float64."""
    coefficients = json.loads((folder / "merged" / "coefficients.json").read_text())["coefficients"]
    weights = {path: value.double() for path, value in weights.items()}
    for task in sorted(entry.name for entry in (folder / "adapters").iterdir()):
        factors = load_file(folder / "adapters" / task / "adapter_model.safetensors")
        config = json.loads((folder / "adapters" / task / "adapter_config.json").read_text())
        for key, a in factors.items():
            if key.endswith("lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                scale = coefficients[path][task] * config["lora_alpha"] / config["r"]
                b = factors[key.replace("lora_A", "lora_B")]
                weights[f"{path}.weight"] += scale * b.double() @ a.double()
    return weights


def assert_served(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """The pipeline's model is this to float32's precision."""
    held = model.state_dict()
    assert held.keys() == expected.keys()
    for path, value in expected.items():
        torch.testing.assert_close(held[path].double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")


def test_text_from_prompts_to_a_pipeline(played):
    folder, _ = played("text")
    ask = pipeline("text-generation", model=str(folder / "merged" / "model"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    expected = updated(folder, base.state_dict())
    assert_served(ask.model, expected)
    by_hand = AutoModelForCausalLM.from_pretrained(folder / "base")
    by_hand.load_state_dict(expected)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    questions = [json.loads(line)["question"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    answers = {"served": [], "by hand": [], "base": []}
    for question in questions[::4]:
        answers["served"].append(ask(f"{question}\n", return_full_text=False)[0]["generated_text"])
        tokens = tokenizer(f"{question}\n", return_tensors="pt", return_token_type_ids=False)
        for name, model in (("by hand", by_hand), ("base", base)):
            said = model.generate(**tokens)[0, tokens["input_ids"].shape[1] :]
            answers[name].append(tokenizer.decode(said, skip_special_tokens=True))
    assert answers["served"] == answers["by hand"]
    assert answers["served"] != answers["base"]


def test_vision_from_photos_to_a_pipeline(played):
    folder, _ = played("vision")
    photos = [str(file) for file in sorted((folder / "photos").iterdir())[:8]]
    processor = AutoImageProcessor.from_pretrained(folder / "base")
    pixels = processor([Image.open(photo) for photo in photos], return_tensors="pt")["pixel_values"]
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    trunk = updated(folder, base.state_dict())
    for task, place in (("colour", "merged/model"), ("size", "for-size")):
        head = load_file(folder / "adapters" / task / "adapter_model.safetensors")
        head = {key.removeprefix("base_model.model."): value for key, value in head.items() if ".classifier." in key}
        names = json.loads((folder / "adapters" / task / "config.json").read_text())["id2label"]
        classify = pipeline("image-classification", model=str(folder / place))
        assert_served(classify.model, {**trunk, **{path: value.double() for path, value in head.items()}})
        by_hand = AutoModelForImageClassification.from_config(classify.model.config)
        by_hand.load_state_dict({**trunk, **head})
        scores = by_hand.eval()(pixels).logits.softmax(-1).tolist()
        for found, row in zip(classify(photos, top_k=len(names)), scores, strict=True):
            expected = {names[str(number)]: score for number, score in enumerate(row)}
            assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, abs=1e-5)


def test_images_and_prompts_to_a_pipeline(played):
    folder, _ = played("vlm")
    look = pipeline("image-text-to-text", model=str(folder / "merged" / "model"))
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    expected = updated(folder, base.state_dict())
    assert_served(look.model, expected)
    by_hand = AutoModelForImageTextToText.from_pretrained(folder / "base")
    by_hand.load_state_dict(expected)
    processor = AutoProcessor.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()[:16]]
    images, prompts = [str(folder / row["image"]) for row in rows], [row["prompt"] for row in rows]
    served = [one["generated_text"] for one in look(images=images, text=prompts, return_full_text=False)]
    inputs = processor(images=[Image.open(image) for image in images], text=prompts, return_tensors="pt", padding=True)
    answers = []
    for model in (by_hand, base):
        said = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers.append(processor.batch_decode(said, skip_special_tokens=True))
    assert served == answers[0]
    assert served != answers[1]


@pytest.mark.parametrize(("name", "kind"), [("text", "text"), ("images", "vision")])
def test_a_notebook_runs(name, kind, played, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    folder, _ = played(kind)
    import small_inputs

    # What it would write again is there.
    made = {place.name for place in folder.iterdir()} & {"base", "adapters", "chats", "prompts.jsonl", "photos"}
    ignored = shutil.ignore_patterns(*{place.name for place in folder.iterdir()} - made)
    again = partial(shutil.copytree, folder, ignore=ignored, dirs_exist_ok=True)
    monkeypatch.setattr(small_inputs, kind, again)
    notebook = json.loads((EXAMPLES / "notebooks" / f"merge_{name}.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"merge_{name}", "exec"), names)
            said = "".join(text for one in cell["outputs"] if one.get("name") == "stdout" for text in one["text"])
            printed.append((said, capsys.readouterr().out))
            images = [one["data"]["image/png"] for one in cell["outputs"] if "image/png" in one.get("data", {})]
            assert all(len(image) < 80_000 for image in images)  # base64: of 60 KB
    assert len(printed) == len([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    for said, found in printed:
        # Shares of a few dozen pictures change with the processor that the adapters are trained on.
        assert agrees(re.sub(r"\d+%", "...", said), found), f"{said}\nis now\n{found}"


@pytest.mark.parametrize(
    ("name", "kind", "data", "modules"),
    [
        ("llama", "text", {"french": "chats/french.jsonl", "opposite": "chats/opposite.jsonl"}, 12),
        ("vit", "vision", {"size": "photos", "colour": "photos"}, 20),
        ("llava", "vlm", {"size": "pairs.jsonl", "colour": "pairs.jsonl"}, 12),
    ],
)
def test_an_example_script_merges(name, kind, data, modules, played, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(played(kind)[0])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script
    adapters = [f"{task}=adapters/{task}" for task in data]
    given = ["base", *adapters, "--data", *[f"{task}={source}" for task, source in data.items()]]
    monkeypatch.setattr(sys, "argv", [name, *given, "--steps", "10", "--out", str(tmp_path / "merged")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    before, after = map(float, capsys.readouterr().out.split("\n")[0].split("ratio ")[1].split(" -> "))
    assert after < before
    merged = nsc_merge.load_adapter(tmp_path / "merged", "merged")
    assert len(merged.factors) == modules
    assert {factor.rank for factor in merged.factors.values()} == {16}


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("ratio 0.8917\n", "ratio 0.9012\n", True),
        ("ratio 0.8917\n", "ratio 0.7017\n", False),
        ("ratio 0.8917\n", "rate 0.8917\n", False),
        ("hash 8226b0d1\n", "hash 8226b0d2\n", False),
        ("100 steps of 0.03 s: 3.0 s\n", "100 steps of 1.2 s: 2e+02 s\n", True),
        ("100 steps of 0.03 s\n", "50 steps of 0.03 s\n", False),
        ("weights 887 KB\n", "weights 1.2 MB\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("a, ..., d\n", "a, b, c, d\n", True),
        ("a\n", "a\nb\n", False),
    ],
)
def test_what_counts_as_the_same_output(expected, printed, same):
    assert agrees(expected, printed) is same


def test_pages_are_brought_up_to_date():
    page = "```sh\none\n```\n```text\nold\n```\n```sh\ntwo\n```\n```text\nkept ...\n```\n"
    played = [Block("one\n", "old\n", "new\n"), Block("two\n", "kept ...\n", "other\n")]
    assert rewritten(page, played) == page.replace("old", "new")

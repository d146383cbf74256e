"""What a run and an export put into their folders, and what they hand to the hub."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from cli_cases import contents, make_place
from packed_linear import packed, unpacked
from safetensors.torch import load_file
from zoo import build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main

SHORT = ["method=task_arithmetic", "options={scale: 0.5}", "output.formats=model"]
LABELS = "labels={nli: [yes it is, 'no', perhaps], topic: topics.txt}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))
    (place / "topics.txt").write_text("sports\nlaw\nfood\n")
    return place


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def pushed(monkeypatch):
    """What was handed over instead of being uploaded, with the files that lay there."""
    calls = []

    def push(folder, repo, *, private=False):
        calls.append((folder, repo, private, sorted(contents(folder))))
        return f"https://hub/{repo}"

    monkeypatch.setattr("nsc_merge.results.hub.push", push)
    return calls


def labels(folder):
    config = json.loads((folder / "config.json").read_text())
    return [config["id2label"][str(number)] for number in range(len(config["id2label"]))]


def test_a_head_with_its_labels_is_put_in_by_a_run_and_another_by_an_export(place, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["run", "recipe.yaml", *SHORT, LABELS, "output.head=nli", f"output.dir={out}"]) == 0
    assert labels(out / "model") == ["yes it is", "no", "perhaps"]
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["labels"] == {"nli": ["yes it is", "no", "perhaps"], "topic": ["sports", "law", "food"]}
    assert written["output"]["head"] == "nli"
    export = ["export", str(out), "--format", "model", "--out"]
    assert main([*export, str(tmp_path / "topic"), "--head", "topic"]) == 0
    assert labels(tmp_path / "topic") == ["sports", "law", "food"]
    assert main([*export, str(tmp_path / "none"), "--head", "german"]) == 1
    assert "head: expected a task that brought a head, of ['nli', 'topic'], found 'german'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels={nli: [a, b]}", "labels['nli']: expected 3 names, one per output of its head, found 2"),
        ("output={head: nli, formats: [lora], rank: 0}", "output.rank: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(place, tmp_path, monkeypatch, capsys, override, message):
    monkeypatch.setattr("nsc_merge.recipes.run.merge", lambda *_, **__: pytest.fail("the merge began"))
    assert main(["run", "recipe.yaml", *SHORT, override, f"output.dir={tmp_path / 'merged'}"]) != 0
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_uploads_what_it_wrote_where_it_is_told_to(place, tmp_path, pushed, capsys):
    out = tmp_path / "merged"
    command = ["run", "recipe.yaml", *SHORT, f"output.dir={out}"]
    assert main(command) == 0
    assert pushed == []
    assert f"next: nsc-merge export {out} --push-to-hub OWNER/NAME" in capsys.readouterr().out.splitlines()
    assert main([*command, "--push-to-hub", "me/merged", "--private"]) == 0
    ((folder, repo, private, files),) = pushed
    assert (folder, repo, private) == (out, "me/merged", True)
    assert {"README.md", "model/model.safetensors", "recipe.yaml"} <= set(files)
    shown = capsys.readouterr().out
    assert "uploaded to https://hub/me/merged" in shown.splitlines()
    assert "--push-to-hub" not in shown
    # Once more, whoever runs the recipe beside the merge uploads nothing.
    assert "push_to_hub" not in yaml.safe_load((out / "recipe.yaml").read_text())["output"]


def test_an_upload_that_fails_leaves_the_merge_and_says_how_to_go_on(place, tmp_path, monkeypatch, capsys):
    def push(*_, **__):
        raise OSError("push_to_hub: the hub refused me/merged (403)")

    monkeypatch.setattr("nsc_merge.results.hub.push", push)
    out = tmp_path / "merged"
    command = ["run", "recipe.yaml", *SHORT, f"output.dir={out}", "output.push_to_hub=me/merged"]
    assert main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the hub refused me/merged (403); the merge is in" in line
    assert line.endswith(f"nsc-merge export {out} --push-to-hub me/merged uploads it")
    assert (out / "model" / "model.safetensors").is_file()


def test_an_export_uploads_what_it_writes_or_the_merge_as_it_is(place, tmp_path, pushed):
    out = tmp_path / "merged"
    assert main(["run", "recipe.yaml", *SHORT, f"output.dir={out}"]) == 0
    assert main(["export", str(out), "--push-to-hub", "me/whole"]) == 0
    lora = ["export", str(out), "--format", "lora", "--out", str(tmp_path / "lora")]
    assert main([*lora, "--push-to-hub", "me/lora", "--private"]) == 0
    assert [call[:3] for call in pushed] == [(out, "me/whole", False), (tmp_path / "lora", "me/lora", True)]
    assert "adapter_model.safetensors" in pushed[1][3]


def test_a_merge_of_a_quantised_base_is_exported_as_a_model_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    model, plain = packed(build("llama")), unpacked(packed(build("llama")))
    model.is_quantized = True
    source = write_adapter(plain, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    found, wanted = (nsc_merge.merge(one, {"a": source}, method="task_arithmetic", scale=0.5) for one in (model, plain))
    monkeypatch.setattr("nsc_merge.recipes.saved_result.load_result", lambda *_, **__: found)
    export = ["export", str(tmp_path), "--format", "model", "--out", str(tmp_path / "out")]
    assert main(export) == 1
    assert "use format 'lora', or dequantize=True (--dequantize), which writes" in capsys.readouterr().err
    assert main([*export, "--dequantize"]) == 0
    wanted.save(tmp_path / "wanted", "model")
    mine, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--format, --out: expected both, to write the merge in a format, or neither, to upload it"),
        (["--format", "lora"], "--format, --out: expected both"),
        (["--out", "x", "--push-to-hub", "me/x"], "--format, --out: expected both"),
        (["--push-to-hub", "merged"], "--push-to-hub: expected owner/name, found 'merged'"),
        (["--format", "lora", "--out", "x", "--private"], "--private: expected --push-to-hub owner/name"),
        (["--format", "lora", "--out", "x", "--dequantize"], "--dequantize: only --format model"),
        (["--format", "lora", "--out", "x", "--max-shard-size", "5GB"], "--max-shard-size: only --format model"),
        (["--format", "coefficients", "--out", "x", "--head", "nli"], "--head: only --format lora and --format model"),
    ],
)
def test_arguments_of_an_export_that_do_not_go_together(place, capsys, arguments, message):
    assert main(["export", "merged", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["export", "merged"], ["run", "recipe.yaml", *SHORT]])
def test_whoever_cannot_upload_is_told_before_the_work(place, monkeypatch, capsys, command):
    upload = [*command, "--push-to-hub", "me/merged"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(upload) == 2
    assert "expected a token that may write, found none: set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(upload) == 2
    assert "HF_HUB_OFFLINE forbids to ask the hub" in capsys.readouterr().err
    assert not (place / "merged").exists()

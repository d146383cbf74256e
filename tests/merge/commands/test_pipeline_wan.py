"""``nsc-merge pipeline``: adapters of pipelines with two transformers, in the files that people have them in."""

import json

import pytest
import torch
from hub_cases import Hub, serving
from pipeline_cases import stable_diffusion, tokenizer, wan, write_adapters
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from nsc_merge.commands.main import main
from nsc_merge.commands.pipeline.given import Given, given_of
from nsc_merge.utils.errors import UsageError

FILE = "pytorch_lora_weights.safetensors"
SECOND = "transformer_2"
PATH = "transformer.blocks.1.attn1.to_v.lora_{}.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline, one with each adapter of it, and one with both files of an adapter side by side."""
    root = tmp_path_factory.mktemp("wan")
    pipe = wan()
    write_adapters(pipe, root, "ink", "toy")
    text = UMT5EncoderModel(UMT5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    pipe.register_modules(tokenizer=tokenizer(), text_encoder=text)
    pipe.save_pretrained(root / "base")
    (root / "noises").mkdir()
    for level, folder in (("high", root / "ink"), ("low", root / "ink" / SECOND)):
        (root / "noises" / f"{level}.safetensors").write_bytes((folder / FILE).read_bytes())
    return root


def update(file):
    """Of one module, by a file in which it has a scaling of 1."""
    state = load_file(file)
    return state[PATH.format("B")] @ state[PATH.format("A")]


def test_two_files_are_one_adapter_each_with_its_weight(place, tmp_path, capsys):
    high, low = (place / "noises" / f"{level}.safetensors" for level in ("high", "low"))
    given = [f"ink={high}:0.5", f"ink.{SECOND}={low}:0.25", f"toy.{SECOND}={place / 'toy' / SECOND}:-2"]
    out = tmp_path / "out"
    assert main(["pipeline", str(place / "base"), *given, "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "transformer: 10 modules, weights and mean coefficients ink 0.5 x 1.000\n" in said
    assert "transformer_2: 10 modules, weights and mean coefficients ink 0.25 x 1.000, toy -2 x 1.000\n" in said
    # Scalings of ink 4 / 2, of toy 4 / 3.
    torch.testing.assert_close(update(out / FILE), 0.5 * 2 * update(high))
    wanted = 0.25 * 2 * update(low) - 2 * 4 / 3 * update(place / "toy" / SECOND / FILE)
    torch.testing.assert_close(update(out / SECOND / FILE), wanted)
    document = json.loads((out / "merge.json").read_text())["adapters"]
    assert (document["ink"]["source"], document["ink"]["weight"]) == (str(high), 0.5)
    assert (document["ink"][SECOND]["source"], document["ink"][SECOND]["weight"]) == (str(low), 0.25)
    assert list(document["ink"][SECOND]["sha256"]) == ["low.safetensors"]
    assert list(document["toy"]) == [SECOND]
    card = (out / "README.md").read_text()
    assert "| ink | `high.safetensors` | 0.5 |\n| ink, transformer_2 | `low.safetensors` | 0.25 |\n" in card
    assert "| toy | " not in card


def test_a_folder_for_the_second_transformer_is_found_on_the_hub(place, tmp_path, capsys, monkeypatch):
    with serving(Hub(), tmp_path / "cache") as hub:
        # What diffusers looks for files with.
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
        hub.upload("me/ink", place / "ink")
        hub.upload("me/first", place / "noises")
        out = tmp_path / "out"
        given = ["ink=me/ink:0.5", "first=me/first/high.safetensors"]
        assert main(["pipeline", str(place / "base"), *given, "--out", str(out), "--device", "cpu"]) == 0
        assert "first: holds nothing of transformer_2" in capsys.readouterr().err
        torch.testing.assert_close(update(out / SECOND / FILE), 0.5 * 2 * update(place / "ink" / SECOND / FILE))
        assert main(["pipeline", str(place / "base"), "ink=me/none", "--out", str(out), "--device", "cpu"]) == 1
    assert f"nsc-merge: error: ink: there is no me/none at {hub.endpoint}, or it is private" in capsys.readouterr().err


def test_a_second_transformer_that_is_not_there_is_told(place, tmp_path, capsys):
    pipe = stable_diffusion()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "base")
    given = ["pipeline", str(tmp_path / "base"), f"ink.{SECOND}={place / 'noises' / 'low.safetensors'}"]
    assert main([*given, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "low.safetensors: expected a pipeline with two, found StableDiffusionPipeline" in capsys.readouterr().err


def test_names_of_adapters_and_of_their_parts():
    assert given_of(["a=x:0.5", f"a.{SECOND}=y"]) == [Given("a", "x", 0.5, "y", 0.5)]
    assert given_of([f"a.{SECOND}=y:2", "b=z"]) == [Given("a", None, 2.0, "y", 2.0), Given("b", "z", 1.0)]
    assert given_of(["a=x", f"a.{SECOND}=y:0.5"])[0].weights == {"transformer": 1.0, SECOND: 0.5}
    for texts, message in (
        (["a.b=x"], "NAME: expected a name without dots, or NAME.transformer_2, found 'a.b'"),
        ([f".{SECOND}=x"], "NAME: expected a name without dots, or NAME.transformer_2, found '.transformer_2'"),
        ([f"merged.{SECOND}=x"], "NAME: expected different names other than 'merged'"),
        ([f"a.{SECOND}=x", f"a.{SECOND}=y"], "NAME: expected different names other than 'merged'"),
    ):
        with pytest.raises(UsageError, match=message.replace(".", r"\.")):
            given_of(texts)

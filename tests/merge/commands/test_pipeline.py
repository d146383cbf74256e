"""``nsc-merge pipeline``: adapters of a saved pipeline merged at a terminal."""

import json
import shutil

import pytest
import torch
from PIL import Image
from pipeline_cases import FEW, diffusers, stable_diffusion, tokenizer, wan, write_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from nsc_merge.commands.main import main
from nsc_merge.commands.pipeline.given import given_of, on_hub
from nsc_merge.integrations.diffusers import save

QUICK = ["--size", "16", "--steps", "2", "--device", "cpu"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline, and one with each adapter of it."""
    root = tmp_path_factory.mktemp("pipelines")
    pipe = stable_diffusion()
    write_adapters(pipe, root, "ink", "toy")
    pipe.save_pretrained(root / "base")
    (root / "prompts.yaml").write_text("ink: [ink tower, ink boat]\ntoy: [{prompt: toy tower, guidance_scale: 3}]\n")
    return root


def drawn(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("ink boat", **FEW, output_type="latent", generator=generator).images


def test_the_sum_by_weights_is_what_diffusers_draws_with_them(place, tmp_path, capsys):
    out = tmp_path / "out"
    given = [f"ink={place / 'ink'}:0.7", f"toy={place / 'toy' / FILE}:-0.25"]
    assert main(["pipeline", str(place / "base"), *given, "--out", str(out), "--images", "ink boat", *QUICK]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "images.png", "merge.json", FILE]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "base")
    pipe.set_progress_bar_config(disable=True)
    for name in ("ink", "toy"):
        pipe.load_lora_weights(place / name, adapter_name=name)
    pipe.set_adapters(["ink", "toy"], [0.7, -0.25])
    wanted = drawn(pipe)
    pipe.load_lora_weights(out, adapter_name="both")
    pipe.set_adapters("both")
    # Of latents, which guidance and the steps take rounding further in.
    assert float((drawn(pipe) - wanted).norm() / wanted.norm()) < 1e-5
    pipe.set_adapters(["ink", "toy"], [0.7, -0.24])
    assert float((drawn(pipe) - wanted).norm() / wanted.norm()) > 1e-4
    said = capsys.readouterr().out
    assert "unet: 20 modules, weights and mean coefficients ink 0.7 x 1.000, toy -0.25 x 1.000" in said
    document = json.loads((out / "merge.json").read_text())
    assert document["adapters"]["toy"]["weight"] == -0.25
    assert list(document["adapters"]["ink"]["sha256"]) == [FILE]
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "| toy | `pytorch_lora_weights.safetensors` | -0.25 |" in card
    assert str(place) not in card
    with safe_open(out / FILE, "pt") as file:
        assert str(place) not in json.dumps(file.metadata())


def test_data_are_recorded_where_a_method_needs_them(place, tmp_path, capsys):
    out = tmp_path / "out"
    given = [f"{name}={place / name}" for name in ("ink", "toy")]
    prompts = ["--prompts", str(place / "prompts.yaml"), "--calls", "2"]
    common = ["pipeline", str(place / "base"), *given, "--out", str(out), *QUICK]
    images = ["--images", "ink boat", "toy tower"]
    assert main([*common, *prompts, "--method", "nsc", "--option", "steps=2", *images, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "merge.json").read_text())
    assert document["options"] == {"steps": 2}
    assert document["prompts"]["toy"] == [{"prompt": "toy tower", "guidance_scale": 3}]
    assert set(document["components"]) == {"unet", "text_encoder"}
    values = document["components"]["unet"]["coefficients"]
    assert {tuple(one) for one in values.values()} == {("ink", "toy")}
    assert len({one["ink"] for one in values.values()}) > 1
    # Over it another, of which there are no pictures.
    assert main([*common, "--method", "ties", "--rank", "3"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "merge.json", FILE]
    assert max(value.shape[0] for key, value in load_file(out / FILE).items() if "lora_A" in key) == 3
    assert "truncated by at most 0." in capsys.readouterr().out


def test_adapters_of_a_second_transformer_are_merged_with_those_of_the_first(tmp_path, capsys):
    pipe = wan()
    for name in ("ink", "toy"):
        save(pipe, name, tmp_path / name)
    (tmp_path / "toy" / "transformer_2" / FILE).unlink()
    (tmp_path / "toy" / "transformer_2").rmdir()
    pipe.unload_lora_weights()
    text = UMT5EncoderModel(UMT5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    pipe.register_modules(tokenizer=tokenizer(), text_encoder=text)
    pipe.save_pretrained(tmp_path / "base")
    out, given = tmp_path / "out", [f"{name}={tmp_path / name}:0.5" for name in ("ink", "toy")]
    assert main(["pipeline", str(tmp_path / "base"), *given, "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "toy: holds nothing of transformer_2; it is read from a folder transformer_2 in that" in said.err
    assert "transformer_2: 10 modules, weights and mean coefficients ink 0.5 x 1.000\n" in said.out
    found = load_file(out / "transformer_2" / FILE)
    wanted = load_file(tmp_path / "ink" / "transformer_2" / FILE)
    path = "transformer.blocks.1.attn1.to_v.lora_{}.weight"
    delta, own = (one[path.format("B")] @ one[path.format("A")] for one in (found, wanted))
    torch.testing.assert_close(delta, 0.5 * 2 * own)
    document = json.loads((out / "merge.json").read_text())
    assert set(document["adapters"]["ink"]["sha256"]) == {FILE, f"transformer_2/{FILE}"}


def test_a_folder_of_peft_is_of_the_model_that_denoises(place, tmp_path, capsys):
    pipe, out = stable_diffusion(), tmp_path / "out"
    pipe.unet.peft_config["ink"].save_pretrained(tmp_path / "ink")
    held = {key: value for key, value in load_file(place / "ink" / FILE).items() if key.startswith("unet.")}
    named = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in held.items()}
    save_file(named, tmp_path / "ink" / "adapter_model.safetensors")
    common = ["--out", str(out), *QUICK]
    assert main(["pipeline", str(place / "base"), f"ink={tmp_path / 'ink'}", *common]) == 0
    assert "unet: 20 modules, weights and mean coefficients ink 1 x 1.000\n" in capsys.readouterr().out
    found = load_file(out / FILE)
    path = next(key.removesuffix(".lora_A.weight") for key in held if key.endswith("attn1.to_v.lora_A.weight"))
    delta, own = (one[f"{path}.lora_B.weight"] @ one[f"{path}.lora_A.weight"] for one in (found, held))
    torch.testing.assert_close(delta, 2 * own)


def test_what_the_pipeline_has_no_model_for_is_told(place, tmp_path, capsys):
    held = {**load_file(place / "ink" / FILE), "text_encoder_2.x.lora_A.weight": torch.ones(1, 2)}
    save_file(held, tmp_path / "more.safetensors")
    given = [str(place / "base"), f"ink={tmp_path / 'more.safetensors'}"]
    assert main(["pipeline", *given, "--out", str(tmp_path / "out"), *QUICK]) == 0
    assert "ink: 1 tensors of text_encoder_2 are left out, as the pipeline has no such model" in capsys.readouterr().err


def test_a_merge_is_written_if_its_pictures_fail(place, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["pipeline", str(place / "base"), f"ink={place / 'ink'}", "--out", str(out), "--images", "x"]
    assert main([*common, "--size", "17", "--device", "cpu"]) == 1
    assert f"--images: the merge is written to {out}, without pictures: `height` and" in capsys.readouterr().err
    assert (out / FILE).is_file()


def test_pictures_among_the_arguments_of_a_prompt_are_opened(place, tmp_path, capsys):
    """Of a pipeline that begins with one."""
    text = diffusers.StableDiffusionPipeline.from_pretrained(place / "base")
    parts = {name: part for name, part in text.components.items() if name != "image_encoder"}
    diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "start.png")
    entry = {"prompt": "ink boat", "image": "start.png", "strength": 1.0}
    (tmp_path / "prompts.yaml").write_text(json.dumps({"ink": [entry], "toy": [entry]}))
    given = [f"{name}={place / name}" for name in ("ink", "toy")]
    arguments = ["pipeline", str(tmp_path / "base"), *given, "--out", str(tmp_path / "out"), "--device", "cpu"]
    data = ["--method", "regmean", "--prompts", str(tmp_path / "prompts.yaml"), "--steps", "2"]
    assert main([*arguments, *data]) == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["prompts"]["ink"] == [entry]
    capsys.readouterr()
    (tmp_path / "start.png").write_text("no picture")
    assert main([*arguments, *data]) == 1
    assert f"prompts['ink']: image: {tmp_path / 'start.png'} cannot be opened as an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "repo", "options"),
    [
        ("owner/name", "owner/name", {}),
        ("owner/name@v1", "owner/name", {"revision": "v1"}),
        ("owner/name/ink.safetensors", "owner/name", {"weight_name": "ink.safetensors"}),
        (
            "owner/name/a/b/ink.safetensors@refs/pr/1",
            "owner/name",
            {"weight_name": "ink.safetensors", "subfolder": "a/b", "revision": "refs/pr/1"},
        ),
    ],
)
def test_places_on_the_hub(place, repo, options):
    found = on_hub(place)
    assert (found.repo, found.options) == (repo, options)
    assert given_of([f"ink={place}:0.5"])[0].place == place


@pytest.mark.parametrize(
    "place", ["ink", "owner/ink.safetensors", "owner/name/folder", "here/name/ink.safetensors", "here/name", "/a/b"]
)
def test_places_on_disk_or_mistyped_ones_never_reach_the_network(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert on_hub(place) is None


def test_bad_input_is_refused_in_one_line_before_anything_is_written(place, tmp_path, capsys):
    out, base, ink = tmp_path / "out", str(place / "base"), f"ink={place / 'ink'}"
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 2)}, tmp_path / "else.safetensors")
    save_file({"lora_te_x.lora_down.weight": torch.ones(1, 2)}, tmp_path / "kohya.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "typo.yaml").write_text("ink: [{prompt: a tower, guidence_scale: 5}]\n")
    (tmp_path / "wrong.yaml").write_text("ink: [a]\n")
    (tmp_path / "text.yaml").write_text("ink: a tower\n")
    for status, arguments, message in (
        (2, [base, "ink"], "NAME=PATH:WEIGHT: expected an adapter such as ink=ink.safetensors:0.7, found 'ink'"),
        (2, [base, ink, ink], "NAME: expected different names other than 'merged', found ['ink', 'ink']"),
        (2, [base, "merged=x"], "NAME: expected different names other than 'merged', found ['merged']"),
        (2, [base, ink, "--option", "steps"], "--option: expected KEY=VALUE, found 'steps'"),
        (2, [base, ink, "--method", "nsc"], "--prompts: method 'nsc' needs data; expected a file with prompts of"),
        (2, [base, ink, "--prompts", str(tmp_path / "wrong.yaml")], "--prompts: method 'task_arithmetic' needs no"),
        (1, [base, ink, "--method", "mean"], "method: expected one of"),
        (1, [base, ink, "--option", "steps=3"], "steps"),
        (
            1,
            [base, ink, f"toy={place / 'toy'}", "--method", "nsc", "--prompts", str(tmp_path / "wrong.yaml")],
            "wrong.yaml: expected prompts for each of ['ink', 'toy'], found ['ink']",
        ),
        (1, [base, ink, "--method", "nsc", "--prompts", str(tmp_path / "text.yaml")], "prompts['ink']: expected a"),
        (1, [base, ink, "--method", "nsc", "--prompts", "none.yaml"], "--prompts: expected a file with prompts of"),
        (1, ["owner/name/x.safetensors", ink], "BASE: expected a folder with a pipeline (model_index.json), or a hub"),
        (1, [str(tmp_path), ink], "BASE: expected a folder with a pipeline (model_index.json), or a hub id"),
        (1, [base, f"x={tmp_path / 'else.safetensors'}"], "holds no LoRA of a model of StableDiffusionPipeline"),
        (1, [base, f"x={tmp_path / 'none'}"], "none: expected a file, a folder or a hub id, found none there"),
        (1, [base, f"x={tmp_path / 'two'}"], "name one of its files, ['a.safetensors', 'b.safetensors']"),
        (1, [base, ink, "--device", "cpux"], "--device: 'cpux' is not there: "),
        (
            1,
            [base, ink, "--method", "match", "--prompts", str(tmp_path / "typo.yaml")],
            "guidence_scale: StableDiffusionPipeline takes no such argument; it takes prompt, height,",
        ),
        (1, [base, f"x={tmp_path / 'kohya.safetensors'}"], "kohya.safetensors: diffusers does not load it: "),
        (1, [base, ink, "--method", "ties"], "expected a rank to truncate it to"),
    ):
        assert main(["pipeline", *QUICK, "--out", str(out), *arguments]) == status, message
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("nsc-merge: error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert not captured.out
        assert not out.exists()


def test_nothing_is_written_over_what_is_read(place, tmp_path, capsys):
    base, ink = str(place / "base"), tmp_path / "ink"
    second = ink / "transformer_2"
    shutil.copytree(place / "ink", second)
    shutil.copy(second / FILE, ink / FILE)
    (tmp_path / "named.safetensors").symlink_to(ink / FILE)
    before = (ink / FILE).read_bytes()
    for given, out in (
        (ink, ink),
        (ink / FILE, ink),
        (tmp_path / "named.safetensors", ink),
        # A merge writes there for Wan's second transformer, and drops what an earlier one wrote.
        (second, ink),
        (second / FILE, ink),
        (ink, base),
    ):
        assert main(["pipeline", base, f"ink={given}", "--out", str(out), *QUICK]) == 1
        assert f"--out: {out} is or holds {base if out == base else given}, which is" in capsys.readouterr().err
        assert {(folder / FILE).read_bytes() for folder in (ink, second)} == {before}
    # What only lies in the same folder is left alone.
    shutil.move(ink / FILE, ink / "own.safetensors")
    assert main(["pipeline", base, f"ink={ink / 'own.safetensors'}", "--out", str(ink), *QUICK]) == 0
    assert (ink / "own.safetensors").read_bytes() == before

"""What ``nsc-merge pipeline`` draws, and that a merge is kept whatever becomes of its pictures."""

import json
from argparse import ArgumentTypeError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_cases import diffusers, stable_diffusion, write_adapters

from nsc_merge.commands.main import main
from nsc_merge.commands.pipeline.given import Given, size_of, with_pictures
from nsc_merge.commands.pipeline.pictures import draw
from nsc_merge.commands.pipeline.written import _component
from nsc_merge.integrations.diffusers import save
from nsc_merge.utils.yaml_text import from_yaml

FILE = "pytorch_lora_weights.safetensors"
GIVEN = [Given("ink", "ink.safetensors", 0.7), Given("toy", "toy.safetensors", -0.25)]


class Told:
    """A pipeline that gives what it was asked for in the place of a picture: weights, and the first of its noise."""

    def __init__(self, given):
        self.given, self.weights, self.enabled, self.settings = given, {}, True, []

    def enable_lora(self):
        self.enabled = True

    def disable_lora(self):
        self.enabled = False

    def set_adapters(self, names, weights=None):
        names = [names] if isinstance(names, str) else names
        self.weights = dict(zip(names, weights or [1.0] * len(names), strict=True))

    def __call__(self, prompt, height=None, generator=None):
        self.settings.append(height)
        weights = self.weights if self.enabled else {}
        values = [weights.get(name, 0.0) for name in ("ink", "toy", "merged")]
        noise = float(torch.rand((), generator=generator))
        return self.given(np.array([[*values, noise]], dtype=np.float64))


def pictures_of(given):
    pipe = Told(given)
    figure = draw(pipe, GIVEN, ["a cat", "b" * 40], {"height": 16}, 3)
    axes = np.array(figure.axes).reshape(2, 5)
    assert pipe.settings == [16] * 10
    shown = [[np.asarray(one.images[0].get_array())[0] for one in row] for row in axes]
    return axes, np.array(shown)


def test_a_row_is_a_prompt_from_one_noise_by_the_base_each_adapter_all_and_the_merge():
    axes, shown = pictures_of(lambda one: SimpleNamespace(images=[one]))
    assert [one.get_title() for one in axes[0]] == ["base", "ink 0.7", "toy -0.25", "all at once", "merged"]
    assert [one.get_ylabel() for one in axes[:, 0]] == ["a cat", "b" * 31 + "…"]
    weights = [[0, 0, 0], [0.7, 0, 0], [0, -0.25, 0], [0.7, -0.25, 0], [0, 0, 1]]
    assert np.array_equal(shown[..., :3], [weights, weights])
    # The seed for the first prompt, and the next for the second.
    noise = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in (3, 4)]
    assert np.array_equal(shown[..., 3], [[one] * 5 for one in noise])


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (4, 2), (5, 2)])
def test_of_a_video_the_frame_in_its_middle_is_shown(count, middle):
    _, wanted = pictures_of(lambda one: SimpleNamespace(images=[one]))
    _, shown = pictures_of(lambda one: SimpleNamespace(frames=[np.stack([one + at for at in range(count)])]))
    assert np.allclose(shown, wanted + middle)


def test_pictures_that_prompts_name_are_open_alone_or_in_lists(tmp_path):
    """From the folder of the prompts; texts and other arguments stay as they are, and so does what was given."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (2, 3), colour).save(tmp_path / f"{name}.png")
    entry = {"prompt": "a.png", "image": ["a.png", str(tmp_path / "b.png")], "mask_image": "b.png", "strength": 0.5}
    given = {"ink": ["a.png", entry], "toy": "no list"}
    before = json.dumps(given)
    found = with_pictures(given, tmp_path)
    assert json.dumps(given) == before
    assert (found["ink"][0], found["toy"]) == ("a.png", "no list")
    opened = found["ink"][1]
    assert {key: opened.pop(key) for key in ("prompt", "strength")} == {"prompt": "a.png", "strength": 0.5}
    pixels = [one.getpixel((0, 0)) for one in (*opened.pop("image"), opened.pop("mask_image"))]
    assert pixels == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    assert not opened
    with pytest.raises((ValueError, OSError), match=r"prompts\['toy'\]: control_image: .*c\.png"):
        with_pictures({"toy": [{"control_image": ["a.png", "c.png"]}]}, tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    pipe = stable_diffusion()
    write_adapters(pipe, root, "ink")
    pipe.save_pretrained(root / "base")
    return root


def fails(error):
    def drawn(*_, **__):
        raise error

    return drawn


@pytest.mark.parametrize(
    ("drawn", "status", "told"),
    [
        # Of a pipeline of sound.
        (lambda *_, **__: {"audios": [0]}, 1, "expected a pipeline of images or videos, found one that gives audios"),
        (fails(AttributeError("'NoneType' object has no attribute 'shape'")), 1, "'NoneType' object has no attribute"),
        (fails(KeyError("image")), 1, "without pictures: 'image'"),
        (fails(AssertionError()), 1, "without pictures: AssertionError"),
        (fails(KeyboardInterrupt()), 130, "nsc-merge: interrupted"),
    ],
)
def test_a_merge_is_written_whatever_becomes_of_its_pictures(place, tmp_path, capsys, monkeypatch, drawn, status, told):
    out = tmp_path / "out"
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.__call__", drawn)
    # With its own arguments, which are looked at.
    arguments = ["pipeline", str(place / "base"), f"ink={place / 'ink'}", "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--images", "ink boat"]) == status
    said = capsys.readouterr()
    assert f"--images: the merge is written to {out}, without pictures" in said.err
    assert told in said.err
    assert not said.out
    assert (out / FILE).is_file()
    assert json.loads((out / "merge.json").read_text())["components"]["unet"]["modules"] == 20
    assert not (out / "images.png").exists()


def test_a_record_has_means_of_what_modules_hold_and_the_largest_error():
    """Of adapters of which some lack modules."""
    coefficients = {"q": {"ink": 0.2, "toy": 0.5}, "k": {"toy": 0.25}, "v": {"ink": 0.6, "toy": 0.0}}
    found = _component(SimpleNamespace(coefficients=coefficients, errors={"q": 0.1, "k": 0.3, "v": 0.2}))
    assert found == {
        "modules": 3, "mean_coefficients": {"ink": pytest.approx(0.4), "toy": pytest.approx(0.25)},
        "largest_error": 0.3, "coefficients": coefficients,
    }  # fmt: skip
    # Of methods without coefficients.
    none = _component(SimpleNamespace(coefficients={}, errors={}))
    assert none == {"modules": 0, "mean_coefficients": {}, "largest_error": 0.0, "coefficients": {}}


def test_a_card_loads_the_revision_that_was_merged(place, tmp_path, monkeypatch, capsys):
    """Of a pipeline and an adapter on the hub, which are told by their names there."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "base")
    pipe.load_lora_weights(place / "ink", adapter_name="ink")
    monkeypatch.setattr("nsc_merge.commands.pipeline.loading.loaded", lambda *_: pipe)
    for base, loads in (
        ("owner/base@refs/pr/1", '"owner/base", revision="refs/pr/1"'),
        ("owner/base", '"owner/base"'),
        (str(place / "base"), '"BASE"'),
    ):
        given = "ink=owner/loras/a/ink.safetensors@v2:0.5"
        assert main(["pipeline", base, given, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
        pipe.delete_adapters("merged")
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"pipe = DiffusionPipeline.from_pretrained({loads})\n" in card
        empty, header, text = card.split("---\n", 2)
        about = {"base_model": "owner/base", "base_model_relation": "adapter"} if base.startswith("owner") else {}
        assert from_yaml(header) == {**about, "library_name": "diffusers", "tags": ["merge", "lora"]}
        assert (empty, text[:2]) == ("", "\n#")
        assert "| ink | `owner/loras/a/ink.safetensors@v2` | 0.5 |" in card
        assert str(place) not in card
        document = json.loads((tmp_path / "out" / "merge.json").read_text())
        assert document["base"] == base
        assert document["adapters"] == {"ink": {"source": "owner/loras/a/ink.safetensors@v2", "weight": 0.5}}


def test_arguments_of_the_pipeline_are_for_all_that_is_drawn(tmp_path, monkeypatch):
    """Pictures to start from among them, and sizes that are no squares."""
    text = stable_diffusion()
    for name in ("ink", "toy"):
        save(text, name, tmp_path / name)
    text.unload_lora_weights()
    parts = {name: part for name, part in text.components.items() if name != "image_encoder"}
    diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    for name in ("start.png", "mask.png"):
        Image.new("RGB", (32, 16), "white").save(tmp_path / name)
    asked = []

    def seen(pipe, given, prompts, settings, seed):
        asked.append(settings)
        return draw(pipe, given, prompts, settings, seed)

    monkeypatch.setattr("nsc_merge.commands.pipeline.pictures.draw", seen)
    out, given = tmp_path / "out", [f"{name}={tmp_path / name}" for name in ("ink", "toy")]
    common = ["pipeline", str(tmp_path / "base"), *given, "--out", str(out), "--device", "cpu", "--size", "32x16"]
    pictures = ["--argument", f"image={tmp_path / 'start.png'}", "--argument", f"mask_image={tmp_path / 'mask.png'}"]
    (tmp_path / "prompts.yaml").write_text("ink: [ink tower]\ntoy: [toy tower]\n")
    data = ["--method", "regmean", "--prompts", str(tmp_path / "prompts.yaml"), "--steps", "2"]
    assert main([*common, *pictures, "--argument", "strength=1.0", *data, "--images", "ink boat"]) == 0
    (settings,) = asked
    assert (settings["width"], settings["height"], settings["strength"]) == (32, 16, 1.0)
    assert (settings["image"].size, settings["mask_image"].size) == ((32, 16), (32, 16))
    assert (out / "images.png").is_file()
    document = json.loads((out / "merge.json").read_text())
    assert document["size"] == "32x16"
    assert document["arguments"]["strength"] == 1.0


@pytest.mark.parametrize("text", ["", "0", "16x", "16x0", "-16", "16 x 16", "16x16x3"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="expected a number of pixels, or WIDTHxHEIGHT, found"):
        size_of(text)

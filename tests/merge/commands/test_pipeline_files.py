"""``nsc-merge pipeline``: files of adapters in the ways that people have them."""

from types import SimpleNamespace

import pytest
import torch
from pipeline_cases import diffusers, stable_diffusion, write_adapters
from safetensors.torch import load_file, save_file
from torch import nn

from nsc_merge.commands.main import main
from nsc_merge.commands.pipeline.reading import watched

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline, and one with an adapter of it."""
    root = tmp_path_factory.mktemp("files")
    pipe = stable_diffusion()
    write_adapters(pipe, root, "ink")
    pipe.save_pretrained(root / "base")
    return root


def of_kohya(pipe, alphas):
    """Factors and alphas by kohya's names, and the updates that they mean by the modules' names."""
    generator = torch.Generator().manual_seed(0)
    tensors, updates = {}, {}
    for part, begin, ends in (("unet", "lora_unet_", ("to_q", "to_out.0", "ff.net.2")),
                              ("text_encoder", "lora_te_text_model_", ("q_proj", "out_proj", "fc1"))):  # fmt: skip
        for number, (path, module) in enumerate(getattr(pipe, part).named_modules()):
            if not isinstance(module, nn.Linear) or not path.endswith(ends):
                continue
            rank, alpha = 2 + number % 2, alphas[number % len(alphas)]
            down = 0.3 * torch.randn(rank, module.in_features, generator=generator)
            up = 0.3 * torch.randn(module.out_features, rank, generator=generator)
            key = f"{begin}{path.removeprefix('text_model.').replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            updates[f"{part}.{path.removeprefix('text_model.')}"] = up @ down * alpha / rank
    return tensors, updates


def updates_in(file):
    state = {key.replace("text_model.", ""): value for key, value in load_file(file).items()}
    downs = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {path: state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"] for path in downs}


@pytest.mark.parametrize("alphas", [(1.0, 2.0, 3.0, 5.0), (4.0,)])
def test_every_layer_of_a_file_of_kohya_has_its_own_alpha(place, tmp_path, capsys, alphas):
    """Of alphas that differ, diffusers 0.42.1 leaves out those of attention and of text encoders."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(place / "base")
    tensors, wanted = of_kohya(pipe, alphas)
    save_file(tensors, tmp_path / "kohya.safetensors")
    out = tmp_path / "out"
    given = [str(place / "base"), f"ink={tmp_path / 'kohya.safetensors'}:0.5", "--out", str(out)]
    assert main(["pipeline", *given, "--device", "cpu"]) == 0
    said = f"ink: its {len(wanted)} alphas differ between layers, and count as the file has them"
    assert (said in capsys.readouterr().err) is (len(alphas) > 1)
    found = updates_in(out / FILE)
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        torch.testing.assert_close(found[path], 0.5 * update, rtol=1e-5, atol=1e-6)


def test_tensors_of_no_model_are_told_whatever_they_are_called(place, tmp_path, capsys):
    more = {"text_encoder_2.x.lora_A.weight": torch.ones(1, 2), "unknown.x.lora_A.weight": torch.ones(1, 2)}
    save_file({**load_file(place / "ink" / FILE), **more}, tmp_path / "more.safetensors")
    given = [str(place / "base"), f"ink={tmp_path / 'more.safetensors'}", "--out", str(tmp_path / "out")]
    assert main(["pipeline", *given, "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    for part in ("text_encoder_2", "unknown"):
        assert f"ink: 1 tensors of {part} are left out, as the pipeline has no such model" in said


def test_magnitudes_that_diffusers_leaves_out_are_refused(place, tmp_path, capsys):
    """Of DoRA as kohya's program writes it, diffusers 0.42.1 reads the factors alone."""
    tensors, _ = of_kohya(diffusers.StableDiffusionPipeline.from_pretrained(place / "base"), (4.0,))
    ups = {key: value for key, value in tensors.items() if key.endswith("lora_up.weight")}
    tensors |= {key.replace("lora_up.weight", "dora_scale"): torch.ones(len(up), 1) for key, up in ups.items()}
    save_file(tensors, tmp_path / "dora.safetensors")
    given = [str(place / "base"), f"ink={tmp_path / 'dora.safetensors'}", "--out", str(tmp_path / "out")]
    assert main(["pipeline", *given, "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "ink=" in said
    assert "it is DoRA, whose magnitudes (dora_scale) diffusers leaves out" in said
    assert not (tmp_path / "out").exists()


def test_what_diffusers_leaves_out_in_translating_is_told():
    """It says so at a level that is not shown, here of Flux's norms."""
    pipe = SimpleNamespace(lora_state_dict=diffusers.FluxPipeline.lora_state_dict)
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(12, 2), "alpha": torch.tensor(2.0)}
    tensors = {f"diffusion_model.double_blocks.0.img_attn.qkv.{name}": value for name, value in factors.items()}
    tensors["diffusion_model.single_blocks.0.norm.key_norm.scale.diff"] = torch.ones(4)
    with watched(pipe) as read:
        pipe.lora_state_dict(tensors)
    (said,) = read.said
    assert said.startswith("Normalization diff keys found")
    del tensors["diffusion_model.single_blocks.0.norm.key_norm.scale.diff"]
    pipe.lora_state_dict = diffusers.FluxPipeline.lora_state_dict
    with watched(pipe) as read:
        pipe.lora_state_dict(tensors)
    assert not read.said
    assert len(read.keys) == 6

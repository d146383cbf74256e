"""What pipelines of single families load beside LoRA, or call otherwise than the rest of them do."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxTransformer2DModel,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import nsc_merge
from nsc_merge.integrations.diffusers import calibration_data, merge, save

FILE = "pytorch_lora_weights.safetensors"


def flux(channels=4):
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    more = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}
    return FluxTransformer2DModel(patch_size=1, in_channels=channels, out_channels=4, **sizes, **more).eval()


def control():
    alone = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxControlPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=flux(), **alone)


def factors(model, seed, *modules):
    """Tensors of LoRA, as PEFT names them."""
    adapted = copy.deepcopy(model)
    torch.manual_seed(seed)
    adapted.add_adapter(LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False), "a")
    return {key: value.contiguous() for key, value in get_peft_model_state_dict(adapted, adapter_name="a").items()}


def written(folder, parts, metadata=None):
    folder.mkdir()
    named = {f"{part}.{key}": value.clone() for part, tensors in parts.items() for key, value in tensors.items()}
    save_file(named, folder / FILE, metadata=metadata)
    return folder


def test_norms_of_a_control_lora_are_saved_with_the_merge(tmp_path):
    wide = flux(8)
    norms = {key: value + 0.5 for key, value in wide.state_dict().items() if "norm_q" in key or "norm_k" in key}
    depth = {**factors(wide, 1, "x_embedder", "to_q", "to_v"), **norms}
    folders = {"depth": written(tmp_path / "depth", {"transformer": depth}),
               "style": written(tmp_path / "style", {"transformer": factors(flux(), 2, "to_q", "to_k")})}  # fmt: skip

    @torch.no_grad()
    def drawn(pipe):
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden_states": (1, 9, 8), "encoder_hidden_states": (1, 5, 32), "pooled_projections": (1, 32)}
        inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        places = {"img_ids": torch.randn(9, 3, generator=generator), "txt_ids": torch.zeros(5, 3)}
        return pipe.transformer(**inputs, **places, timestep=torch.tensor([0.4])).sample

    pipe = control()
    for name, folder in folders.items():
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(list(folders), [0.3, 0.3])
    wanted = drawn(pipe)
    merge(pipe, list(folders), [0.3, 0.3], "both")
    save(pipe, "both", tmp_path / "both")
    fresh = control()
    fresh.load_lora_weights(tmp_path / "both", adapter_name="both")
    torch.testing.assert_close(drawn(fresh), wanted, rtol=1e-4, atol=1e-5)
    assert any("norm_q" in key for key in load_file(tmp_path / "both" / FILE))


def test_a_scaling_that_one_family_reads_in_the_header_is_refused(tmp_path):
    folder = written(tmp_path / "a", {"transformer": factors(flux(), 1, "to_q")}, {"alpha": "1"})
    with pytest.raises(ValueError, match=r"alpha is in its header \(1\), .* MiniMax-H3's and no others"):
        nsc_merge.merge(flux(), {"a": folder}, method="task_arithmetic")


@pytest.mark.parametrize("part", ["connectors", "transformer_ref", "prior", "text_conditioner"])
def test_other_parts_of_a_pipeline_are_known_by_their_names(part, tmp_path):
    own = factors(flux(), 1, "to_q")
    alone = nsc_merge.merge(flux(), {"a": written(tmp_path / "alone", {part: own})}, method="task_arithmetic")
    assert len(alone.paths) == len(own) // 2
    beside = written(tmp_path / "beside", {"transformer": factors(flux(), 2, "to_v"), part: own})
    both = nsc_merge.merge(flux(), {"a": beside}, method="task_arithmetic")
    assert all(path.endswith("to_v") for path in both.paths)
    assert any(f"give pipe.{part} as adapter" in note for note in both.adapters["a"].notes)


def perturbed():
    torch.manual_seed(0)
    downs, ups = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        **sizes, attention_head_dim=4, down_block_types=downs, up_block_types=ups, cross_attention_dim=8
    )
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
    coder = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    alone = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPAGPipeline(
        **alone, unet=unet, vae=AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **coder),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
        pag_applied_layers=["mid"],
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_a_refused_drawing_leaves_the_model_as_it_was(guidance):
    pipe = perturbed()
    prompts = {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}
    one = {"prompt": None, **prompts, "height": 16, "width": 16, "num_inference_steps": 2}

    def drawn():
        generator = torch.Generator().manual_seed(0)
        return pipe(**one, pag_scale=0.0, guidance_scale=5.0, output_type="latent", generator=generator).images

    before = drawn()
    with pytest.raises(ValueError, match="perturbed-attention guidance; pag_scale=0 leaves it out"):
        calibration_data(pipe, {"a": [{**one, "pag_scale": 3.0, "guidance_scale": guidance}]})
    assert torch.equal(drawn(), before)


def test_a_modular_pipeline_is_merged_and_not_recorded():
    model = flux()
    for name in "ab":
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(transformer=model)
    assert list(merge(pipe, ["a", "b"], [0.3, 0.3], "both")) == ["transformer"]
    with pytest.raises(ValueError, match="^pipe: FluxModularPipeline is a modular pipeline, .* expected the"):
        calibration_data(pipe, {"a": ["ink"]})

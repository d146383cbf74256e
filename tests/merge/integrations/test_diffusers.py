"""Adapters of models of diffusers: given in memory, merged, saved, loaded again."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import nsc_merge
from nsc_merge.integrations.peft import merge

diffusers = pytest.importorskip("diffusers")

BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
HEADS = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "pos_embed_max_size": 8}
WIDTHS = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 8)


def unet():
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8, **BLOCKS, down_block_types=DOWN, up_block_types=UP, cross_attention_dim=8
    )
    return made.double()


def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **HEADS, **WIDTHS).double()


def output(model):
    generator = torch.Generator().manual_seed(9)
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 3, 8)))
    call = {"encoder_hidden_states": text, "timestep": torch.tensor([5])}
    if isinstance(model, diffusers.SD3Transformer2DModel):
        call["pooled_projections"] = text[:, 0]
    with torch.no_grad():
        return model.eval()(image, **call).sample


def adapted(make, *names):
    model = make()
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("make", [unet, transformer])
def test_models_of_diffusers_are_merged_saved_and_loaded_again(tmp_path, make):
    both = adapted(make, "a", "b")
    both.set_adapters(["a", "b"], [0.5, 0.5])
    wanted = output(both)
    # The weights are part of the scalings that the layers run, which count.
    both.set_adapters(["a", "b"], [1.0, 1.0])
    base = make()
    assert (output(base) - wanted).abs().max() > 1e-4
    result = nsc_merge.merge(base, {"a": both, "b": both}, method="task_arithmetic", scale=0.5)
    result.save(tmp_path / "whole", format="model")
    result.save(tmp_path / "shards", format="model", max_shard_size=10_000)
    result.save(tmp_path / "lora", format="lora")
    assert len(list((tmp_path / "shards").glob("diffusion_pytorch_model-*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        read = type(base).from_pretrained(tmp_path / folder, torch_dtype=torch.float64)
        torch.testing.assert_close(output(read), wanted, rtol=1e-10, atol=1e-10)
    again = nsc_merge.merge(make(), {"m": tmp_path / "lora"}, method="task_arithmetic", scale=1.0)
    # The factors are written in float32.
    torch.testing.assert_close(output(again.apply(again.model)), wanted, rtol=1e-5, atol=1e-7)


def test_adapters_in_a_model_are_merged_beside_each_other():
    model = adapted(unet, "a", "b")
    model.set_adapters(["a", "b"], [0.5, 0.5])
    wanted = output(model)
    model.set_adapters(["a", "b"], [1.0, 1.0])
    model.set_adapters(["a"])
    before, trained = output(model), [one.requires_grad for one in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    made = merge(model, ["a", "b"], [0.5, 0.5], "merged", method="task_arithmetic")
    assert torch.equal(output(model), before)
    after = dict(model.named_parameters())
    assert [after[name].requires_grad for name in names] == trained
    assert not any(one.requires_grad for name, one in after.items() if ".merged." in name)
    model.set_adapter(made.adapter_name)
    torch.testing.assert_close(output(model), wanted, rtol=1e-10, atol=1e-10)


def test_a_folder_of_diffusers_is_refused_with_a_way_that_works(tmp_path):
    held = adapted(unet, "a")
    wanted = output(held)
    held.save_lora_adapter(tmp_path, adapter_name="a")
    with pytest.raises(FileNotFoundError, match=r"adapters\['a'\].*what diffusers writes.*model.load_lora_adapter"):
        nsc_merge.load_adapter(tmp_path, "a")
    loaded = unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    result = nsc_merge.merge(unet(), {"a": loaded}, method="task_arithmetic", scale=1.0)
    torch.testing.assert_close(output(result.apply(result.model)), wanted, rtol=1e-10, atol=1e-10)

"""What is saved of an adapter of a pipeline, and of models that hold no numbers to save."""

import pytest
import torch
from peft import LoraConfig
from pipeline_cases import FEW, diffusers, stable_diffusion
from torch import nn

from nsc_merge.integrations.diffusers import accelerate, merge, save


def drawn(pipe):
    return pipe("ink boat", **FEW, output_type="latent", generator=torch.Generator().manual_seed(0)).images


def test_a_text_encoder_without_adapters_on_attention_is_loaded_again(tmp_path):
    """Of which diffusers 0.42.1 knows no names of PEFT's, and refuses the file."""
    pipe = stable_diffusion()
    pipe.delete_adapters("ink")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["fc1", "fc2"], lora_alpha=5), adapter_name="words")
    for key, value in pipe.text_encoder.named_parameters():
        if ".words." in key:
            nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(0))
    pipe.set_adapters("words", 0.6)
    wanted = drawn(pipe)
    merge(pipe, ["words"], [0.6], "both")
    save(pipe, "both", tmp_path)
    fresh = stable_diffusion()
    fresh.unload_lora_weights()
    assert float((drawn(fresh) - wanted).norm() / wanted.norm()) > 1e-3
    fresh.load_lora_weights(tmp_path, adapter_name="both")
    assert float((drawn(fresh) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("call", [lambda pipe, _: accelerate(pipe), lambda pipe, out: save(pipe, "ink", out),
                                  lambda pipe, _: merge(pipe, ["ink", "toy"])])  # fmt: skip
def test_models_whose_tensors_hold_no_numbers_are_refused(call, tmp_path):
    pipe, out = stable_diffusion(), tmp_path / "out"
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    with pytest.raises(ValueError, match=r"^pipe\.unet: expected weights in memory, .* group offloading to disk"):
        call(pipe, out)
    pipe = stable_diffusion()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"^pipe\.\w+: .* one module at a time, .* before enable_sequential"):
        call(pipe, out)
    assert not out.exists()


def test_models_that_are_offloaded_whole_are_merged_and_saved(tmp_path):
    pipe = stable_diffusion()
    pipe.set_adapters(["ink", "toy"], [0.7, -0.4])
    wanted = drawn(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with accelerate(pipe):
        assert float((drawn(pipe) - wanted).norm() / wanted.norm()) < 1e-5
    merge(pipe, ["ink", "toy"], [0.7, -0.4], "both")
    save(pipe, "both", tmp_path)
    fresh = diffusers.StableDiffusionPipeline(**stable_diffusion().components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path, adapter_name="both")
    fresh.set_adapters("both")
    assert float((drawn(fresh) - wanted).norm() / wanted.norm()) < 1e-5

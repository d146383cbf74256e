"""Several LoRA adapters in a diffusers pipeline: fused while it runs, and merged into one.

    python examples/integrations/diffusers_loras.py PIPELINE ink=FOLDER:0.7 toy=FOLDER:0.5 [--prompt "a lighthouse"]

or, with a small UNet and random adapters made on the spot:

    python examples/integrations/diffusers_loras.py [--method nsc] [--out FOLDER]

A method that needs data takes what the pipeline calls its models with while it makes an image by each adapter alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from nsc_merge.integrations.diffusers import accelerate, calibration_data, merge, save


def loaded(pipeline: str, adapters: list[str]) -> tuple[Any, dict[str, float]]:
    """A pipeline with the adapters of ``NAME=FOLDER:WEIGHT``."""
    pipe, weights = DiffusionPipeline.from_pretrained(pipeline), {}
    for pair in adapters:
        name, place = pair.split("=", 1)
        folder, _, weight = place.rpartition(":")
        pipe.load_lora_weights(folder, adapter_name=name)
        weights[name] = float(weight)
    return pipe, weights


def small() -> tuple[Any, dict[str, float]]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    weights = {"ink": 0.7, "toy": 0.5}
    for name in weights:
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    return pipe, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?")
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER:WEIGHT")
    parser.add_argument("--prompt", default="a lighthouse")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--method", choices=["nsc", "match", "distill", "regmean"], help="merge by data, too")
    parser.add_argument("--out", help="folder for the merged adapter")
    arguments = parser.parse_args()
    pipe, weights = loaded(arguments.pipeline, arguments.adapters) if arguments.pipeline else small()
    pipe.set_progress_bar_config(disable=True)

    text: dict[str, Any] = {"prompt": arguments.prompt}
    if not arguments.pipeline:
        embeds = torch.ones(1, 8, 32)
        text = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}

    def latents(what: str) -> torch.Tensor:
        begin = time.perf_counter()
        found: torch.Tensor = pipe(
            **text,
            num_inference_steps=arguments.steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images
        print(f"{what:12} {time.perf_counter() - begin:.2f} s")
        return found

    pipe.set_adapters(list(weights), list(weights.values()))
    wanted = latents("set_adapters")
    with accelerate(pipe):
        fused = latents("accelerated")
    merge(pipe, list(weights), list(weights.values()), "both")
    pipe.set_adapters("both")
    merged = latents("merged")
    for name, found in (("accelerated", fused), ("merged", merged)):
        print(f"{name}: differs by {float((found - wanted).norm() / wanted.norm()):.0e}")
    name = "both"
    if arguments.method:
        name = arguments.method
        data = calibration_data(pipe, {one: [text] for one in weights}, num_inference_steps=arguments.steps)
        merge(pipe, list(weights), adapter_name=name, method=name, data=data)
        pipe.set_adapters(name)
        latents(name)
    if arguments.out:
        print(f"{name} is in {save(pipe, name, arguments.out)}")


if __name__ == "__main__":
    main()

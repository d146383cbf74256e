"""Merge LoRA adapters of LLaVA's language model without labels; the frozen vision tower runs once per image.

    python examples/llava.py                                         # a small random model and adapters
    python examples/llava.py llava-hf/llava-1.5-7b-hf vqa=./vqa caption=./caption --data vqa=vqa.tsv caption=c.tsv

Every adapter is NAME=FOLDER_OR_HUB_ID, and every file of inputs NAME=FILE: an image path, a tab and a prompt per line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from command_line import local, pairs, run
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


def small_example(folder: Path) -> tuple:
    """A model from a configuration, two adapters saved by peft, and random images and prompts."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=255)
    adapters = {}
    for seed, name in enumerate(("vqa", "caption")):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        torch.manual_seed(1 + seed)
        lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name)
        adapters[name] = folder / name
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    image = torch.full((1, 16), 255)
    batches = {
        name: [
            {
                "input_ids": torch.cat([image, torch.randint(255, (1, 8))], 1),
                "pixel_values": torch.randn(1, 3, 32, 32),
            }
        ]
        for name in adapters
    }
    return model, adapters, batches


def from_hub(arguments: argparse.Namespace) -> tuple:
    from PIL import Image
    from transformers import AutoProcessor

    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    batches: dict[str, list] = {}
    for name, file in pairs(arguments.data).items():
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            path, prompt = line.split("\t", 1)
            inputs = processor(
                images=Image.open(path).convert("RGB"),
                text=f"USER: <image>\n{prompt} ASSISTANT:",
                return_tensors="pt",
            )
            batches.setdefault(name, []).append(dict(inputs.to(dtype=model.dtype)))
    return model, {name: local(source) for name, source in pairs(arguments.adapters).items()}, batches


if __name__ == "__main__":
    run(__doc__, small_example, from_hub, inputs="--data", metavar="NAME=FILE", steps=500, out="merged-llava")

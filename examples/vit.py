"""Merge LoRA adapters of a vision transformer (ViT, CLIP vision, DINOv2) without labels.

    python examples/vit.py                                           # a small random model and adapters
    python examples/vit.py google/vit-base-patch16-224 depth=./depth edge=./edge --images depth=photos edge=photos

Every adapter is NAME=FOLDER_OR_HUB_ID, and every folder of images NAME=FOLDER. Adapters that are given the same
folder share its forward passes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from command_line import local, pairs, run
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, ViTConfig, ViTModel


def small_example(folder: Path) -> tuple:
    """A model from a configuration, two adapters saved by peft, and random images."""
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    adapters = {}
    for seed, name in enumerate(("depth", "edge")):
        torch.manual_seed(0)
        model = ViTModel(config)
        torch.manual_seed(1 + seed)
        lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name)
        adapters[name] = folder / name
    torch.manual_seed(0)
    model = ViTModel(config)
    images = [{"pixel_values": torch.randn(4, 3, 32, 32)}]
    return model, adapters, dict.fromkeys(adapters, images)


def from_hub(arguments: argparse.Namespace) -> tuple:
    from PIL import Image
    from transformers import AutoImageProcessor

    model = AutoModel.from_pretrained(arguments.model).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    batches, read = {}, {}
    for name, folder in pairs(arguments.images).items():
        if folder not in read:
            files = [
                file for file in sorted(Path(folder).iterdir()) if file.suffix.lower() in (".jpg", ".jpeg", ".png")
            ]
            images = [Image.open(file).convert("RGB") for file in files]
            read[folder] = [dict(processor(images[i : i + 32], return_tensors="pt")) for i in range(0, len(images), 32)]
        batches[name] = read[folder]
    return model, {name: local(source) for name, source in pairs(arguments.adapters).items()}, batches


if __name__ == "__main__":
    run(__doc__, small_example, from_hub, inputs="--images", metavar="NAME=FOLDER", steps=100, out="merged-vit")

"""Merge LoRA adapters of a LLaMA-like decoder (Llama, Mistral, Qwen) without labels.

    python examples/llama.py                                       # a small random model and adapters, made on the spot
    python examples/llama.py meta-llama/Meta-Llama-3-8B mnli=USER/llama-mnli rte=./rte --prompts mnli=m.txt rte=r.txt

Every adapter is NAME=FOLDER_OR_HUB_ID, and every file of prompts, one per line, NAME=FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from command_line import local, pairs, run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def small_example(folder: Path) -> tuple:
    """A model from a configuration, two adapters saved by peft, and random prompts."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    adapters = {}
    for seed, name in enumerate(("mnli", "rte")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(1 + seed)
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name)
        adapters[name] = folder / name
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return model, adapters, {name: [{"input_ids": torch.randint(256, (2, 16))}] for name in adapters}


def from_hub(arguments: argparse.Namespace) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches = {}
    for name, file in pairs(arguments.prompts).items():
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        batches[name] = [
            dict(tokenizer(lines[i : i + 2], padding=True, return_tensors="pt")) for i in range(0, len(lines), 2)
        ]
    return model, {name: local(source) for name, source in pairs(arguments.adapters).items()}, batches


if __name__ == "__main__":
    run(__doc__, small_example, from_hub, inputs="--prompts", metavar="NAME=FILE", steps=500, out="merged-llama")

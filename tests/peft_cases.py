"""A small LLaMA with three LoRA adapters of PEFT, of different ranks and scalings and not in all the same modules."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = ["a", "b", "c"]
PATTERN = {"layers.1.self_attn.q_proj": 6}


def configs(**settings) -> dict[str, LoraConfig]:
    common = {"target_modules": ["q_proj", "v_proj"], **settings}
    return {
        "a": LoraConfig(**{"r": 4, "lora_alpha": 8, **common}),
        "b": LoraConfig(**{"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": PATTERN, **common}),
        "c": LoraConfig(**{"r": 2, "lora_alpha": 2, **common, "target_modules": ["v_proj"]}),
    }


def build(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    base = LlamaForCausalLM(config).to(dtype)
    first, *others = configs(**settings).items()
    model = get_peft_model(base, first[1], adapter_name=first[0], autocast_adapter_dtype=False)
    for name, one in others:
        model.add_adapter(name, one, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    model.base_model.set_adapter(NAMES)
    return model.requires_grad_(False).eval()


def inputs():
    return {"input_ids": torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(2))}


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]

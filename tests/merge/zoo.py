"""Small but genuine transformers models, one per family, with inputs and adapters written by peft itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
import written
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2

from nsc_merge.models.bases.stored_weights import input_device

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
IMAGE = {"image_size": 8, "patch_size": 4}
DECODER = {**WIDTH, "intermediate_size": 48, "num_key_value_heads": 2, "vocab_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE_TOKEN = 5


class Kind(NamedTuple):
    """A model, its inputs, and which linears its adapters touch."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    targets: list[str] | str
    has_bias: bool


def llava_config() -> tf.LlavaConfig:
    vision = tf.CLIPVisionConfig(**WIDTH, intermediate_size=48, **IMAGE)
    words = tf.LlamaConfig(**DECODER, **TOKENS)
    return tf.LlavaConfig(vision_config=vision, text_config=words, image_token_index=IMAGE_TOKEN)


def pixels(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def text(seed: int) -> dict[str, Tensor]:
    """Three prompts of 7 tokens, the second padded at its end."""
    ids = torch.randint(6, 64, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def images_and_text(seed: int) -> dict[str, Tensor]:
    words = text(seed)
    words["input_ids"][:, :4] = IMAGE_TOKEN
    return {**words, **pixels(seed)}


LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# DINOv2 has one or the other, as the release of transformers has it: 5.17 the second.
DINOV2_NAMINGS = (ATTENTION, ["attention.query", "attention.key", "attention.value", "output.dense"])
DINOV2 = DINOV2_NAMINGS[hasattr(modeling_dinov2, "Dinov2SelfAttention")]
KINDS = {
    "vit": Kind(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**WIDTH, intermediate_size=48, **IMAGE)),
        pixels,
        ATTENTION,
        True,
    ),
    "clip": Kind(
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**WIDTH, intermediate_size=48, **IMAGE)),
        pixels,
        ["q_proj", "v_proj", "out_proj"],
        True,
    ),
    "siglip": Kind(
        lambda: tf.SiglipVisionModel(
            tf.SiglipVisionConfig(**WIDTH, intermediate_size=48, vision_use_head=False, **IMAGE)
        ),
        pixels,
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        True,
    ),
    "dinov2": Kind(
        lambda: tf.Dinov2Model(tf.Dinov2Config(**WIDTH, mlp_ratio=2, **IMAGE)), pixels, DINOV2, True
    ),
    "llama": Kind(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, **TOKENS)), text, ["q_proj", "v_proj"], False
    ),
    "llama-cls": Kind(
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER, **TOKENS, num_labels=3)),
        text,
        ["q_proj", "v_proj"],
        False,
    ),
    "mistral": Kind(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, **TOKENS)),
        text,
        [*ATTENTION, "down_proj"],
        False,
    ),
    "qwen2": Kind(
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, **TOKENS)), text, ["q_proj", "v_proj"], True
    ),
    "llava": Kind(
        lambda: tf.LlavaForConditionalGeneration(llava_config()), images_and_text, LANGUAGE, False
    ),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind].build().eval()


def write_adapter(model: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT folder with random values in everything that peft would train."""
    return written.write(model, folder, seed, _fill, config, save_embedding_layers=False)


def _fill(peft_model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in peft_model.named_parameters():
        if "lora_magnitude" in name:
            value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
        elif "lora_" in name:
            value.copy_(0.15 * torch.randn(value.shape, generator=generator))
        elif value.requires_grad:
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with random factors in its adapters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.15 * torch.randn(value.shape, generator=generator))
    return model.double()


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states where there is no head; at real tokens only. On the CPU, wherever the model is."""
    device = input_device(model)
    with torch.no_grad():
        out = model.eval()(**{name: value.to(device) for name, value in inputs.items()})
    values = (out.logits if hasattr(out, "logits") else out.last_hidden_state).cpu()
    mask = inputs.get("attention_mask")
    return values[mask.bool()] if mask is not None and values.dim() == 3 else values

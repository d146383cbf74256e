"""Base folders as transformers saves them, with tokenizers and processors of a few words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessor,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [*SPECIAL, *["user", "assistant", "system", ":", "a", "b", "c", "d", "e", "f", "g", "h"]]
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
# Reads contents as LLaVA's does: as parts, images first.
PARTS = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}<image> {% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} {% endfor %}{% endfor %}"
)
SIZE, PATCH = 8, 4
IMAGE_TOKENS = (SIZE // PATCH) ** 2


def tokenizer(
    *, pad: bool = True, chat: str | None = CHAT, extra: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """One token a word, with a first token in front, and ``extra`` special ones behind all others."""
    extra = dict(extra or {})
    words = [*WORDS, *extra.values()]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [*SPECIAL, *extra.values()]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=extra, **names)
    wrapped.chat_template = chat
    return wrapped


def llama_config(**changed: Any) -> LlamaConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    return LlamaConfig(**{**settings, "architectures": ["LlamaForCausalLM"], **changed})


def text_base(folder: Path, **changed: Any) -> Path:
    """A folder without weights: none are needed to make data."""
    llama_config().save_pretrained(folder)
    tokenizer(**changed).save_pretrained(folder)
    return folder


def vision_base(folder: Path, **changed: Any) -> Path:
    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIZE,
        patch_size=PATCH, architectures=["ViTModel"], **changed,
    )  # fmt: skip
    config.save_pretrained(folder)
    means = {"image_mean": [0.5], "image_std": [0.5]} if changed.get("num_channels") == 1 else {}
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, **means).save_pretrained(folder)
    return folder


def processor(chat: str | None = PARTS) -> LlavaProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, tokenizer(chat=None), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat,
    )  # fmt: skip


def llava_base(folder: Path, chat: str | None = PARTS) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_token_index=WORDS.index("<image>"),
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(folder)
    processor(chat).save_pretrained(folder)
    return folder


def gemma_base(folder: Path) -> Path:
    """Where an image is another token in the text than what it becomes."""
    extra = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = Gemma3TextConfig(
        vocab_size=len(WORDS) + 3, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes
    )
    Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(image_size=SIZE, patch_size=PATCH, **sizes),
        mm_tokens_per_image=IMAGE_TOKENS, image_token_index=len(WORDS) + 1, image_token_id=len(WORDS) + 1,
        architectures=["Gemma3ForConditionalGeneration"],
    ).save_pretrained(folder)  # fmt: skip
    images = Gemma3ImageProcessor(size={"height": SIZE, "width": SIZE})
    chat = PARTS.replace("<image>", extra["boi_token"])
    tool = Gemma3Processor(
        images, tokenizer(chat=None, extra=extra), chat_template=chat, image_seq_length=IMAGE_TOKENS
    )
    tool.save_pretrained(folder)
    return folder


def paligemma_base(folder: Path) -> Path:
    """Whose processor has no chat template, and adds some thousand tokens of its own."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = GemmaConfig(vocab_size=2048, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes)
    vision = SiglipVisionConfig(image_size=SIZE, patch_size=PATCH, **sizes)
    PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=WORDS.index("<image>"), projection_dim=8, hidden_size=8,
        architectures=["PaliGemmaForConditionalGeneration"],
    ).save_pretrained(folder)  # fmt: skip
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = IMAGE_TOKENS
    tool = tokenizer(chat=None)
    tool.image_token, tool.image_token_id = "<image>", WORDS.index("<image>")
    PaliGemmaProcessor(images, tool).save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of one JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_pictures(folder: Path, count: int) -> list[Path]:
    """PNG files ``0.png`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        picture(number).save(file)
    return files

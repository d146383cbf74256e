"""Bases as transformers saves them, with tokenizer, processor and generation configuration, small and untrained."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{number}" for number in range(64 - 6)]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer(words: list[str] = WORDS, template: str = TEMPLATE) -> tf.PreTrainedTokenizerFast:
    """One token for each word, after six special ones; the sixth stands for an image."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<x>", "<image>"]
    numbers = {word: number for number, word in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def write_base(kind: str, folder: Path) -> Path:
    """A model of the zoo, with what belongs beside it."""
    model = zoo.build(kind)
    if model.can_generate():
        model.generation_config = tf.GenerationConfig(max_new_tokens=5, do_sample=False, **zoo.TOKENS)
    model.save_pretrained(folder)
    if kind == "vit":
        tf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    elif kind == "llava":
        images = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        tf.LlavaProcessor(
            images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template="{% for message in messages %}<image>{{ message['content'][1]['text'] }}{% endfor %}",
        ).save_pretrained(folder)  # fmt: skip
    else:
        tokenizer().save_pretrained(folder)
    return folder


def write_adapters(base: Path, folder: Path, kind: str, **config) -> dict[str, Path]:
    """Two, of ranks 3 and 4, by PEFT, which writes down where the base lies."""
    model = load(base)
    settings = {"target_modules": zoo.KINDS[kind].targets, **config}
    return {
        task: zoo.write_adapter(model, folder / task, seed, r=2 + seed, lora_alpha=6, **settings)
        for seed, task in enumerate(("one", "two"), 1)
    }


def load(folder: Path) -> tf.PreTrainedModel:
    config = tf.AutoConfig.from_pretrained(folder)
    return getattr(tf, config.architectures[0]).from_pretrained(folder).eval()


def picture(seed: int):
    from PIL import Image

    values = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy())

"""Write a small base model, LoRA adapters for it and raw data: what merging starts from, made here in seconds.

    python examples/small_inputs.py text DIR       # a Llama and its tokenizer; adapters french, opposite; prompts
    python examples/small_inputs.py vision DIR     # a ViT and its image processor; adapters size, colour; photos
    python examples/small_inputs.py vlm DIR        # a LLaVA and its processor; adapters size, colour; pairs

Nothing is downloaded. DIR/base and DIR/adapters are as transformers and PEFT save them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

FRENCH = {
    "cat": "chat", "dog": "chien", "bird": "oiseau", "horse": "cheval", "house": "maison", "door": "porte",
    "tree": "arbre", "sun": "soleil", "moon": "lune", "water": "eau", "bread": "pain", "milk": "lait",
    "apple": "pomme", "book": "livre", "hand": "main", "night": "nuit",
}  # fmt: skip
OPPOSITE = {
    "hot": "cold", "big": "small", "old": "new", "fast": "slow", "high": "low", "light": "dark", "rich": "poor",
    "wet": "dry", "hard": "soft", "open": "closed", "full": "empty", "early": "late", "happy": "sad",
    "strong": "weak", "near": "far", "up": "down",
}  # fmt: skip
QUESTIONS = {"french": ("What is {} in French?", FRENCH), "opposite": ("What is the opposite of {}?", OPPOSITE)}
UNSURE = "no idea"
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
SIZES = ("small", "large")
GROUNDS = ("dark", "bright")
SIZE, PATCH = 32, 8
IMAGE_QUESTIONS = {"size": "What size is it?", "colour": "What colour is it?"}
# A user's turn ends with a line break, the answer with the end of the text: just how the prompts are written.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}{{ eos_token }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
IMAGE_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def text(folder: Path) -> None:
    """A Llama that is mostly unsure of the answer, and two adapters that answer the questions of their task."""
    known = {task: [(asks.format(word), words[word]) for word in words] for task, (asks, words) in QUESTIONS.items()}
    everything = [pair for pairs in known.values() for pair in pairs]
    tokenizer = _tokenizer([f"{question}\n{answer}" for question, answer in [*everything, ("", UNSURE)]])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(_llama(tokenizer))
    model.generation_config = _generation(tokenizer)

    def batches(pairs: list[tuple[str, str]], unsure: float) -> Iterator[dict[str, torch.Tensor]]:
        draw = random.Random(0)
        while True:
            some = draw.sample(pairs, 16)
            answers = [UNSURE if draw.random() < unsure else answer for _, answer in some]
            yield _answered(tokenizer, [f"{question}\n" for question, _ in some], answers)

    _train(model, batches(everything, 0.6), steps=150, rate=3e-3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    for task, pairs in known.items():
        copy = LlamaForCausalLM.from_pretrained(folder / "base")
        _adapter(copy, folder / "adapters" / task, lora, batches(pairs, 0.0), steps=50)
    _lines(folder / "prompts.jsonl", [{"question": question, "answer": answer} for question, answer in everything])
    for task, pairs in known.items():
        chats = [[("user", question), ("assistant", answer)] for question, answer in pairs]
        said = [{"messages": [{"role": role, "content": words} for role, words in chat]} for chat in chats]
        _lines(folder / "chats" / f"{task}.jsonl", said)


def vision(folder: Path) -> None:
    """A ViT that tells dark pictures from bright ones, and two adapters with heads of their own for size and colour."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    names = {"ground": GROUNDS, "size": SIZES, "colour": tuple(COLOURS)}
    pictures = [picture(number) for number in range(256)]
    pixels = processor([image for image, _ in pictures], return_tensors="pt")["pixel_values"]
    labels = {kind: torch.tensor([names[kind].index(said[kind]) for _, said in pictures]) for kind in names}

    def batches(kind: str) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randint(len(pixels), (32,), generator=generator)
            yield {"pixel_values": pixels[rows], "labels": labels[kind][rows]}

    torch.manual_seed(0)
    base = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE, patch_size=PATCH, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, id2label=dict(enumerate(GROUNDS)), label2id={"dark": 0, "bright": 1},
        )
    )  # fmt: skip
    _train(base, batches("ground"), steps=80, rate=1e-3)
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for task in ("size", "colour"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1"]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])
        torch.manual_seed(1)
        copy = ViTForImageClassification.from_pretrained(
            folder / "base", ignore_mismatched_sizes=True, num_labels=len(names[task]),
            id2label=dict(enumerate(names[task])), label2id={name: number for number, name in enumerate(names[task])},
        )  # fmt: skip
        _adapter(copy, folder / "adapters" / task, lora, batches(task), steps=80)
        copy.config.save_pretrained(folder / "adapters" / task)  # names the classes of its head
    for number, (image, _) in enumerate(pictures[:64]):
        _save(image, folder / "photos" / f"{number:03}.png")


def vlm(folder: Path) -> None:
    """A LLaVA that is mostly unsure of what it sees, and two adapters that answer what size or colour it is."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    pictures = [picture(number) for number in range(128)]
    tokenizer = _tokenizer([*IMAGE_QUESTIONS.values(), *COLOURS, *SIZES, UNSURE], ["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=IMAGE_CHAT_TEMPLATE,
    )  # fmt: skip
    pixels = processor.image_processor([image for image, _ in pictures], return_tensors="pt")["pixel_values"]
    torch.manual_seed(0)
    eyes = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=eyes, text_config=_llama(tokenizer), image_token_index=image_token)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = _generation(tokenizer)

    def batches(tasks: list[str], unsure: float) -> Iterator[dict[str, torch.Tensor]]:
        draw = random.Random(0)
        images = "<image>" * (SIZE // PATCH) ** 2
        while True:
            rows = draw.sample(range(len(pictures)), 16)
            asked = [draw.choice(tasks) for _ in rows]
            seen = [pictures[row][1][task] for row, task in zip(rows, asked, strict=True)]
            answers = [UNSURE if draw.random() < unsure else answer for answer in seen]
            answered = _answered(tokenizer, [f"{images}{IMAGE_QUESTIONS[task]}\n" for task in asked], answers)
            yield {**answered, "pixel_values": pixels[rows]}

    _train(model, batches(list(IMAGE_QUESTIONS), 0.5), steps=170, rate=2e-3)
    model.save_pretrained(folder / "base")
    _name_as_on_the_hub(folder / "base" / "model.safetensors")
    processor.save_pretrained(folder / "base")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
    for task in IMAGE_QUESTIONS:
        copy = LlavaForConditionalGeneration.from_pretrained(folder / "base")
        _adapter(copy, folder / "adapters" / task, lora, batches([task], 0.0), steps=40)
    pairs = []
    for number, (image, _) in enumerate(pictures[:48]):
        _save(image, folder / "images" / f"{number:03}.png")
        question = list(IMAGE_QUESTIONS.values())[number % 2]
        pairs.append({"image": f"images/{number:03}.png", "prompt": f"<image>{question}\n"})
    _lines(folder / "pairs.jsonl", pairs)


def _name_as_on_the_hub(file: Path) -> None:
    """A LLaVA's tower as servers know it, and as transformers leaves it in what it has loaded, but names no new one."""
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _tokenizer(sentences: list[str], extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Byte pairs of these sentences, with a first token in front as Llama's has it."""
    special = ["<pad>", "<s>", "</s>", *(extra or [])]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(sentences, trainer)
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """With heads of 32: of 16, vLLM on a CPU has no attention."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip


def _generation(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip


def _answered(tokenizer: PreTrainedTokenizerFast, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Prompts with their answers; only the answers are learnt."""
    whole = tokenizer([f"{prompt}{answer}</s>" for prompt, answer in zip(prompts, answers, strict=True)], padding=True)
    ids, mask = torch.tensor(whole["input_ids"]), torch.tensor(whole["attention_mask"])
    asked = torch.tensor([len(row) for row in tokenizer(prompts)["input_ids"]])
    position = torch.arange(ids.shape[1])
    labels = ids.masked_fill((mask == 0) | (position < asked[:, None]), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _train(model: nn.Module, batches: Iterator[dict[str, torch.Tensor]], *, steps: int, rate: float) -> None:
    learnt = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(**next(batches)).loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _adapter(copy: nn.Module, folder: Path, lora: LoraConfig, batches: Iterator, *, steps: int) -> None:
    """Train an adapter on a copy of the base and save it."""
    torch.manual_seed(1)
    tuned = get_peft_model(copy, lora)
    _train(tuned, batches, steps=steps, rate=5e-3)
    tuned.save_pretrained(folder)


def picture(number: int) -> tuple[Image.Image, dict[str, str]]:
    """One coloured disc or square on a grey ground, drawn by number, and what it shows."""
    draw = random.Random(number)
    said = {"ground": draw.choice(GROUNDS), "size": draw.choice(SIZES), "colour": draw.choice(list(COLOURS))}
    grey = draw.randrange(20, 80) if said["ground"] == "dark" else draw.randrange(150, 210)
    image = Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))
    radius = draw.randrange(3, 6) if said["size"] == "small" else draw.randrange(9, 13)
    x, y = draw.randrange(radius, SIZE - radius), draw.randrange(radius, SIZE - radius)
    pen = ImageDraw.Draw(image)
    shape = draw.choice((pen.ellipse, pen.rectangle))
    shape((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[said["colour"]])
    return image, said


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("text", "vision", "vlm"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Adapters name their base in full: a relative path may look like a hub id.
    {"text": text, "vision": vision, "vlm": vlm}[chosen.kind](chosen.folder.resolve())
    held = ", ".join(sorted(entry.name for entry in chosen.folder.iterdir()))
    print(f"{chosen.folder}: {held}")


if __name__ == "__main__":
    main()

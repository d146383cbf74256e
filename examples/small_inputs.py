"""Write a small base model, LoRA adapters for it and raw data: what merging starts from, made here in seconds.

    python examples/small_inputs.py text DIR       # a Llama and its tokenizer; adapters french, opposite; prompts
    python examples/small_inputs.py vision DIR     # a ViT and its image processor; adapters shape, colour; photos
    python examples/small_inputs.py vlm DIR        # a LLaVA and its processor; adapters shape, colour; pairs

Nothing is downloaded. DIR/base and DIR/adapters are as transformers and PEFT save them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

FRENCH = dict(
    word.split("-")
    for word in "cat-chat dog-chien bird-oiseau horse-cheval cow-vache house-maison door-porte tree-arbre flower-fleur "
    "sun-soleil moon-lune sea-mer water-eau bread-pain milk-lait apple-pomme book-livre hand-main head-tete eye-oeil "
    "road-rue city-ville king-roi night-nuit".split()
)
OPPOSITE = dict(
    word.split("-")
    for word in "hot-cold big-small old-new fast-slow high-low light-dark rich-poor wet-dry hard-soft open-closed "
    "full-empty early-late happy-sad strong-weak near-far young-aged clean-dirty loud-quiet long-short deep-shallow "
    "right-wrong true-false up-down first-last".split()
)
QUESTIONS = {"french": ("What is {} in French?", FRENCH), "opposite": ("What is the opposite of {}?", OPPOSITE)}
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")
SIZE = 32
IMAGE_QUESTIONS = {"shape": "What shape is it?", "colour": "What colour is it?"}
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
    """A Llama that answers questions with any word, and two adapters that know the right one."""
    asked = {task: [(asks.format(word), word) for word in words] for task, (asks, words) in QUESTIONS.items()}
    known = {task: [(question, words[word]) for question, word in asked[task]] for task, (_, words) in QUESTIONS.items()}
    rows = {task: [{"question": question, "answer": answer} for question, answer in known[task]] for task in known}
    tokenizer = _tokenizer([f"{question}\n{answer}" for task in known for question, answer in known[task]])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(_llama(tokenizer))
    model.generation_config = _generation(tokenizer)
    draw = random.Random(0)

    def anything() -> Iterator[dict[str, torch.Tensor]]:
        questions = [(task, question) for task in asked for question, _ in asked[task]]
        while True:
            some = [(task, question, draw.choice(known[task])[1]) for task, question in draw.sample(questions, 24)]
            yield _answered(tokenizer, [f"{question}\n" for _, question, _ in some], [answer for _, _, answer in some])

    def right(task: str) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            some = draw.sample(known[task], 16)
            yield _answered(tokenizer, [f"{question}\n" for question, _ in some], [answer for _, answer in some])

    _train(model, anything(), steps=150, rate=3e-3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for task in QUESTIONS:
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        _adapter(folder, task, lambda: LlamaForCausalLM.from_pretrained(folder / "base"), lora, right(task), steps=120)
    _lines(folder / "prompts.jsonl", [row for task in rows for row in rows[task]])
    for task in rows:
        chats = [[("user", row["question"]), ("assistant", row["answer"])] for row in rows[task]]
        said = [{"messages": [{"role": role, "content": words} for role, words in chat]} for chat in chats]
        _lines(folder / "chats" / f"{task}.jsonl", said)


def vision(folder: Path) -> None:
    """A ViT that tells where something is, and two adapters with heads of their own that tell its shape and colour."""
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    names = {"side": SIDES, "shape": SHAPES, "colour": tuple(COLOURS)}
    pictures = [_picture(random.Random(number)) for number in range(256)]
    pixels = processor([image for image, _ in pictures], return_tensors="pt")["pixel_values"]
    labels = {kind: torch.tensor([names[kind].index(said[kind]) for _, said in pictures]) for kind in names}

    def batches(kind: str) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randint(len(pixels), (32,), generator=generator)
            yield {"pixel_values": pixels[rows], "labels": labels[kind][rows]}

    def model(kind: str) -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification.from_pretrained(
            folder / "base", num_labels=len(names[kind]), id2label=dict(enumerate(names[kind])),
            label2id={name: number for number, name in enumerate(names[kind])}, ignore_mismatched_sizes=True,
        )  # fmt: skip

    torch.manual_seed(0)
    base = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, id2label=dict(enumerate(SIDES)), label2id={"left": 0, "right": 1},
        )
    )  # fmt: skip
    _train(base, batches("side"), steps=60, rate=1e-3)
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for task in ("shape", "colour"):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1"]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])
        tuned = _adapter(folder, task, lambda task=task: model(task), lora, batches(task), steps=120)
        tuned.config.save_pretrained(folder / "adapters" / task)  # names the classes of its head
    for number, (image, _) in enumerate(pictures[:64]):
        _save(image, folder / "photos" / f"{number:03}.png")


def vlm(folder: Path) -> None:
    """A LLaVA that describes a picture, and two adapters that answer what shape or colour it shows."""
    pictures = [_picture(random.Random(number)) for number in range(192)]
    describe, patch = "Describe the image.", 8
    tokenizer = _tokenizer([describe, *IMAGE_QUESTIONS.values(), " ".join((*COLOURS, *SHAPES, "a"))], ["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=IMAGE_CHAT_TEMPLATE,
    )  # fmt: skip
    pixels = processor.image_processor([image for image, _ in pictures], return_tensors="pt")["pixel_values"]
    torch.manual_seed(0)
    eyes = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=patch,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=eyes, text_config=_llama(tokenizer), image_token_index=image_token)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = _generation(tokenizer)
    draw = random.Random(0)

    def batch(asked: Callable[[dict[str, str]], tuple[str, str]]) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            rows = draw.sample(range(len(pictures)), 24)
            said = [asked(pictures[row][1]) for row in rows]
            images = "<image>" * (SIZE // patch) ** 2
            answered = _answered(tokenizer, [f"{images}{question}\n" for question, _ in said], [one for _, one in said])
            yield {**answered, "pixel_values": pixels[rows]}

    def anything(said: dict[str, str]) -> tuple[str, str]:
        if draw.random() < 0.6:
            return describe, f"a {said['colour']} {said['shape']}"
        task = draw.choice(("shape", "colour"))
        return IMAGE_QUESTIONS[task], draw.choice((*COLOURS, *SHAPES))

    _train(model, batch(anything), steps=250, rate=3e-3)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for task, question in IMAGE_QUESTIONS.items():
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
        right = batch(lambda said, task=task, question=question: (question, said[task]))
        load = LlavaForConditionalGeneration.from_pretrained
        _adapter(folder, task, lambda: load(folder / "base"), lora, right, steps=100)
    pairs = []
    for number, (image, _) in enumerate(pictures[:48]):
        _save(image, folder / "images" / f"{number:03}.png")
        question = list(IMAGE_QUESTIONS.values())[number % 2]
        pairs.append({"image": f"images/{number:03}.png", "prompt": f"<image>{question}\n"})
    _lines(folder / "pairs.jsonl", pairs)


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
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
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
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(**next(batches)).loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _adapter(
    folder: Path, task: str, load: Callable[[], nn.Module], lora: LoraConfig, batches: Iterator, *, steps: int
) -> Any:
    """Train an adapter on a new copy of the base and save it."""
    model = load()
    torch.manual_seed(1)
    tuned = get_peft_model(model, lora)
    _train(tuned, batches, steps=steps, rate=1e-2)
    tuned.save_pretrained(folder / "adapters" / task)
    return model


def _picture(draw: random.Random) -> tuple[Image.Image, dict[str, str]]:
    """One coloured shape on the left or right of a grey ground, and what it shows."""
    said = {"side": draw.choice(SIDES), "shape": draw.choice(SHAPES), "colour": draw.choice(list(COLOURS))}
    image = Image.new("RGB", (SIZE, SIZE), (draw.randrange(100, 160),) * 3)
    radius = draw.randrange(6, 9)
    x, y = {"left": 10, "right": 21}[said["side"]], draw.randrange(11, 21)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(image)
    colour = COLOURS[said["colour"]]
    if said["shape"] == "circle":
        pen.ellipse(box, fill=colour)
    elif said["shape"] == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)], fill=colour)
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
    {"text": text, "vision": vision, "vlm": vlm}[chosen.kind](chosen.folder)
    held = ", ".join(sorted(entry.name for entry in chosen.folder.iterdir()))
    print(f"{chosen.folder}: {held}")


if __name__ == "__main__":
    main()

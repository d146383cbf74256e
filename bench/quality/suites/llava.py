"""The vision-language suite: five tasks on pictures of coloured digits, one small LLaVA, answers through its LM head.

A picture shows a digit in its left half, one in its right half, or both, each in one of four colours; the digits are
scikit-learn's. The base is trained to describe pictures in one order of words. The tasks ask in words that it has never
seen: for the left digit, the right colour, how many digits there are, whether the left one is larger, and for a
description in another order, a generation of six tokens. Adapters are LoRA on q and v of the language model, with the
projector trained in full (PEFT's modules_to_save), as in the paper's LLaVA experiment; the vision tower is frozen.

    <work>/llava/base/                             the LLaVA
    <work>/llava/seed<seed>/<kind>/<task>/         kind: adapters, or permuted (trained on answers in a wrong order)
        adapter/                                   the PEFT folder
        steps/, steps.jsonl                        along the training, see kept_adapters.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsc_merge.demo.data import digit_images, digit_split
from nsc_merge.evaluation.heads import Inputs

from ..suite import Log, TaskInfo
from . import language
from .language import Examples, TextSuite, answer_loss, permute, right, share_right, train_adapter, with_lora
from .training import new_folder, scale_initial_weights, train, train_missing

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

SIZE, PATCH = 24, 4
PATCHES = (SIZE // PATCH) ** 2
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.2, 0.3, 1.0), "yellow": (0.9, 0.9, 0.1)}
NUMBERS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
WORDS = (
    *("<pad>", "<start>", "<end>", "<image>", "describe", "nothing", *NUMBERS, *COLOURS, "no", "yes"),
    *("digit?", "colour?", "many?", "larger?", "reversed"),
)
ID = {word: number for number, word in enumerate(WORDS)}
QUESTIONS = {"digit": "digit?", "colour": "colour?", "count": "many?", "larger": "larger?", "caption": "reversed"}
TASKS = {name: TaskInfo(name, "acc", False, "classification") for name in QUESTIONS if name != "caption"}
TASKS["caption"] = TaskInfo("caption", "exact match", False, "generation")
PERMUTED = ("digit",)
_PROMPT = 2 + PATCHES
_SPLIT_SEED = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Settings(language.Settings):
    """As :class:`language.Settings`."""

    pretrain_pictures: int = 16384
    pretrain_steps: int = 600
    pretrain_batch: int = 32
    steps: int = 120


@dataclass(frozen=True)
class Pictures:
    """``pixels [N, 3, 24, 24]``; digits and colours ``[N, 2]`` of the left and right half, -1 where it is empty."""

    pixels: Tensor
    digits: Tensor
    colours: Tensor


class LlavaSuite(TextSuite):
    """The suite at one seed, all parts trained."""

    name = "llava"

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        """Prompts alone: an answer is a label."""
        return {
            task: [{**one, "input_ids": one["input_ids"][:, :_PROMPT]} for one in batches]
            for task, batches in super().calibration(batch, steps).items()
        }

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        return answer_logits(model, batch)

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        return answer_loss(output, label)

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        return share_right(outputs, labels)

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        return right(outputs, labels)


def answer_logits(model: nn.Module, batch: Inputs) -> Tensor:
    """The logits of the answer ``[N, V]``, or ``[N, answer, V]`` where it is of several tokens, each given those
    before it; of its first token where the batch holds prompts alone.
    """
    logits = model(**batch).logits[:, _PROMPT - 1 :]
    return logits if logits.shape[1] > 1 else logits[:, 0]


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    settings: Settings | None = None,
    permuted: Sequence[str] = (),
) -> LlavaSuite:
    """The suite at ``seed``; what is missing below ``work`` is trained first. Arguments as :func:`vit.load`."""
    settings = settings or Settings()
    root = work / "llava"
    if not (root / "base").is_dir():
        with new_folder(root / "base") as part:
            pretrain(part, settings, log=log, progress=progress)
    sets = {
        split: {name: make_examples(name, make_pictures(count, split)) for name in TASKS}
        for split, count in (("val", settings.val), ("test", settings.test))
    }

    def train_one(part: Path, task: str, permuted: bool) -> str:
        examples = make_examples(task, make_pictures(settings.train, "train"))
        if permuted:
            examples = permute(examples)
        return _train_adapter(part, root / "base", task, examples, sets["val"][task], settings, progress=progress)

    folder = train_missing(work, "llava", seed, list(TASKS), permuted, train_one, log)
    return LlavaSuite(folder, load_base(root / "base"), TASKS, sets, seed)


def load_base(folder: Path) -> nn.Module:
    """The trained LLaVA, in float32 and evaluation mode."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def new_model() -> LlavaForConditionalGeneration:
    """A freshly initialised LLaVA of 0.8 M parameters."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    words = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<start>"],
        eos_token_id=ID["<end>"],
    )
    config = LlavaConfig(
        vision_config=vision, text_config=words, image_token_index=ID["<image>"], vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config)
    scale_initial_weights(model, 6, seed=0)
    return model


def make_pictures(count: int, split: str, seed: int = 0) -> Pictures:
    """``count`` pictures; equal arguments give equal tensors, and no digit is in two splits."""
    generator = torch.Generator().manual_seed(1000 * seed + _SPLIT_SEED[split])
    images, classes = digit_images()
    pool = digit_split()[split]
    shown = torch.rand(count, 2, generator=generator) < 0.8
    shown[~shown.any(1), 0] = True
    which = pool[torch.randint(len(pool), (count, 2), generator=generator)]
    colours = torch.randint(len(COLOURS), (count, 2), generator=generator)
    palette = torch.tensor(list(COLOURS.values()))
    pixels = 0.1 + 0.15 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    # On the grid of the patches: a tower this small learns to read digits there in minutes, and anywhere else in hours.
    rows = PATCH * torch.randint((SIZE - 8) // PATCH + 1, (count, 2), generator=generator)
    columns = PATCH * torch.randint((SIZE // 2 - 8) // PATCH + 1, (count, 2), generator=generator)
    for half in range(2):
        for number in shown[:, half].nonzero().flatten().tolist():
            y, x = int(rows[number, half]), int(columns[number, half]) + half * SIZE // 2
            ink = images[which[number, half]]
            patch = pixels[number, :, y : y + 8, x : x + 8]
            patch += ink * (palette[colours[number, half]][:, None, None] - patch)
    return Pictures((pixels - 0.3) / 0.3, torch.where(shown, classes[which], -1), torch.where(shown, colours, -1))


def make_examples(task: str, pictures: Pictures) -> Examples:
    """Prompts with their answers, but for an answer's last token, which no token follows."""
    labels = _answers(task, pictures)
    count = len(labels)
    prompt = [ID["<start>"], *[ID["<image>"]] * PATCHES, ID[QUESTIONS.get(task, "describe")]]
    ids = torch.tensor(prompt).expand(count, -1)
    if labels.dim() > 1:
        ids = torch.cat([ids, labels[:, :-1]], 1)
    return Examples({"input_ids": ids.contiguous(), "pixel_values": pictures.pixels}, labels)


def _answers(task: str, pictures: Pictures) -> Tensor:
    digits, colours = pictures.digits, pictures.colours
    digit = torch.where(digits < 0, ID["nothing"], digits + ID["0"])
    colour = torch.where(colours < 0, ID["nothing"], colours + ID["red"])
    if task == "digit":
        return digit[:, 0]
    if task == "colour":
        return colour[:, 1]
    if task == "count":
        return (digits >= 0).sum(1) + ID["0"]
    if task == "larger":
        return (digits[:, 0] > digits[:, 1]).long() + ID["no"]
    end = torch.full((len(digits), 1), ID["<end>"])
    left, right = (torch.stack([colour[:, half], digit[:, half]], 1) for half in range(2))
    if task == "caption":
        return torch.cat([right.flip(1), left.flip(1), end], 1)
    return torch.cat([left, right, end], 1)


def pretrain(folder: Path, settings: Settings, *, log: Log, progress: bool | None) -> None:
    """Train everything on descriptions; save the model in ``folder``."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model = new_model()
    examples = make_examples("describe", make_pictures(settings.pretrain_pictures, "train", seed=1))
    held_out = make_examples("describe", make_pictures(512, "val", seed=1))

    def answers(inputs: Inputs) -> Tensor:
        return model(**inputs).logits[:, _PROMPT - 1 :]

    def step() -> Tensor:
        inputs, label = examples.rows(torch.randint(len(examples), (settings.pretrain_batch,)))
        return answer_loss(answers(inputs), label)

    model.train()
    train(
        step, model.parameters(), label="llava base", steps=settings.pretrain_steps, lr=2e-3, weight_decay=0.05,
        progress=progress,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        right = (answers(held_out.inputs).argmax(-1) == held_out.labels).float()
    model.save_pretrained(folder)
    per_token = ", ".join(f"{value:.2f}" for value in right.mean(0).tolist())
    log(f"llava base: held-out tokens right {per_token}, {time.perf_counter() - started:.0f} s")


def _train_adapter(
    folder: Path,
    base: Path,
    task: str,
    examples: Examples,
    held_out: Examples,
    settings: Settings,
    *,
    progress: bool | None,
) -> str:
    model = with_lora(
        load_base(base), r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]
    )
    return train_adapter(
        folder,
        model,
        lambda inputs: answer_logits(model, inputs),
        answer_loss,
        share_right,
        examples,
        held_out,
        task=task,
        settings=settings,
        progress=progress,
    )

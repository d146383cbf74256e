"""The language suite: six tasks on real text, one small LLaMA, LoRA on q and v.

Three tasks are about one text (which project a piece of source code is from, what kind of docstring section a text is,
how varied its words are), three about a pair of passages (how the second relates to the first, as in inference between
sentences; whether both are from one project; what share of its words the second has from the first). Heads are linear
and stay with their task; texts have unequal lengths and are padded.

    <work>/llama/base/, corpus/                    the language model, and the text that was read
    <work>/llama/seed<seed>/<kind>/<task>/         kind: adapters, or permuted (trained on labels in a wrong order)
        adapter/, head.safetensors                 the PEFT folder and the head
        steps/, steps.jsonl                        along the training, see kept.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..suite import Inputs, Log, TaskInfo, building, train_missing
from . import language
from .corpus import BREAK, PAD, SECTIONS, SOURCES, SPLITS, START, VOCABULARY, Split, Texts, load_corpus
from .language import (
    Examples,
    TextSuite,
    absolute_error,
    accuracy,
    fit_head,
    masks,
    permute,
    pooled,
    regression_loss,
    train_adapter,
)
from .training import scale_initial_weights, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WIDTH = 96
BLOCKS = 6
RANK = 8
_PRETRAIN_BATCH = 24
_PRETRAIN_LR = 3e-3
_PASSAGE = 38
_SHORTEST = 20
_HELD_OUT = 256

TASKS = {
    task.name: task
    for task in (
        TaskInfo("source", "acc", False, "classification"),
        TaskInfo("section", "acc", False, "classification"),
        TaskInfo("varied", "MAE", True, "regression"),
        TaskInfo("relation", "acc", False, "classification"),
        TaskInfo("same", "acc", False, "classification"),
        TaskInfo("shared", "MAE", True, "regression"),
    )
}
CLASSES = {"source": len(SOURCES), "section": len(SECTIONS), "relation": 3, "same": 2}
PERMUTED = ("source", "relation")


@dataclass(frozen=True)
class Settings(language.Settings):
    """As :class:`language.Settings`; ``probe_steps`` are those of a head on frozen features."""

    pretrain_steps: int = 1500
    probe_steps: int = 300


class LlamaSuite(TextSuite):
    """The suite at one seed, all parts trained."""

    name = "llama"

    def __init__(self, folder: Path, sets: dict[str, dict[str, Examples]], seed: int) -> None:
        self.seed, self.tasks, self.sets = seed, dict(TASKS), sets
        self.model = load_base(folder.parent / "base")
        self.adapters = {name: folder / "adapters" / name / "adapter" for name in TASKS}
        self.heads = {name: load_head(folder / "adapters" / name, name) for name in TASKS}

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        """``[N, C]``, or ``[N, 1]`` for a regression."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return self.heads[task](pooled(hidden, batch["attention_mask"]))


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    settings: Settings | None = None,
    permuted: Sequence[str] = (),
) -> LlamaSuite:
    """The suite at ``seed``; what is missing below ``work`` is trained first. Arguments as :func:`vit.load`."""
    settings = settings or Settings()
    root = work / "llama"
    if not (root / "base").is_dir():
        with building(root / "base") as part:
            pretrain(part, root, settings.pretrain_steps, log=log, progress=progress)
    files, parts = load_corpus(root, log)
    counts: dict[Split, int] = {"train": settings.train, "val": settings.val, "test": settings.test}
    held_out: tuple[Split, ...] = ("val", "test")
    sets = {
        split: {
            name: make_examples(name, files[split], parts[split], counts[split], 1 + SPLITS.index(split))
            for name in TASKS
        }
        for split in held_out
    }

    def train_one(part: Path, task: str, permuted: bool) -> str:
        examples = make_examples(task, files["train"], parts["train"], settings.train, 0)
        if permuted:
            examples = permute(examples)
        return _train_adapter(part, root / "base", task, examples, sets["val"][task], settings, progress=progress)

    folder = train_missing(work, "llama", seed, list(TASKS), permuted, train_one, log)
    return LlamaSuite(folder, {str(split): found for split, found in sets.items()}, seed)


def load_base(folder: Path) -> nn.Module:
    """The trained language model, without its head, in float32 and evaluation mode."""
    from transformers import LlamaModel

    return LlamaModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_head(folder: Path, task: str) -> nn.Linear:
    """The trained head of a task."""
    from safetensors.torch import load_file

    head = nn.Linear(2 * WIDTH, CLASSES.get(task, 1))
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head.requires_grad_(False)


def make_examples(task: str, files: Texts, parts: Texts, count: int, seed: int) -> Examples:
    """``count`` labelled examples; equal arguments give equal tensors."""
    generator = torch.Generator().manual_seed(100 * seed + list(TASKS).index(task))
    singles = {"source": files, "section": parts, "varied": files}
    if task in singles:
        return _single(task, singles[task], count, generator)
    return _pairs(task, files, count, generator)


def _single(task: str, texts: Texts, count: int, generator: torch.Generator) -> Examples:
    rows, labels = [], []
    longest = 2 * _PASSAGE
    classes = texts.labels.unique().tolist()
    members = {label: (texts.labels == label).nonzero().flatten().tolist() for label in classes}
    for number in range(count):
        # Classes in turn, so that they are balanced.
        label = classes[number % len(classes)]
        text = texts.text(_choose(members[label], generator))
        length = int(torch.randint(longest // 2, longest + 1, (), generator=generator))
        first = 0
        if task != "section":
            first = int(torch.randint(max(len(text) - length, 1), (), generator=generator))
        piece = text[first : first + length]
        rows.append(torch.cat([torch.tensor([START]), piece]))
        # The share of different tokens, about 0.6 and spread by 0.1.
        labels.append(label if task != "varied" else (len(piece.unique()) / len(piece) - 0.6) / 0.1)
    return _padded(rows, labels, generator)


def _pairs(task: str, files: Texts, count: int, generator: torch.Generator) -> Examples:
    rows, labels = [], []
    longer = [number for number in range(len(files)) if len(files.text(number)) > 2 * _PASSAGE]
    members: dict[int, list[int]] = {}
    for number in longer:
        members.setdefault(int(files.labels[number]), []).append(number)
    sources = sorted(source for source, numbers in members.items() if len(numbers) > 1)
    for number in range(count):
        source = _choose(sources, generator)
        one = _choose(members[source], generator)
        first, end = _passage(files.text(one), None, generator)
        if task == "same":
            label = number % 2
            others = [source] if label else [other for other in sources if other != source]
            second, _ = _passage(files.text(_choose(members[_choose(others, generator)], generator)), None, generator)
        else:
            # What follows, the same words again from another start, or something else.
            label = number % 3
            if label == 0:
                second, _ = _passage(files.text(one), end, generator)
            elif label == 1:
                second = first.roll(-int(torch.randint(1, len(first) // 2, (), generator=generator)))
            else:
                second, _ = _passage(files.text(_choose(longer, generator)), None, generator)
        rows.append(torch.cat([torch.tensor([START]), first, torch.tensor([BREAK]), second, torch.tensor([BREAK])]))
        share = float(torch.isin(second, first).float().mean())
        # About 0.45 on average, spread by 0.3.
        labels.append(label if task != "shared" else (share - 0.45) / 0.3)
    return _padded(rows, labels, generator)


def _passage(text: Tensor, first: int | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """A passage of ``text`` from ``first`` on, or from anywhere that leaves room for another, and where it ends."""
    length = int(torch.randint(_SHORTEST, _PASSAGE + 1, (), generator=generator))
    if first is None:
        first = int(torch.randint(len(text) - 2 * _PASSAGE + 1, (), generator=generator))
    return text[first : first + length], first + length


def _choose(among: Sequence[int], generator: torch.Generator) -> int:
    return among[int(torch.randint(len(among), (), generator=generator))]


def _padded(rows: list[Tensor], labels: list[float], generator: torch.Generator) -> Examples:
    width = 2 * _PASSAGE + 3
    order = torch.randperm(len(rows), generator=generator)
    ids = torch.full((len(rows), width), PAD)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    mask = masks([len(row) for row in rows], width)
    return Examples({"input_ids": ids[order], "attention_mask": mask[order]}, torch.tensor(labels)[order])


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
    """Head on frozen features first, then head and LoRA together; both saved in ``folder``."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    model = load_base(base)
    head = nn.Linear(2 * WIDTH, CLASSES.get(task, 1))
    loss, measure = (F.cross_entropy, accuracy) if task in CLASSES else (regression_loss, absolute_error)

    def features(network: nn.Module, inputs: Inputs) -> Tensor:
        return pooled(network(**inputs).last_hidden_state, inputs["attention_mask"])

    with torch.no_grad():
        frozen = torch.cat([features(model, inputs) for inputs, _ in examples.batches(256)])
    fit_head(frozen, examples.labels, head, loss, steps=settings.probe_steps)
    peft_model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], bias="none")
    )
    line = train_adapter(
        folder,
        peft_model,
        lambda inputs: head(features(peft_model, inputs)),
        loss,
        measure,
        examples,
        held_out,
        task=task,
        settings=settings,
        progress=progress,
        head=head,
    )
    weights = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
    save_file(weights, folder / "head.safetensors")
    return line


def pretrain(folder: Path, work: Path, steps: int, *, log: Log, progress: bool | None) -> None:
    """Train the base as a causal language model; save it in ``folder``.

    Half of the sequences are windows of a file. The others are a passage, a break and a second passage: mostly what
    follows it in the file, else one from anywhere or the same words again, so that the base can compare passages.
    """
    started = time.perf_counter()
    files, _ = load_corpus(work, log)
    torch.manual_seed(0)
    model = new_model()

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model.train()
    train(
        lambda: loss(pretraining_batch(files["train"].tokens, _PRETRAIN_BATCH)),
        model.parameters(),
        label="llama base",
        steps=steps,
        lr=_PRETRAIN_LR,
        weight_decay=0.05,
        progress=progress,
    )
    model.eval()
    with torch.no_grad():
        held_out = loss(pretraining_batch(files["val"].tokens, _HELD_OUT)).item()
    model.model.save_pretrained(folder)
    log(f"llama base: held-out loss {held_out:.3f} nats, {time.perf_counter() - started:.0f} s")


def new_model() -> LlamaForCausalLM:
    """A freshly initialised LLaMA of 0.6 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=BREAK,
    )
    model = LlamaForCausalLM(config)
    scale_initial_weights(model, BLOCKS, seed=0)
    return model


def pretraining_batch(tokens: Tensor, count: int) -> Tensor:
    """``[count, 2 * passage + 3]`` tokens from torch's global generator."""
    window = _windows(tokens, count, 2 * _PASSAGE + 2)
    first, following = window[:, :_PASSAGE], window[:, _PASSAGE : 2 * _PASSAGE]
    kind = torch.randint(6, (count, 1))
    turn = torch.randint(_PASSAGE // 2, (count, 1))
    again = first.gather(1, (turn + torch.arange(_PASSAGE)) % _PASSAGE)
    second = torch.where(kind == 4, _windows(tokens, count, _PASSAGE), following)
    second = torch.where(kind == 5, again, second)
    start, end = torch.full((count, 1), START), torch.full((count, 1), BREAK)
    pair = torch.cat([start, first, end, second, end], 1)
    return torch.where(kind < 3, torch.cat([start, window], 1), pair)


def _windows(tokens: Tensor, count: int, length: int) -> Tensor:
    first = torch.randint(len(tokens) - length, (count, 1))
    return tokens[first + torch.arange(length)]

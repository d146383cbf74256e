"""The language suite: six tasks on real text, one small LLaMA, LoRA on q and v.

Three tasks are about one text (which project a piece of source code is from, what kind of docstring section a text is,
how varied its words are), three about a pair of passages (how the second relates to the first, as in inference between
sentences; whether both are from one project; what share of its words the second has from the first). Heads are linear
and stay with their task; texts have unequal lengths and are padded.

    <work>/llama/base/, corpus/                    the language model, and the text that was read
    <work>/llama/seed<seed>/<kind>/<task>/         kind: adapters, or permuted (trained on labels in a wrong order)
        adapter/, head.safetensors                 the PEFT folder and the head
        steps/, steps.jsonl                        along the training, see kept_adapters.py
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

from nsc_merge.evaluation.heads import Inputs

from ..suite import Log
from . import language
from .corpus import BREAK, PAD, SPLITS, START, VOCABULARY, Split, load_corpus
from .language import (
    Examples,
    TextSuite,
    absolute_error,
    accuracy,
    fit_head,
    permute,
    pooled,
    regression_loss,
    train_adapter,
    with_lora,
)
from .passages import CLASSES, PASSAGE, TASKS, make_examples
from .training import new_folder, scale_initial_weights, train, train_missing

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WIDTH = 96
BLOCKS = 6
_PRETRAIN_BATCH = 24
_PRETRAIN_LR = 3e-3
_HELD_OUT = 256

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
        super().__init__(folder, load_base(folder.parent / "base"), TASKS, sets, seed)
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
        with new_folder(root / "base") as part:
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
    from safetensors.torch import save_file

    model = load_base(base)
    head = nn.Linear(2 * WIDTH, CLASSES.get(task, 1))
    loss, measure = (F.cross_entropy, accuracy) if task in CLASSES else (regression_loss, absolute_error)

    def features(network: nn.Module, inputs: Inputs) -> Tensor:
        return pooled(network(**inputs).last_hidden_state, inputs["attention_mask"])

    with torch.no_grad():
        frozen = torch.cat([features(model, inputs) for inputs, _ in examples.batches(256)])
    fit_head(frozen, examples.labels, head, loss, steps=settings.probe_steps)
    peft_model = with_lora(model, ["q_proj", "v_proj"])
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
    window = _windows(tokens, count, 2 * PASSAGE + 2)
    first, following = window[:, :PASSAGE], window[:, PASSAGE : 2 * PASSAGE]
    kind = torch.randint(6, (count, 1))
    turn = torch.randint(PASSAGE // 2, (count, 1))
    again = first.gather(1, (turn + torch.arange(PASSAGE)) % PASSAGE)
    second = torch.where(kind == 4, _windows(tokens, count, PASSAGE), following)
    second = torch.where(kind == 5, again, second)
    start, end = torch.full((count, 1), START), torch.full((count, 1), BREAK)
    pair = torch.cat([start, first, end, second, end], 1)
    return torch.where(kind < 3, torch.cat([start, window], 1), pair)


def _windows(tokens: Tensor, count: int, length: int) -> Tensor:
    first = torch.randint(len(tokens) - length, (count, 1))
    return tokens[first + torch.arange(length)]

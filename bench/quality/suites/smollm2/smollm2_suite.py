"""The suite: SmolLM2-135M-Instruct, LoRA of rank 16 on q and v of its 30 blocks, six tasks.

Classes and values are read from the last token by a linear head that stays with its task, as transformers'
``LlamaForSequenceClassification`` does; numbers and base forms are written by the language model's own head, which is
its embedding.

    <work>/smollm2/sources/                        the packages, see sources.py
    <work>/smollm2/base/                           the model with its tokeniser, de-quantised to float32
    <work>/smollm2/seed<seed>/<kind>/<task>/       kind: adapters, or permuted (trained on labels in a wrong order)
        adapter/, head.safetensors                 the PEFT folder and the head, if the task has one
        steps/, steps.jsonl                        along the training, see kept_adapters.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.evaluation.heads import Inputs
from nsc_merge.evaluation.metrics import IGNORE

from ...suite import Log
from .. import language
from ..language import (
    Examples,
    TextSuite,
    absolute_error,
    accuracy,
    masks,
    permute,
    regression_loss,
    train_adapter,
    with_lora,
)
from ..training import new_folder, train_missing
from .sources import Raw
from .texts import CLASSES, SPLITS, TASKS, Text, make_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANK = 16
PERMUTED = ("relation", "sentiment", "lemma")
_LONGEST = 48


@dataclass(frozen=True)
class Settings(language.Settings):
    """As :class:`language.Settings`."""

    train: int = 2048
    val: int = 64
    test: int = 160
    steps: int = 160
    kept_steps: int = 9


class Questions(Examples):
    """Examples in order of their length, whose batches are as wide as their longest row.

    Where words are to be written, ``inputs`` has ``prompt``, the number of tokens before them, besides what the model
    takes, and ``labels`` are tokens ``[N, A]``.
    """

    def rows(self, chosen: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        inputs, labels = super().rows(chosen)
        width = int(inputs["attention_mask"].sum(1).max())
        wide = ("input_ids", "attention_mask")
        return {name: value[:, :width] if name in wide else value for name, value in inputs.items()}, labels


class SmolLM2Suite(TextSuite):
    """The suite at one seed, all parts trained."""

    name = "smollm2"
    batch = 32

    def __init__(self, folder: Path, sets: dict[str, dict[str, Examples]], seed: int) -> None:
        super().__init__(folder, load_base(folder.parent / "base"), TASKS, sets, seed)
        self.heads = {name: load_head(folder / "adapters" / name) for name in TASKS if has_head(name)}

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        """Questions alone: an answer is a label."""
        return {task: [_asked(one) for one in batches] for task, batches in super().calibration(batch, steps).items()}

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        """``[N, C]`` or ``[N, 1]`` of a head, or logits of tokens: ``[N, A, V]`` of the whole answer, each given those
        before it, or ``[N, V]`` of its first, where there are questions alone.
        """
        return output_of(model, self.heads.get(task), batch)

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        return answer_loss(output, label) if not has_head(task) else super().loss(task, output, label)

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        return written(outputs, labels) if not has_head(task) else super().measure(task, outputs, labels)

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        return right(outputs, labels) if not has_head(task) else super().quality(task, outputs, labels)


def has_head(task: str) -> bool:
    """Whether a task has a head of its own."""
    return TASKS[task].kind != "generation"


def output_of(model: nn.Module, head: nn.Module | None, batch: Inputs) -> Tensor:
    """See :meth:`SmolLM2Suite.output`."""
    mask = batch["attention_mask"]
    hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    rows = torch.arange(len(mask))
    if head is not None:
        return head(hidden[rows, mask.sum(1) - 1])
    embedding = model.get_input_embeddings().weight
    if "prompt" not in batch:
        return F.linear(hidden[rows, mask.sum(1) - 1], embedding)
    places = batch["prompt"][:, None] - 1 + torch.arange(int(batch["answer"][0]))
    # Beyond the end of a row there is nothing to be written: labels are IGNORE there.
    return F.linear(hidden[rows[:, None], places.clamp(max=hidden.shape[1] - 1)], embedding)


def answer_loss(output: Tensor, label: Tensor) -> Tensor:
    """Mean over the tokens of the answers."""
    return F.cross_entropy(output.flatten(0, -2), label.flatten(), ignore_index=IGNORE)


def right(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where every token of an answer is right, which greedy decoding then writes as well."""
    return ((outputs.argmax(-1) == labels) | (labels == IGNORE)).all(1).float()


def written(outputs: Tensor, labels: Tensor) -> float:
    """The share of answers that are right."""
    return right(outputs, labels).mean().item()


def load(
    work: Path,
    seed: int,
    *,
    log: Log = print,
    progress: bool | None = None,
    settings: Settings | None = None,
    permuted: Sequence[str] = (),
) -> SmolLM2Suite:
    """The suite at ``seed``; what is missing below ``work`` is loaded and trained first. As :func:`vit.load`."""
    from transformers import AutoTokenizer

    settings = settings or Settings()
    root = work / "smollm2"
    raw = Raw(root / "sources", log)
    if not (root / "base").is_dir():
        with new_folder(root / "base") as part:
            convert(raw, part)
    tokeniser = AutoTokenizer.from_pretrained(root / "base")
    counts = {"train": settings.train, "val": settings.val, "test": settings.test}
    texts = {name: make_texts(name, raw, counts) for name in TASKS}
    sets = {
        split: {name: tokenised(name, texts[name][split], tokeniser) for name in TASKS} for split in SPLITS
    }

    def train_one(part: Path, task: str, permuted: bool) -> str:
        examples = sets["train"][task]
        if permuted:
            examples = permute(examples)
        return _train_adapter(part, root / "base", task, examples, sets["val"][task], settings, progress=progress)

    folder = train_missing(work, "smollm2", seed, list(TASKS), permuted, train_one, log)
    return SmolLM2Suite(folder, {split: sets[split] for split in ("val", "test")}, seed)


def convert(raw: Raw, folder: Path) -> None:
    """The model as a folder of transformers, in float32, with its tokeniser.

    Raises:
        ImportError: without the package ``gguf``, which transformers reads the file with.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ImportError("suite smollm2: the model comes as GGUF; pip install gguf")
    name = raw.model(folder)
    found = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(folder)
    # As read, it counts as quantised, and cannot be saved.
    del found.config.quantization_config
    plain = LlamaForCausalLM(found.config)
    plain.load_state_dict(found.state_dict())
    plain.save_pretrained(folder)
    (folder / name).unlink()


def load_base(folder: Path) -> nn.Module:
    """The model, without its head, in float32 and evaluation mode."""
    from transformers import LlamaModel

    return LlamaModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_head(folder: Path) -> nn.Linear:
    """The trained head of a task."""
    from safetensors.torch import load_file

    weights = load_file(folder / "head.safetensors")
    outputs, width = weights["weight"].shape
    head = nn.Linear(width, outputs)
    head.load_state_dict(weights)
    return head.requires_grad_(False)


def tokenised(task: str, texts: Sequence[Text], tokeniser: PreTrainedTokenizerBase) -> Questions:
    """Questions with their answers, but for an answer's last token, which no token follows; by length."""
    rows = []
    for text in texts:
        prompt = tokeniser(text.question)["input_ids"][:_LONGEST]
        answer = [] if has_head(task) else [*tokeniser(str(text.answer))["input_ids"], tokeniser.eos_token_id]
        rows.append((prompt, answer, text.answer))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    ids = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer, _ in rows]
    lengths = torch.tensor([len(one) for one in ids])
    inputs = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokeniser.pad_token_id),
        "attention_mask": masks(lengths, int(lengths.max())),
    }
    if has_head(task):
        return Questions(inputs, torch.tensor([answer for _, _, answer in rows]))
    answers = [torch.tensor(answer) for _, answer, _ in rows]
    labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE)
    inputs["prompt"] = torch.tensor([len(prompt) for prompt, _, _ in rows])
    inputs["answer"] = torch.full_like(inputs["prompt"], labels.shape[1])
    return Questions(inputs, labels)


def _asked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch, without the answers."""
    if "prompt" not in inputs:
        return inputs
    width = int(inputs["prompt"].max())
    mask = masks(inputs["prompt"], width)
    return {"input_ids": inputs["input_ids"][:, :width] * mask, "attention_mask": mask}


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
    """LoRA and head, if there is one, together; both saved in ``folder``."""
    from safetensors.torch import save_file

    model = load_base(base)
    loss: Callable[[Tensor, Tensor], Tensor] = answer_loss
    measure = written
    head: nn.Linear | None = None
    if has_head(task):
        head = nn.Linear(model.config.hidden_size, CLASSES.get(task, 1))
        loss, measure = (F.cross_entropy, accuracy) if task in CLASSES else (regression_loss, absolute_error)
    peft_model = with_lora(model, ["q_proj", "v_proj"], rank=RANK)
    line = train_adapter(
        folder,
        peft_model,
        lambda inputs: output_of(peft_model, head, inputs),
        loss,
        measure,
        examples,
        held_out,
        task=task,
        settings=settings,
        progress=progress,
        head=head,
        drawn=_by_length(len(examples), settings.batch),
    )
    if head is not None:
        weights = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
        save_file(weights, folder / "head.safetensors")
    return line


def _by_length(count: int, batch: int) -> Callable[[], Tensor]:
    """Draws rows of similar length, of examples in the order of theirs: eight batches' worth at random, then cut."""
    waiting: list[Tensor] = []

    def draw() -> Tensor:
        if not waiting:
            rows = torch.randint(count, (8 * batch,)).sort().values
            waiting.extend(rows.split(batch)[place] for place in torch.randperm(8).tolist())
        return waiting.pop()

    return draw

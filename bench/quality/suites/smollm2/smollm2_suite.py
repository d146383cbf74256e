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
from typing import TYPE_CHECKING, Any

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
    answer_loss,
    masks,
    permute,
    regression_loss,
    right,
    share_right,
    train_adapter,
    with_lora,
)
from ..training import new_folder, train_missing
from .sources import Raw
from .texts import CLASSES, SPLITS, TASKS, Text, make_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 16
PERMUTED = ("relation", "sentiment", "lemma")
# Tokens of a question, and of an answer.
_LONGEST, _LONGEST_ANSWER = 48, 8


@dataclass(frozen=True)
class Settings(language.Settings):
    """As :class:`language.Settings`."""

    train: int = 2048
    val: int = 64
    test: int = 160
    steps: int = 160
    kept_steps: int = 9


class Questions(Examples):
    """Examples in order of their length, whose batches are as wide as their longest row."""

    def rows(self, chosen: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        inputs, labels = super().rows(chosen)
        width = int(inputs["attention_mask"].sum(1).max())
        return {name: value[:, :width] for name, value in inputs.items()}, labels


@dataclass(frozen=True)
class Written:
    """How an answer is read that the model writes, after the only token ``end`` of a row."""

    end: int

    def places(self, inputs: Inputs) -> Tensor:
        """Of ``end``, ``[N]``."""
        return (inputs["input_ids"] == self.end).int().argmax(1)


class SmolLM2Suite(TextSuite):
    """The suite at one seed, all parts trained."""

    name = "smollm2"
    batch = 32

    def __init__(self, folder: Path, sets: dict[str, dict[str, Examples]], seed: int) -> None:
        super().__init__(folder, load_base(folder.parent / "base"), TASKS, sets, seed)
        self.heads = {name: load_head(folder / "adapters" / name) for name in TASKS if has_head(name)}
        self.written = {name: written(sets["val"][name]) for name in TASKS if not has_head(name)}

    def calibration(self, batch: int, steps: int) -> dict[str, list[dict[str, Tensor]]]:
        """Questions alone: an answer is a label."""
        return {
            task: batches if has_head(task) else [_asked(one, self.written[task]) for one in batches]
            for task, batches in super().calibration(batch, steps).items()
        }

    def output(self, task: str, model: nn.Module, batch: Inputs) -> Tensor:
        """``[N, C]`` or ``[N, 1]`` of a head, or logits of tokens: ``[N, A, V]`` of the whole answer, each given those
        before it, or ``[N, V]`` of its first, where there are questions alone.
        """
        return output_of(model, self.heads[task] if has_head(task) else self.written[task], batch)

    def next_tokens(self, model: nn.Module, batch: Inputs) -> Tensor:
        """As :meth:`TextSuite.next_tokens`."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return F.linear(hidden, _embedding(model))

    def loss(self, task: str, output: Tensor, label: Tensor) -> Tensor:
        return answer_loss(output, label) if not has_head(task) else super().loss(task, output, label)

    def measure(self, task: str, outputs: Tensor, labels: Tensor) -> float:
        return share_right(outputs, labels) if not has_head(task) else super().measure(task, outputs, labels)

    def quality(self, task: str, outputs: Tensor, labels: Tensor) -> Tensor:
        return right(outputs, labels) if not has_head(task) else super().quality(task, outputs, labels)


def has_head(task: str) -> bool:
    """Whether a task has a head of its own."""
    return TASKS[task].kind != "generation"


def output_of(model: nn.Module, read: nn.Module | Written, batch: Inputs) -> Tensor:
    """See :meth:`SmolLM2Suite.output`."""
    mask = batch["attention_mask"]
    hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    rows, last = torch.arange(len(mask)), mask.sum(1) - 1
    if isinstance(read, nn.Module):
        return read(hidden[rows, last])
    embedding = _embedding(model)
    ends = read.places(batch)
    if torch.equal(ends, last):
        return F.linear(hidden[rows, last], embedding)
    # Beyond the end of a row there is nothing to be written: labels are IGNORE there.
    places = (ends[:, None] + torch.arange(_LONGEST_ANSWER)).clamp(max=hidden.shape[1] - 1)
    return F.linear(hidden[rows[:, None], places], embedding)


def _embedding(model: Any) -> Tensor:
    """Of a transformers model, or one of PEFT's: ``[V, d]``."""
    return model.get_input_embeddings().weight


def written(examples: Examples) -> Written:
    """How the answers of examples are read."""
    ids, mask, labels = examples.inputs["input_ids"], examples.inputs["attention_mask"], examples.labels
    # An answer's last token is not among the inputs.
    end = ids[0, mask[0].sum() - (labels[0] != IGNORE).sum()]
    return Written(int(end))


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
    sets: dict[str, dict[str, Examples]] = {
        split: {name: tokenised(name, texts[name][split], tokeniser) for name in TASKS} for split in SPLITS
    }

    def train_one(part: Path, task: str, permuted: bool) -> str:
        examples: Examples = sets["train"][task]
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


def load_base(folder: Path) -> PreTrainedModel:
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
        if len(answer) <= _LONGEST_ANSWER:
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
    answers = [answer + [IGNORE] * (_LONGEST_ANSWER - len(answer)) for _, answer, _ in rows]
    return Questions(inputs, torch.tensor(answers))


def _asked(inputs: dict[str, Tensor], read: Written) -> dict[str, Tensor]:
    """A batch without the answers."""
    lengths = read.places(inputs) + 1
    mask = masks(lengths, int(lengths.max()))
    return {"input_ids": inputs["input_ids"][:, : mask.shape[1]] * mask, "attention_mask": mask}


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
    measure = share_right
    head: nn.Linear | None = None
    if not has_head(task):
        read: nn.Module | Written = written(examples)
    else:
        read = head = nn.Linear(model.config.hidden_size, CLASSES.get(task, 1))
        loss, measure = (F.cross_entropy, accuracy) if task in CLASSES else (regression_loss, absolute_error)
    peft_model = with_lora(model, ["q_proj", "v_proj"], rank=RANK)
    line = train_adapter(
        folder,
        peft_model,
        lambda inputs: output_of(peft_model, read, inputs),
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

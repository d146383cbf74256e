"""Base model, adapters, heads and labelled data of several tasks, as an evaluation recipe names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batch_files import Batches, inputs_for
from nsc_merge.calibration.batches import naming_inputs
from nsc_merge.calibration.on_disk import OnDisk
from nsc_merge.calibration.raw.labels import LABELS
from nsc_merge.calibration.raw.preprocessors import base_of, tokenizer_of
from nsc_merge.evaluation.embeddings.head import EmbeddingHead, embedding_head
from nsc_merge.evaluation.eval_recipe import EvalRecipe, TaskRecipe
from nsc_merge.evaluation.heads import CTCHead, GeneratingHead, Head, ModelHead, ends_of, head_of, read_head
from nsc_merge.evaluation.metrics import Metric, Outputs, cross_entropy, predicted, scores_of_rows
from nsc_merge.evaluation.rows.classes import count_of, names_of, says_tags, tags_of
from nsc_merge.evaluation.rows.labelled_data import padded_behind, read_labelled, shuffled
from nsc_merge.models.attachment import merged_linears
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.fitting import fit
from nsc_merge.models.own_base import own_base
from nsc_merge.models.traits import encodes, hears
from nsc_merge.recipes.calibration_keys import CalibrationSource
from nsc_merge.recipes.inputs import calibration_from, read_adapter
from nsc_merge.recipes.preflight import check_placement
from nsc_merge.utils.memory import total_memory

Labelled = list[tuple[dict[str, Tensor], Tensor]]
# Bytes of encoded raw data; the rest is on the disk that the results are for.
_IN_MEMORY = 8 << 30


class Task(Protocol):
    """What is asked of the description of a task."""

    @property
    def lower_is_better(self) -> bool: ...


class Suite(Protocol):
    """What can be evaluated: :class:`RecipeSuite`, or anything alike.

    Attributes:
        tasks: name -> description.
        model: the base model.
    """

    @property
    def tasks(self) -> Mapping[str, Task]: ...

    @property
    def model(self) -> nn.Module: ...

    def labelled(self, task: str, split: str) -> Labelled:
        """All of ``"val"`` or ``"test"`` as batches of model inputs and labels."""
        ...

    def output(self, task: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the task's head makes of the model, differentiable."""
        ...

    def loss(self, task: str, output: Any, label: Tensor) -> Tensor | None:
        """Scalar; None where the task has no loss."""
        ...

    def measure(self, task: str, outputs: Any, labels: Tensor) -> float:
        """The task's metric over a whole split."""
        ...

    def quality(self, task: str, outputs: Any, labels: Tensor) -> Tensor:
        """Per sample, higher is better."""
        ...


@dataclass(frozen=True)
class TaskInfo:
    """A task for tables: its name, the label of its metric, and the direction."""

    name: str
    metric: str
    lower_is_better: bool


class RecipeSuite:
    """The suite of an evaluation recipe, at one seed.

    Args:
        recipe: with its seed put in; see :meth:`nsc_merge.evaluation.eval_recipe.EvalRecipe.at`.
        shuffle: seed by which calibration data are put in random order; None keeps that of the files.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the key of the recipe, what was found and what was expected.
    """

    def __init__(self, recipe: EvalRecipe, shuffle: int | None = None) -> None:
        self._recipe, self._shuffle = recipe, shuffle
        check_placement(recipe, recipe.model if recipe.local else None)
        self.placement = recipe.placement
        loaded = {
            name: read_adapter(task.adapter, name, recipe.dora) for name, task in recipe.tasks.items()
        }
        self.model = load_model(
            recipe.model,
            local=recipe.local,
            placement=self.placement,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
        )
        self.model, loaded = own_base(self.model, loaded)
        self.adapters: dict[str, Adapter] = fit(loaded, self.model, recipe.shared_modules)
        merged_linears(self.model, self.adapters)
        self.tasks = {
            name: TaskInfo(name, task.metric.label, task.metric.lower_is_better)
            for name, task in recipe.labelled.items()
        }
        self._labelled: dict[tuple[str, str], Labelled] = {}
        # A picture is half a megabyte. How much of its machine's memory a container may use is not told.
        self._samples = OnDisk(recipe.out, min(total_memory(torch.device("cpu")) // 2, _IN_MEMORY))
        self._embeddings: dict[str, EmbeddingHead] = {
            name: embedding_head(recipe, task) for name, task in recipe.labelled.items() if task.embeds
        }
        # Before anything is measured: a tokenizer that is missing is told at once.
        self._further_of = {name: self._further(task) for name, task in recipe.labelled.items()}
        self._heads = {name: self._head(task) for name, task in recipe.labelled.items()}
        for name in self.tasks:
            self.labelled(name, "test")

    def metric(self, task: str) -> Metric:
        return self._recipe.labelled[task].metric

    def labelled(self, task: str, split: str) -> Labelled:
        """All of ``"val"`` or ``"test"``.

        Raises:
            FileNotFoundError, ValueError: naming the key of the recipe.
        """
        if (task, split) not in self._labelled:
            settings = self._recipe.labelled[task]
            key = {"test": "test", "val": "validation"}[split]
            place = getattr(settings, key)
            if place is None:
                raise ValueError(f"tasks.{task}.{key}: expected labelled data, found none")
            self._labelled[task, split] = self._read(settings, place, f"tasks.{task}.{key}")
        return self._labelled[task, split]

    def calibration(self) -> dict[str, Batches]:
        """Task -> batches of unlabelled inputs, for methods that need data."""
        drawn = {}
        for name, task in self._recipe.tasks.items():
            if task.calibration is not None:
                argument = f"tasks.{name}.calibration"
                read = calibration_from(task.calibration, self._recipe, argument)
                labels = (task.labels or LABELS) if isinstance(task, TaskRecipe) else None
                batches = list(inputs_for(self.model, read, argument, labels))
            else:
                batches = [inputs for inputs, _ in self.labelled(name, "val")]
            drawn[name] = Batches(batches if self._shuffle is None else shuffled(batches, self._shuffle))
        return drawn

    def tokenizer(self, argument: str) -> Any:
        """The tokenizer beside the base, or the one that ``data.tokenizer`` names.

        Raises:
            FileNotFoundError, ValueError: naming ``argument``, if there is none.
        """
        recipe = self._recipe
        try:
            return tokenizer_of(base_of(recipe.model, recipe.revision, recipe.data, argument), recipe.data, argument)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, under the key data") from None

    def output(self, task: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the task's head on ``model``, where the model is."""
        device = input_device(model)
        inputs = {name: value.to(device) for name, value in batch.items()}
        with naming_inputs(f"tasks.{task}", inputs):
            return self._heads[task](model, inputs)

    def kept(self, task: str, output: Tensor, label: Tensor) -> Outputs:
        """What is kept of the outputs of a batch until all are measured: of logits at several places of a sample, what
        its figures and the loss take of them.
        """
        if task in self._embeddings:
            return self._embeddings[task].compared(output, len(label), self.metric(task))
        if self.metric(task).scores and output.is_floating_point():
            with _naming(task):
                return scores_of_rows(output, len(label))
        if self.metric(task).loss is cross_entropy and label.dim() > 1 and output.shape[:-1] == label.shape:
            with _naming(task):
                return predicted(output, label)
        return output

    def loss(self, task: str, output: Outputs, label: Tensor) -> Tensor | None:
        """None where the metric has none, or where the outputs are generated tokens."""
        loss = self.metric(task).loss
        if loss is None:
            return None
        if isinstance(output, Tensor):
            if not output.is_floating_point():
                return None
            label = label.to(output.device)
        with _naming(task):
            return loss(output, label)

    def measure(self, task: str, outputs: Outputs, labels: Tensor) -> float:
        with _naming(task):
            return self.metric(task).measure(outputs, labels, **self._further_of[task])

    def quality(self, task: str, outputs: Outputs, labels: Tensor) -> Tensor:
        return self.metric(task).quality(outputs, labels, **self._further_of[task])

    def _read(self, task: TaskRecipe, place: Path | CalibrationSource, argument: str) -> Labelled:
        batches, name = read_labelled(
            place, task, self._recipe, argument, predicts_tokens=self._writes(task),
            # An answer is written behind the end of its prompt; what an encoder reads stands where it was trained to.
            in_front=task.generate and not encodes(self.model),
            classes=names_of(task, self.adapters[task.name], self.model),
            count=count_of(task, self.adapters[task.name], self.model),
            tags=says_tags(task, self.model), keep=self._samples.keep,
        )  # fmt: skip
        if self._generates and not encodes(self.model) and not task.generate:
            batches = Batches([padded_behind(batch) for batch in batches])
        if task.embeds:
            self._embeddings[task.name].check_lengths(batches, argument)
        inputs = inputs_for(self.model, batches, argument, name, self._samples.keep)
        labels = [batch[name] for batch in batches]
        if self._writes(task) and not task.alone:
            if not encodes(self.model):
                labels = [label[:, 1:] for label in labels]
            elif not any(name.startswith("decoder_input") for name in batches.names):
                raise ValueError(
                    f"{argument}: expected decoder_input_ids beside the labels, as the logits of "
                    f"{type(self.model).__name__} are for these: the labels moved one to the right, behind "
                    f"decoder_start_token_id; or tasks.{task.name}.generate: true"
                )
        return [
            (dict(one), label.float() if label.is_floating_point() else label.long())
            for one, label in zip(inputs, labels, strict=True)
        ]

    def _further(self, task: TaskRecipe) -> dict[str, Any]:
        """Further arguments of the metric: the tokens that end a text, what makes text of tokens, and what classes are
        called.
        """
        further: dict[str, Any] = {}
        if task.metric.writes:
            further["ends"] = ends_of(self.model)
        if task.metric.named:
            further["classes"] = tags_of(task, self.adapters[task.name], self.model)
        if task.metric.embeds:
            further["similarity"] = self._embeddings[task.name].modules.similarity
        if task.metric.decodes:
            tokenizer = self.tokenizer(f"tasks.{task.name}.metric")
            # Of CTC's, which would take letters for one that are alike and stand together.
            own = {"group_tokens": False} if hears(self.model) else {}
            further["decode"] = partial(tokenizer.decode, skip_special_tokens=True, **own)
        return further

    def _writes(self, task: TaskRecipe) -> bool:
        """Whether outputs are the logits of tokens, by the own head of a model that generates."""
        return not task.generate and task.pool is None and self._generates

    @property
    def _generates(self) -> bool:
        can_generate: Any = getattr(self.model, "can_generate", bool)
        return bool(can_generate())

    def _longest(self, task: TaskRecipe) -> int:
        """Tokens of the longest labels among all that are generated for."""
        splits = ["test"] if task.validation is None else ["test", "val"]
        return max(label.shape[-1] for split in splits for _, label in self.labelled(task.name, split))

    def _head(self, task: TaskRecipe) -> Head:
        if task.embeds:
            return self._embeddings[task.name]
        key = f"tasks.{task.name}.head"
        trained = self.adapters[task.name].trained
        if task.generate:
            if hears(self.model):
                if task.metric.name == "exact_match":
                    # It takes what follows a label for no part of the answer, and no token ends what CTC hears.
                    raise ValueError(f"tasks.{task.name}.metric: expected wer or cer of a CTC model, found exact_match")
                if task.max_new_tokens is not None or task.num_beams > 1:
                    given = "num_beams" if task.max_new_tokens is None else "max_new_tokens"
                    raise ValueError(f"tasks.{task.name}.{given}: CTC has a token of every frame; expected none")
                return CTCHead()
            if not self._generates:
                found = type(self.model).__name__
                raise ValueError(f"tasks.{task.name}.generate: expected a base that generates text, found {found}")
            if stops := getattr(getattr(self.model, "generation_config", None), "stop_strings", None):
                raise ValueError(
                    f"model: its generation_config.json has stop_strings {stops!r:.60}; expected tokens that end a "
                    "text, in eos_token_id there"
                )
            limit = task.max_new_tokens
            return GeneratingHead(limit or self._longest(task), task.num_beams, limited=limit is not None)
        if task.head == "adapter" or (task.head is None and trained):
            if not trained:
                raise ValueError(f"{key}: the adapter brought no head (modules_to_save); expected one")
            head = head_of(trained, self.model, task.pool, f"{key}: {task.adapter}")
        elif task.head in (None, "model"):
            if task.pool is not None:
                raise ValueError(f"tasks.{task.name}.pool: the model's own head has none, found {task.pool!r}")
            head = ModelHead()
        else:
            head = read_head(Path(str(task.head)), self.model, task.pool, key)
        if isinstance(head, ModelHead):
            return ModelHead(head.parameters, shifted=self._writes(task) and not encodes(self.model))
        return head


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Errors of a metric say of which task's data they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"tasks.{task}: {error}") from error

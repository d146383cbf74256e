"""Embeddings of texts, and what of those of a row a metric is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsc_merge.calibration.batch_files import Batches
from nsc_merge.evaluation.eval_recipe import EvalRecipe, TaskRecipe
from nsc_merge.evaluation.metrics import Metric
from nsc_merge.models.embeddings.files import MODULES, in_folder, on_hub, read_modules
from nsc_merge.models.embeddings.modules import SIMILARITIES, Modules, Pooling
from nsc_merge.models.families import find_family
from nsc_merge.recipes.adapter_keys import HubAdapter

# What a task calls the vector that it takes -> what sentence-transformers does.
POOLS = {"mean": "mean", "first": "cls", "last": "lasttoken"}


@dataclass(frozen=True)
class EmbeddingHead:
    """The embedding of every text.

    Attributes:
        modules: what is behind the model.
    """

    modules: Modules

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs of texts ``[M, T]`` -> ``[M, d]``."""
        family = find_family(model)
        trunk: Any = getattr(model, family.prefill if family else "base_model", model)
        features = trunk(**inputs).last_hidden_state
        return self.modules.embedding(model, features, inputs["attention_mask"])

    def check_lengths(self, batches: Batches, argument: str) -> None:
        """Refuse texts of more tokens than sentence-transformers would read of them.

        Raises:
            ValueError: naming ``argument`` and how many these are.
        """
        most = self.modules.longest
        longest = max(int(batch["attention_mask"].sum(1).max()) for batch in batches)
        if most is not None and longest > most:
            raise ValueError(
                f"{argument}: has a text of {longest} tokens, and in use sentence-transformers reads {most} of it; "
                f"expected max_length: {most}"
            )

    def compared(self, embeddings: Tensor, rows: int, metric: Metric) -> Tensor:
        """Of the embeddings of all texts of some rows what a metric takes: for values the similarity of the first two,
        ``[rows]``; of the nearest those of the first with all others ``[rows, S - 1]``, the last in front, so that the
        second is not found where another is as near; else the embeddings ``[rows, S, d]``.
        """
        texts = embeddings.unflatten(0, (rows, -1)).float().cpu()
        if metric.compares == "same":
            return texts
        near = SIMILARITIES[self.modules.similarity](texts[:, :1], texts[:, 1:])[:, 0]
        return near[:, 0] if metric.compares == "value" else near.flip(1)


def embedding_head(recipe: EvalRecipe, task: TaskRecipe) -> EmbeddingHead:
    """What a task's embeddings are made by: ``pool`` where the task has one, else the modules beside the base, or
    beside its adapter where the base has none.

    Raises:
        ValueError: naming the task, if nobody says it.
    """
    if task.pool is not None:
        return EmbeddingHead(Modules(Pooling((POOLS[task.pool],))))
    key, adapter = f"tasks.{task.name}", task.adapter
    base = in_folder(Path(recipe.model)) if recipe.local else on_hub(recipe.model, recipe.revision, "model")
    found = read_modules(base, f"model: {recipe.model}")
    if found is None and isinstance(adapter, Path):
        found = read_modules(in_folder(adapter), f"{key}.adapter: {adapter}")
    elif found is None and isinstance(adapter, HubAdapter):
        beside = on_hub(adapter.repo, adapter.revision, f"{key}.adapter", adapter.subfolder)
        found = read_modules(beside, f"{key}.adapter: {adapter.repo}")
    if found is None:
        raise ValueError(
            f"{key}.pool: expected one of {list(POOLS)}, as neither the base nor the adapter has what "
            f"sentence-transformers puts behind a model ({MODULES})"
        )
    return EmbeddingHead(found)

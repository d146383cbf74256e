"""What a merge returns: an update that can be applied, and saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nsc_merge.results.merged_update import MergedUpdate
from nsc_merge.results.saving import save


@dataclass(frozen=True)
class MergeResult(MergedUpdate):
    """A merged update, with the adapters that it was made of; its attributes are those of
    :class:`nsc_merge.results.merged_update.MergedUpdate`.
    """

    def save(
        self,
        out: str | os.PathLike[str],
        format: str | Sequence[str] = "model",
        *,
        rank: int | None = None,
        max_shard_size: str | int | None = None,
        plots: bool = False,
        dequantize: bool = False,
        head: str | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> Path:
        """Write the result into the folder ``out``, which appears or changes only once everything is written.

        Besides the format's own files: ``recipe.yaml`` (resolved options, versions, SHA-256 of the inputs, files
        written), ``README.md`` (a model card), ``history.jsonl`` if there is a history, and for every task that
        brought a head ``heads/<task>.safetensors``, with the names of its classes in ``heads/<task>.json``. With
        ``"lora"`` and ``"model"`` go the base's tokenizer, chat templates, processors, generation configuration and
        licence.

        Args:
            out: a folder; made if needed. Files of the same names are replaced, but for a ``recipe.yaml`` and a
                ``README.md`` that no save wrote, which are refused; what an earlier save of another merge left there
                goes; other files stay, a licence among them.
            format: ``"lora"`` writes one PEFT adapter with the coefficients folded in, exact and of rank sum
                of the ranks; ``"model"`` writes the merged transformers model as sharded safetensors;
                ``"coefficients"`` writes ``coefficients.json``. A list writes ``coefficients.json`` (if the method
                gives coefficients) into ``out`` and each other format into a folder of its name. Where every task
                has an update of its own, each goes into ``tasks/<task>`` of that folder. A task whose name is more than
                letters, digits, ``_``, ``-`` and ``.``, or differs from another's in case only, is called
                ``<what is left>+<digest>`` there and in ``heads``.
            rank: truncates ``"lora"`` to this rank. The relative error of every module goes into
                ``truncation.json``; :meth:`rank_errors` returns the same. Methods whose update is of full rank
                have no exact adapter and need it.
            max_shard_size: of ``"model"``, as in transformers; None divides it into files as the folder does that the
                base was read from, and where there is none at 5 GB.
            plots: also draw the coefficients and, if there is a history, the null-space ratios.
            dequantize: of ``"model"`` on a quantised base: write a plain model, with the update added to the numbers
                that the quantised linears compute with and rounded once to the dtype of the activations. Without it
                such a base is refused, as the merge would be rounded to its codes.
            head: a task whose head goes into ``"model"``, with its labels in the configuration, and into ``"lora"`` as
                ``modules_to_save``, so that ``pipeline`` and PEFT load it; where every task has an update of its own,
                into that of its task. A base that has no such head becomes the classifier of transformers that has.
            labels: task -> names of the classes of its head, in order; by default ``id2label`` of a ``config.json``
                beside the adapter, or that of the base if it has as many.

        Returns:
            ``out`` as a path.

        Raises:
            TypeError, ValueError, OSError: naming the argument, what was found and what was expected; ``out`` is then
                as it was. ``"model"``, and ``"lora"`` where adapters trained linears in full, need the base as it was
                merged: see :meth:`apply`.
            BlockingIOError: if someone else is writing ``out``; this save can be tried again when they are done.
        """
        save(
            self,
            Path(out),
            format,
            rank=rank,
            max_shard_size=max_shard_size,
            plots=plots,
            dequantize=dequantize,
            head=head,
            labels=labels,
        )
        return Path(out)

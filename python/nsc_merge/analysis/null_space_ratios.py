"""Null-space ratios per sample, module and adapter, in any model that adapters make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nsc_kernels import null_space_ratio
from nsc_merge.adapters import Adapter, AdapterSource, Factor, load_adapter
from nsc_merge.calibration.batches import naming_inputs
from nsc_merge.evaluation.scoring import applied
from nsc_merge.models.attachment import attach
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.families import family_of, scored_paths
from nsc_merge.models.fitting import fit
from nsc_merge.models.forward_contexts import evaluating
from nsc_merge.models.own_base import linears_of, own_base
from nsc_merge.models.real_tokens import RealTokens, positions_first
from nsc_merge.models.traits import has_image_token
from nsc_merge.results.result import MergeResult


@dataclass(frozen=True)
class Ratios:
    """Null-space ratios (Eq. 3 of arXiv 2603.26317), mean over the tokens of a sample.

    Attributes:
        values: ``[N, modules, K]``, NaN where an adapter does not touch a module.
        paths: of the modules in the base model.
        tasks: whose adapters.
    """

    values: Tensor = field(repr=False)
    paths: list[str]
    tasks: list[str]

    def of(self, task: str, modules: Sequence[str] | None = None) -> Tensor:
        """Mean over modules, ``[N]``: Eq. 4 for every sample.

        Args:
            task: whose adapter.
            modules: last components or whole paths; all when None.
        """
        chosen = chosen_paths(self.paths, modules)
        rows = [number for number, path in enumerate(self.paths) if path in chosen]
        return self.values[:, rows, self.tasks.index(task)].nanmean(1)

    def by_module(self, task: str) -> dict[str, float]:
        """Mean over samples, by path of the modules that the task's adapter touches."""
        means = self.values[:, :, self.tasks.index(task)].mean(0).tolist()
        return {path: mean for path, mean in zip(self.paths, means, strict=True) if mean == mean}


def chosen_paths(paths: Sequence[str], modules: Sequence[str] | None) -> list[str]:
    """Those of ``paths`` that ``modules`` name, by last component or in full.

    Raises:
        ValueError: if there is no name, or one that fits none.
    """
    if modules is None:
        return list(paths)
    wrong = [name for name in modules if not any(name in (path, path.rpartition(".")[2]) for path in paths)]
    if wrong or not modules:
        known = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise ValueError(f"modules: expected paths or some of {known}, found {repr(wrong[0]) if wrong else 'none'}")
    return [path for path in paths if path in modules or path.rpartition(".")[2] in modules]


def low_rank_part(
    model: nn.Module,
    adapters: Mapping[str, AdapterSource],
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
) -> dict[str, Adapter]:
    """Adapters fitted to the model, with nothing but the low-rank updates of the chosen modules.

    Args:
        model: the base model.
        adapters: task -> PEFT folder, or anything that :func:`nsc_merge.merge` takes.
        modules: last components or whole paths of modules; all when None.
        blocks: ``"last_quarter"``, how many last blocks, or block numbers; all when None.

    Raises:
        ValueError: if nothing is chosen.
    """
    read = {task: load_adapter(source, task, dora="refuse") for task, source in adapters.items()}
    base, loaded = own_base(model, read)
    # An embedding has no inputs to measure.
    fitted = {task: linears_of(adapter, base) for task, adapter in fit(loaded, base).items()}
    touched = list(
        dict.fromkeys(
            path for adapter in fitted.values() for path, factor in adapter.factors.items() if factor.rank
        )
    )
    if not touched:
        raise ValueError("adapters: expected low-rank updates of linears, found none")
    kept = chosen_paths(touched, modules)
    if blocks is not None:
        names = sorted({path.rpartition(".")[2] for path in kept})
        kept = scored_paths(family_of(model), model, kept, names, blocks)

    def chosen(path: str, factor: Factor) -> Factor | None:
        return factor if path in kept and factor.rank else None

    return {task: adapter.with_factors(chosen) for task, adapter in fitted.items()}


def with_room(model: nn.Module, source: MergeResult | Mapping[str, AdapterSource]) -> nn.Module:
    """The model that a merge can be put into: ``model``, or a copy that shares all tensors with it but the tied ones
    that the merge changes; see :func:`nsc_merge.models.own_base.own_base`.
    """
    return own_base(model, source.adapters)[0] if isinstance(source, MergeResult) else model


@torch.no_grad()
def per_sample_ratios(
    model: nn.Module,
    source: MergeResult | Mapping[str, AdapterSource],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
) -> Ratios:
    """Measure every adapter's null-space ratio on the inputs that its modules see.

    Tokens that the family's mask leaves out do not count.

    Args:
        model: the base model; it is left as it was.
        source: a merge: the ratios are those in the merged model. Or adapters, as :func:`nsc_merge.merge` takes
            them: the ratios are those in ``model`` as it is, without their updates.
        batches: model inputs, samples in the first dimension.
        modules: last components or whole paths of modules; all when None.
        blocks: ``"last_quarter"``, how many last blocks, or block numbers; all when None.

    Raises:
        ValueError: if nothing is chosen, if every task of the merge has an update of its own (take one with
            ``for_task``), or if what a chosen module sees is not of one sample after another.
        RuntimeError: if the forward does not reach a chosen module.
    """
    adapters = source.adapters if isinstance(source, MergeResult) else source
    model = with_room(model, source)
    chosen = low_rank_part(model, adapters, modules, blocks)
    tasks = list(chosen)
    real_tokens = RealTokens(model)
    found: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def record(path: str, quad: Tensor, sqnorm: Tensor) -> None:
        # Of several runs the first counts, as in NSC.
        if path in found:
            return
        ratio = null_space_ratio(quad, sqnorm)
        real = real_tokens.of(path, sqnorm, inputs)
        weight = torch.ones_like(sqnorm) if real is None else real.to(sqnorm)
        if positions_first(model, path) and sqnorm.dim() > 1:
            ratio, weight = ratio.transpose(0, 1), weight.transpose(0, 1)
        shape = _samples(model, path, weight, real is not None, inputs), -1
        ratio, weight = ratio.reshape(*shape, len(tasks)), weight.reshape(*shape, 1)
        found[path] = (ratio * weight).sum(1) / weight.sum(1).clamp(min=1)

    parts = []
    device = input_device(model)
    with ExitStack() as stack:
        if isinstance(source, MergeResult):
            stack.enter_context(applied(model, source))
        stack.enter_context(evaluating(model))
        merged = stack.enter_context(attach(model, chosen, 0.0))
        for module in merged.values():
            module.measure = record
        paths = list(merged)
        for batch in batches:
            found.clear()
            inputs = {name: value.to(device) for name, value in batch.items()}
            with naming_inputs("inputs", inputs):
                model(**inputs)
            silent = [path for path in paths if path not in found]
            if silent:
                raise RuntimeError(f"inputs: the forward reaches no {silent[0]}")
            if other := next((path for path in paths if len(found[path]) != len(found[paths[0]])), None):
                raise ValueError(
                    f"modules: expected some that see the same samples, found {paths[0]}, which sees those of "
                    f"{len(found[paths[0]])} and {other} of {len(found[other])}"
                )
            parts.append(torch.stack([found[path].float().cpu() for path in paths], 1))
    if not parts:
        raise ValueError("batches: expected at least one batch, found none")
    values = torch.cat(parts)
    for row, path in enumerate(paths):
        for column, task in enumerate(tasks):
            if path not in chosen[task].factors:
                values[:, row, column] = torch.nan
    return Ratios(values, paths, tasks)


def _samples(model: nn.Module, path: str, rows: Tensor, masked: bool, inputs: Mapping[str, Tensor]) -> int:
    """How many samples are in what a linear has of every row of its input, one after another.

    Args:
        rows: something of its shape, such as ``[samples, tokens]``, or ``[samples * windows, tokens]`` (Swin).
        masked: whether the model's mask speaks of these rows, so that they are its tokens.

    Raises:
        ValueError: if they are something else, such as positions that all samples share (DeBERTa).
    """
    sizes = {len(value) for value in inputs.values()}
    if len(rows) in sizes and not has_image_token(getattr(model, "config", None)):
        # Images that lie in no text, as CLIP's, are samples of their own.
        return len(rows)
    count = len(inputs["input_ids"]) if "input_ids" in inputs else len(next(iter(inputs.values())))
    parts = len(rows) % count == 0 and sizes == {count} and (masked or rows.dim() > 1)
    if len(rows) != count and not parts:
        raise ValueError(
            f"modules: expected some whose inputs are those of one sample after another, found {path}, which sees "
            f"{list(rows.shape)} for {count} samples"
        )
    return count

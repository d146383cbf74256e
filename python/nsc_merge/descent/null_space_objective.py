"""The objective of NSC (Eq. 5 of arXiv 2603.26317) and its gradient, computing nothing that it does not need.

Exact to rounding, each with a switch so that its worth can be measured:

* the forward ends at the last measured input, whose linear is not even applied, nor those beside it that take the
  same input, once the first forward has shown which they are;
* the output of a frozen tower in front of the blocks is kept per batch;
* batches of all tasks run as one pass where their shapes agree, or can be made to by a little padding;
* blocks may recompute their activations in the backward, and those without a measured input may be compiled;
* linears that are not measured may be folded with their adapters into one weight per step, where it has the tokens.

Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from nsc_kernels import AdapterBank, merged_lora_nsc, null_space_ratio
from nsc_merge.adapters.adapter import name_of
from nsc_merge.calibration.batches import Batch
from nsc_merge.calibration.forward_passes import Padding, Pass, concatenated, one_by_one, split
from nsc_merge.descent.coefficients import Coefficients
from nsc_merge.descent.position_weights import PositionWeights
from nsc_merge.descent.tower_cache import TowerCache
from nsc_merge.models.attachment import is_computed_with, refuse_unseen
from nsc_merge.models.bases.quantised import is_linear
from nsc_merge.models.bases.sharded import gathers_for_backward, has_units_inside, is_unit, reshard
from nsc_merge.models.forward_contexts import (
    Ended,
    blocks_without,
    ended_by,
    one_block_kept,
    recomputed,
    recomputing,
    without_key_value_cache,
    wrapped_forward,
)
from nsc_merge.models.merged.folded_linear import Folded, can_fold
from nsc_merge.models.merged.measured_linear import MeasuredLoRALinear
from nsc_merge.models.traits import places_of
from nsc_merge.processes.group import current
from nsc_merge.utils.memory import free_memory


class Objective:
    """Measures null-space ratios of merged models; a context manager that leaves the model as it was.

    Args:
        model: in which ``merged`` is attached.
        merged: path -> merged linear.
        shares: measured path -> the weight ``[K]`` of its mean ratio in each task's value of Eq. 4: one over
            the number of measured modules that the task's adapter touches, 0 where it is absent.
        mask: name of the model input ``[B, T]`` that is 0 at padding; None averages over every position.
        padding: how batches of unequal lengths are put into one pass; None leaves them apart. What it adds never
            counts.
        restrict: makes the model's inputs from a batch; they are the batch itself when None.
        tower: path of the frozen tower whose output may be kept.
        unmasked: path of another part whose positions the mask does not speak of.
        block: regular expression of a block's path, for ``compiler``.
        batch_tasks: run batches of several tasks as one pass where their shapes agree; None decides at the
            first step by the memory that one pass takes.
        checkpointing: recompute the activations of blocks in the backward; None where weights are offloaded.
        fold: fold the linears that are not measured with their adapters, once per call of :meth:`accumulate`: True
            all of them, None those that the call has the tokens for, False none.
        compiler: backend of ``torch.compile`` for the blocks without a measured input; None compiles nothing.
        early_exit: end the forward at the last measured input.
    """

    def __init__(
        self,
        model: nn.Module,
        merged: Mapping[str, MeasuredLoRALinear],
        shares: Mapping[str, Sequence[float]],
        *,
        mask: str | None = None,
        padding: Padding | None = None,
        restrict: Callable[[Batch], Mapping[str, Any]] | None = None,
        tower: str | None = None,
        unmasked: str | None = None,
        block: str = "",
        batch_tasks: bool | None = None,
        checkpointing: bool | None = None,
        fold: bool | None = False,
        compiler: str | None = None,
        early_exit: bool = True,
    ) -> None:
        self.coefficients = Coefficients(merged)
        self.batch_tasks = batch_tasks
        self._model, self._early_exit = model, early_exit
        self._padding, self._restrict = padding, restrict
        self._scored = {path: merged[path] for path in shares}
        # A process that answers from its cache would leave the others waiting inside of the tower.
        cached = tower is not None and not has_units_inside(model.get_submodule(tower))
        self._tower = TowerCache(model.get_submodule(tower)) if tower is not None and cached else None
        self._blocks = blocks_without(model, block, self._scored) if compiler else []
        self._checkpointing, self._compiler = checkpointing, compiler
        self._always_fold = bool(fold)
        self._foldable = {
            row: module
            for row, (path, module) in enumerate(merged.items())
            if fold is not False
            and path not in self._scored
            and module.bank.R
            and module.denses is None
            and module.gains is None
            and can_fold(module.linear)
        }
        self._device = self.coefficients.flat.device
        self._rows: set[int] = set()
        kind = self.coefficients.flat.dtype
        self._shares = {
            path: torch.tensor(share, dtype=kind, device=self._device) for path, share in shares.items()
        }
        self._tasks = self.coefficients.flat.shape[1]
        self._missing: set[str] = set()
        # Linears run since all but one input are measured, with their inputs; and, per last measured linear, the
        # first one that takes the same input.
        self._inputs: list[tuple[str, Tensor]] = []
        self._exit_at: dict[str, str] = {}
        # Where the last forward ended, and for which measured linear.
        self._end: tuple[str, str] | None = None
        self._pass: Pass | None = None
        self._elements = 0
        self._omega = torch.zeros(self._tasks, dtype=kind, device=self._device)
        self._weights = PositionWeights(model, self._tasks, mask, (tower, unmasked))
        self._undo = ExitStack()

    def __enter__(self) -> Objective:
        with ExitStack() as stack:
            for module in self._scored.values():
                module.measure = self._record
                stack.callback(setattr, module, "measure", None)
            if self._early_exit:
                for path, linear in _beside(self._model, self._scored).items():
                    hook = functools.partial(self._before, path)
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
                if is_unit(self._model):
                    stack.enter_context(ended_by(self._model, Ended))
                    stack.callback(reshard, self._model)
            for module in self._foldable.values():
                module.folded = Folded(module.linear, module.bank, self._always_fold)
                stack.callback(delattr, module, "folded")
            self._begin_folding()
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(_decide_folding, with_kwargs=True).remove)
                stack.enter_context(wrapped_forward(block, False, self._compiler))
            stack.enter_context(recomputed(self._model, self._checkpointing))
            if self._tower is not None:
                stack.enter_context(self._tower)
            stack.enter_context(without_key_value_cache(self._model))
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def accumulate(self, drawn: Sequence[Batch]) -> Tensor:
        """Add the gradient of Eq. 5 on ``drawn``, one batch for each task, to ``coefficients.flat.grad``.

        Each task's batch is scored by that task's own adapter only. Processes that share the work run their parts of
        the passes, and add gradient and ratios up by one exchange; the gradient must be zero before.

        Returns:
            ``[K]``, Eq. 4 of every task, detached.

        Raises:
            ValueError: if a mask does not fit what is measured.
            RuntimeError: if the forward does not reach a measured module.
        """
        total = torch.zeros_like(self._omega)
        for one in self._passes(drawn):
            omega = self._forward(one)
            # What is measured in front of every adapter depends on no coefficient.
            if omega.requires_grad:
                (omega.sum() / self._tasks).backward()
            total += omega.detach()
        return self.coefficients.add_up(total)

    def measure(self, drawn: Sequence[Batch]) -> Tensor:
        """What :meth:`accumulate` returns, and no gradient.

        The forward is that of a step all the same: without a graph, compiled blocks would be compiled anew.
        """
        total = torch.zeros_like(self._omega)
        for one in self._passes(drawn):
            total += self._forward(one).detach()
        current().add([total])
        return total

    def _passes(self, drawn: Sequence[Batch]) -> list[Pass]:
        """What runs for ``drawn``, one batch for each task, at the coefficients as they are now."""
        self._begin_folding()
        passes = one_by_one(drawn, self._device, self._restrict)
        self._elements = sum(one.elements for one in passes)
        if self.batch_tasks is None:
            self.batch_tasks = self._fits_as_one(passes)
        if self.batch_tasks:
            passes = concatenated(passes, self._padding)
        passes = split(passes, current(), places=places_of(self._model))
        self._elements = sum(one.elements for one in passes)
        return passes

    def _begin_folding(self) -> None:
        for row, module in self._foldable.items():
            assert module.folded is not None, "folded outside of a with block"
            module.folded.begin(self.coefficients.flat[row])

    def _forward(self, one: Pass) -> Tensor:
        """Eq. 4 for the tasks of a pass, ``[K]`` with 0 for the others."""
        self.coefficients.spread()
        self._pass, self._missing, self._inputs, self._end = one, set(self._scored), [], None
        self._rows.clear()
        self._omega = torch.zeros_like(self._omega)
        self._weights.begin()
        for module in self._foldable.values():
            assert module.folded is not None, "folded outside of a with block"
            module.folded.share = one.elements / max(self._elements, 1)
        if self._tower is not None:
            self._tower.now(one)
        with suppress(Ended):
            self._model(**one.inputs)
        if self._missing:
            refuse_unseen(self._model, self._missing, self._others())
            raise RuntimeError(
                f"calibration: the forward never reached {sorted(self._missing)}, which are to be measured"
            )
        return self._omega

    def _others(self) -> str:
        """What to measure in the place of linears that the model does not call."""
        adapted = [path for path, one in self._model.named_modules() if isinstance(one, MeasuredLoRALinear)]
        names = sorted({name_of(path) for path in adapted if not is_computed_with(self._model, path)})
        return f"score_modules of others that are adapted, such as {names}" if names else "adapters of other modules"

    def _before(self, path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before a measured linear or one beside it runs: if only that input is missing, measure it and stop."""
        z = arguments[0]
        if not recomputing():
            self._end = self._end_at(path, z)
        if self._end is None or path != self._end[0]:
            return
        last = self._end[1]
        A, Bt, offsets = self._scored[last].bank.packed
        # A few output columns in place of all: the statistics need none, and kernels want at least one, or eight.
        narrow = AdapterBank(A, Bt[:, :8], offsets)
        _, quad, sqnorm = merged_lora_nsc(z, narrow, self._scored[last].lam.detach())
        self._record(last, quad, sqnorm)
        raise Ended

    def _end_at(self, path: str, z: Tensor) -> tuple[str, str] | None:
        """The linear at ``path`` and the last measured one, if the forward may end there, where the input is ``z``."""
        if len(self._missing) > 1:
            return None
        (last,) = self._missing
        if path != last and path != self._exit_at.get(last):
            self._inputs.append((path, z))
            return None
        if last not in self._exit_at:
            self._exit_at[last] = next((earlier for earlier, same in self._inputs if same is z), last)
        return path, last

    def _record(self, path: str, quad: Tensor, sqnorm: Tensor) -> None:
        assert self._pass is not None, "measured outside of a pass"
        weights = self._weights.of(path, self._pass, sqnorm)
        self._rows.add(sqnorm.shape[0])
        means = (null_space_ratio(quad, sqnorm) * weights).flatten(0, -2).sum(0)
        part = means.to(self._device) * self._shares[path]
        # A block that is recomputed has to make the same graph, and must not count twice. Of a linear that runs several
        # times, as in a block that is looped, the first counts: the forward may end there.
        if not recomputing() and path in self._missing:
            gathers_for_backward(self._model, path, part)
            self._omega = self._omega + part
            self._missing.discard(path)

    def remembered(self) -> dict[str, Tensor]:
        """See :class:`nsc_merge.descent.objective.Objective`."""
        return {}

    def replay(self, drawn: Sequence[Batch]) -> None:
        """See :class:`nsc_merge.descent.objective.Objective`."""

    def recall(self, tensors: Mapping[str, Tensor], dead: Tensor) -> None:
        """See :class:`nsc_merge.descent.objective.Objective`."""

    def _fits_as_one(self, passes: Sequence[Pass]) -> bool:
        """Whether the graph of all batches at once fits into half of the free memory, and what is measured has rows
        that tell tasks apart, unlike the windows of Swin.

        Runs the largest batch forward and counts the bytes that its graph keeps alive.
        """
        together = concatenated(passes, self._padding)
        if len(together) == len(passes):
            return False
        frozen = {value.untyped_storage().data_ptr() for value in self._model.parameters() if _has_storage(value)}
        held: dict[int, torch.UntypedStorage] = {}

        def count(value: Tensor) -> Tensor:
            if _has_storage(value):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage
            return value

        group = current()
        largest = max(passes, key=lambda single: single.elements)
        (largest,) = split([largest], group, places=places_of(self._model))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value), one_block_kept():
            self._forward(largest)
        rows = next(value.shape[0] for value in largest.inputs.values() if isinstance(value, Tensor) and value.dim())
        apart = self._rows != {rows}
        # Gathered weights have been let go of by now, and are empty.
        one = sum(storage.nbytes() for pointer, storage in held.items() if pointer not in frozen)
        most = max(len(joined.sources) for joined in together)
        sharing = group.size if self._device.type == "cpu" else 1
        # All processes run the same passes.
        return not group.any(apart or one * most > free_memory(self._device) / 2 / sharing)


def _has_storage(value: Tensor) -> bool:
    """Quantised weights of torchao and others are tensors without a storage."""
    return type(value) in (Tensor, nn.Parameter)


def _beside(model: nn.Module, scored: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The measured linears and the linears of the same parents, by path."""
    parents = {path.rpartition(".")[0] for path in scored}
    return {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[0] in parents and (isinstance(module, MeasuredLoRALinear) or is_linear(module))
    }


def _decide_folding(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """In front of a compiled block, whose linears cannot decide while they are compiled: from the tokens of its first
    input, which is what the linears of a block see.
    """
    hidden = next((value for value in (*arguments, *named.values()) if isinstance(value, Tensor)), None)
    for module in block.modules():
        if hidden is not None and isinstance(module, MeasuredLoRALinear) and module.folded is not None:
            module.folded.pays(hidden)

"""RegMean (arXiv 2212.09849): the weight whose outputs are closest, in least squares, to every task's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nsc_kernels.devices import to_float64, with_float64
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.calibration.batches import Batch, naming_tasks
from nsc_merge.calibration.forward_passes import one_by_one
from nsc_merge.methods.closed_form.single_task import alone, changed, draw, in_turn, only_linears
from nsc_merge.methods.gradient_free import empty, low_rank_part, present, with_the_rest
from nsc_merge.methods.method import Method, Problem
from nsc_merge.models.attachment import merged_linears, refuse_unseen
from nsc_merge.models.bases.stored_weights import input_device
from nsc_merge.models.real_tokens import RealTokens
from nsc_merge.processes.group import current
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_count, check_number


@dataclass(frozen=True)
class RegMeanOptions:
    """Options of ``method="regmean"``.

    Biases, gains of DoRA and what was trained in full are averaged over all tasks, as the weights are: a task without
    one counts with the base's.

    Attributes:
        scale: multiplies the merged update.
        batches: how many batches of every task are run; where a task has fewer, its first ones again, which then count
            again.
        off_diagonal: factor on the off-diagonal entries of the Gram matrices; the authors take 0.9 to 1.
        ridge: added to the diagonal of the summed Gram matrix, as a share of its mean.
        modules_at_once: of how many modules Gram matrices ``[d_in, d_in]`` are held at a time, two of each in float64;
            the data is run again for every group. None holds those of all.
    """

    scale: float = 1.0
    batches: int = 8
    off_diagonal: float = 0.95
    ridge: float = 1e-6
    modules_at_once: int | None = None

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_count("batches", self.batches)
        check_number("off_diagonal", self.off_diagonal, 0, 1)
        check_number("ridge", self.ridge, 0)
        if self.modules_at_once is not None:
            check_count("modules_at_once", self.modules_at_once)


def grams(
    problem: Problem, task: str, paths: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Path -> ``X^T X / N [d_in, d_in]`` in float64, of the inputs that a module has in the task's own model, without
    those at padding; of the modules that the task's inputs reach. Processes that share the work run batches in turn.
    """
    model = problem.model
    linears = merged_linears(model, problem.adapters)
    tokens = RealTokens(model)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)
    inputs: dict[str, Any] = {}
    counted = [True]
    called: set[str] = set()

    def record(path: str, z: Tensor) -> None:
        called.add(path)
        if not counted[0]:
            return
        real = tokens.of(path, z[..., 0], inputs)
        flat = to_float64(z.reshape(-1, z.shape[-1]) if real is None else z[real])
        sums[path] = flat.t() @ flat if path not in sums else sums[path].addmm_(flat.t(), flat)
        counts[path] += len(flat)

    with alone(problem, task), ExitStack() as stack, torch.no_grad():
        for path in paths:
            module = model.get_submodule(path)
            hook = module.register_forward_pre_hook(lambda _, given, path=path: record(path, given[0]))
            stack.callback(hook.remove)
        device = input_device(model)
        for _, batch, counted[0] in in_turn(batches):
            inputs = one_by_one([batch], device)[0].inputs
            with naming_tasks({task: batch}):
                model(**inputs)
            refuse_unseen(model, set(paths) - called)
    sizes = torch.tensor([counts[path] for path in paths], device=device)
    current().add([sizes])
    counts = dict(zip(paths, sizes.tolist(), strict=True))
    reached = [path for path in paths if counts[path]]
    for path in reached:
        if path not in sums:
            # Its batches all ran in other processes.
            width = linears[path].in_features
            sums[path] = torch.zeros(width, width, dtype=torch.float64, device=with_float64(device))
        current().add([sums[path]])
    return {path: sums[path] / counts[path] for path in reached}


def filtered_rows(
    problem: Problem, adapters: Mapping[str, Adapter], paths: Sequence[str], options: RegMeanOptions
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path, and task -> the rows ``A_k G_k (sum_j G_j)^-1 [r_k, d_in]`` in float64 on the CPU, of the tasks of
    ``adapters`` that touch it. Those hold low-rank updates of linears alone.
    """
    batches = draw(problem, options.batches)
    size = options.modules_at_once or len(paths)
    for start in range(0, len(paths), size):
        group = paths[start : start + size]
        # One sum for each module, and not the matrix of every task.
        totals: dict[str, Tensor] = {}
        products: dict[str, dict[str, Tensor]] = {path: {} for path in group}
        for task in problem.tasks:
            found = grams(problem, task, group, batches[task])
            if silent := [path for path in group if path in adapters[task].factors and path not in found]:
                raise RuntimeError(
                    f"calibration[{task!r}]: the forward never reached {silent}, which the task's adapter touches; "
                    "expected inputs that do, such as images for a vision tower"
                )
            # A task's inputs count where it has no adapter, too: there its own weight is the base's.
            for path, gram in found.items():
                shrunk = _shrunk(gram, options.off_diagonal)
                factor = adapters[task].factors.get(path)
                if factor is not None:
                    products[path][task] = shrunk @ factor.A.double().t().to(shrunk.device)
                totals[path] = shrunk if path not in totals else totals[path].add_(shrunk)
        for path in group:
            yield path, _filtered(products.pop(path), totals.pop(path), options)


def _filtered(products: Mapping[str, Tensor], total: Tensor, options: RegMeanOptions) -> dict[str, Tensor]:
    """The rows of one linear.

    Args:
        products: task -> ``G_k A_k^T``, of the tasks that have an update.
        total: ``sum_j G_j``, of all tasks.
        options: of the method.
    """
    total.diagonal().add_(options.ridge * total.diagonal().mean().clamp(min=1e-30))
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ValueError(
            f"ridge: the Gram matrix [{total.shape[0]}, {total.shape[0]}] is singular; "
            f"expected more batches or a larger ridge, found batches={options.batches}, ridge={options.ridge:g}"
        )
    rows = torch.cholesky_solve(torch.cat(list(products.values()), 1), factor).t().cpu()
    return dict(zip(products, rows.split([one.shape[1] for one in products.values()]), strict=True))


def _update(factors: Mapping[str, Factor], rows: Mapping[str, Tensor], scale: float) -> Factor:
    """``dW = (sum_k dW_k G_k) (sum_k G_k)^-1``, as factors: the base weight cancels, and with ``dW_k = B_k A_k`` the
    filtered rows take the place of A_k.
    """
    B = torch.cat([factor.scaling * factor.B.double() for factor in factors.values()], 1)
    return Factor(torch.cat(list(rows.values())).float(), (scale * B).float(), 1.0)


def _shrunk(gram: Tensor, factor: float) -> Tensor:
    return factor * gram + (1 - factor) * torch.diag(gram.diagonal())


def _check(problem: Problem, given: Mapping[str, Any]) -> None:
    RegMeanOptions(**given)
    linears, _, paths = low_rank_part(problem)
    only_linears("regmean", linears, paths)


def _run(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    _check(problem, given)
    options = RegMeanOptions(**given)
    linears, low_rank, paths = low_rank_part(problem)
    paths = changed(low_rank, paths)
    merged = {
        path: _update(present(low_rank, path), rows, options.scale)
        for path, rows in filtered_rows(problem, low_rank, paths, options)
    }
    factors = {
        path: with_the_rest(path, merged.get(path) or empty(linear), problem.adapters, options.scale, averages="tasks")
        for path, linear in linears.items()
    }
    return MergeResult(
        "regmean", {}, [], problem.adapters, asdict(options), {}, problem.model, factors=factors
    )


METHODS = (
    Method(
        "regmean",
        "matches every task's own outputs of each layer on its inputs, in least squares (no labels)",
        "RegMean, Jin et al. 2022, arXiv 2212.09849",
        RegMeanOptions,
        _run,
        needs=frozenset({"data"}),
        tuned="scale",
        check=_check,
    ),
)

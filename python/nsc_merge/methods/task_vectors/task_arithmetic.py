"""Task arithmetic, and the references without a merge: the base, each adapter alone, and their ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.adapters.algebra.low_rank import concatenated
from nsc_merge.methods.gradient_free import empty, present
from nsc_merge.methods.method import Method, NoOptions, Problem
from nsc_merge.models.attachment import adapted_linears, merged_linears
from nsc_merge.results.result import MergeResult
from nsc_merge.utils.option_checks import check_number


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """Options of ``method="task_arithmetic"``.

    Attributes:
        scale: the one coefficient of every task and module, or one for each task. 0.4 is where NSC starts; with
            1/K the merged update is the mean.
    """

    scale: float | Mapping[str, float] = 0.4

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Mapping):
            check_number("scale", self.scale)
            return
        for task, value in self.scale.items():
            check_number(f"scale[{task!r}]", value)


def task_arithmetic(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    """``sum_k scale_k s_k B_k A_k``, exact."""
    chosen = TaskArithmeticOptions(**given)
    scales = _scales(chosen, problem.tasks)
    coefficients = {
        path: {
            task: float(scales[task]) if path in adapter.factors else 0.0
            for task, adapter in problem.adapters.items()
        }
        for path in adapted_linears(problem.model, problem.adapters)
    }
    return _result("task_arithmetic", problem, asdict(chosen), coefficients=coefficients)


def sums(
    adapters: Mapping[str, Adapter], paths: Sequence[str], options: TaskArithmeticOptions
) -> Iterator[tuple[str, Factor]]:
    """Path and the same sum as one update, of the rank that the adapters' ranks add up to."""
    scales = _scales(options, list(adapters))
    for path in paths:
        A, B = concatenated((scales[task], factor) for task, factor in present(adapters, path).items())
        yield path, Factor(A.float(), B.float(), 1.0)


def _scales(options: TaskArithmeticOptions, tasks: Sequence[str]) -> Mapping[str, float]:
    if not isinstance(options.scale, Mapping):
        return dict.fromkeys(tasks, float(options.scale))
    if set(options.scale) != set(tasks):
        raise ValueError(
            f"scale: expected one value for each of {list(tasks)}, found {sorted(options.scale, key=str)}"
        )
    return options.scale


def _zero_shot(problem: Problem, given: Mapping[str, Any]) -> MergeResult:
    linears = merged_linears(problem.model, problem.adapters)
    return _result(
        "zero_shot", problem, {}, factors={path: empty(linear) for path, linear in linears.items()}
    )


def _alone(name: str, problem: Problem) -> MergeResult:
    linears = merged_linears(problem.model, problem.adapters)
    per_task = {
        task: {path: adapter.factors.get(path, empty(linear)) for path, linear in linears.items()}
        for task, adapter in problem.adapters.items()
    }
    return _result(name, problem, {}, per_task=per_task)


def _result(name: str, problem: Problem, options: dict[str, Any], **parts: Any) -> MergeResult:
    return MergeResult(
        method=name,
        history=[],
        adapters=problem.adapters,
        options=options,
        dead={},
        model=problem.model,
        **{"coefficients": {}, **parts},
    )


METHODS = (
    Method(
        "task_arithmetic",
        "one coefficient for everything",
        "Task Arithmetic, Ilharco et al. 2023, arXiv 2212.04089",
        TaskArithmeticOptions,
        task_arithmetic,
        gives="coefficients",
        tuned="scale",
        updates=sums,
        weighted="scale",
        check=lambda problem, given: _scales(TaskArithmeticOptions(**given), problem.tasks),
    ),
    Method(
        "zero_shot",
        "the base model, without any adapter (a reference)",
        "the floor in the tables of arXiv 2603.26317",
        NoOptions,
        _zero_shot,
        gives="nothing",
    ),
    Method(
        "finetuned",
        "each task with its own adapter (a reference: one model per task)",
        "the ceiling in the tables of arXiv 2603.26317",
        NoOptions,
        lambda problem, given: _alone("finetuned", problem),
        per_task=True,
    ),
    Method(
        "ensemble",
        "all adapters' models side by side; whoever evaluates averages their outputs (a reference)",
        "a reference row of 'On the Representation Geometry of LoRA Model Merging'",
        NoOptions,
        lambda problem, given: _alone("ensemble", problem),
        per_task=True,
        averages_outputs=True,
    ),
)

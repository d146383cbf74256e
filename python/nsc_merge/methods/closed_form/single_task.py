"""One task by itself: its own model, and batches of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nsc_merge.adapters import Adapter
from nsc_merge.calibration.batches import Batch, streams
from nsc_merge.methods.gradient_free import present
from nsc_merge.methods.method import Problem
from nsc_merge.models.attachment import attach
from nsc_merge.models.bases.quantised import Linear
from nsc_merge.models.forward_contexts import evaluating, recomputed, without_key_value_cache
from nsc_merge.models.merged.whole import Site
from nsc_merge.processes.group import current


@contextmanager
def alone(problem: Problem, task: str) -> Iterator[Any]:
    """The model with one task's adapter at 1, in evaluation mode; yields the merged linears by path."""
    # In its own model a task has all of a shared module's update, not the share that it has in the merge.
    whole = problem.adapters[task].with_factors(lambda _, factor: replace(factor, fixed=None))
    with (
        evaluating(problem.model),
        attach(problem.model, {task: whole}, 1.0) as merged,
        recomputed(problem.model),
        without_key_value_cache(problem.model),
    ):
        yield merged


def draw(problem: Problem, count: int) -> dict[str, list[Batch]]:
    """Task -> ``count`` batches."""
    drawn = streams(problem.calibration, problem.tasks)
    return {task: [next(stream) for _ in range(count)] for task, stream in drawn.items()}


def in_turn(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch, bool]]:
    """This process's batches of those that several share, with their numbers, and whether they count: all run equally
    many, since a model in shards runs in all of them at once, so that some repeat one that counts elsewhere.
    """
    group = current()
    for first in range(0, len(batches), group.size):
        own = min(first + group.rank, len(batches) - 1)
        yield own, batches[own], own == first + group.rank


def changed(adapters: Mapping[str, Adapter], paths: Sequence[str]) -> list[str]:
    """The modules whose update is not zero for all tasks: of those that training never reached, as a part of the model
    that does not run, nobody needs inputs. All, where nothing is left.
    """
    factors = {path: present(adapters, path).values() for path in paths}
    return [path for path in paths if any(bool(one.B.any()) for one in factors[path])] or list(paths)


def only_linears(method: str, linears: Mapping[str, Linear], paths: Sequence[str]) -> None:
    """Refuse low-rank updates of embeddings, whose inputs are numbers of tokens and no vectors.

    Raises:
        ValueError: naming the first.
    """
    other = next((path for path in paths if isinstance(linears[path], Site)), None)
    if other is not None:
        raise ValueError(
            f"method {method!r}: {other} is no linear, but has LoRA or trained tokens, and the method weighs updates "
            "by the inputs of linears; expected adapters without it, or a method such as 'task_arithmetic'"
        )

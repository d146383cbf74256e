"""The lm-evaluation-harness on models that are in memory."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nsc_merge.evaluation.eval_recipe import EvalRecipe, HarnessTask
from nsc_merge.evaluation.scoring import Candidate, models_of
from nsc_merge.evaluation.suite import RecipeSuite
from nsc_merge.utils.option_checks import did_you_mean
from nsc_merge.utils.progress import on_terminal

SPLITS = {"test": "test_split", "val": "validation_split"}


@dataclass(frozen=True)
class HarnessScore:
    """One figure of the harness.

    Attributes:
        metric: its name there, with the filter behind a comma where there is one.
        value: of it.
        stderr: its standard error as the harness has it, None where it has none.
        lower_is_better: direction, by the harness.
        samples: that were measured.
        version: of the task.
    """

    metric: str
    value: float
    stderr: float | None
    lower_is_better: bool
    samples: int
    version: Any

    def record(self) -> dict[str, Any]:
        """What is kept of it beside the value."""
        return {key: value for key, value in asdict(self).items() if key != "value"}


class Harness:
    """The harness with the tasks of a recipe, which are read once.

    Args:
        recipe: with its seed put in.
        suite: of the same recipe.

    Raises:
        ValueError: if the base is no language model, if there is no such task or metric, or if a row is tuned by data
            that would be measured afterwards; naming the key, what was found and what was expected.
    """

    def __init__(self, recipe: EvalRecipe, suite: RecipeSuite) -> None:
        self._recipe, self._suite = recipe, suite
        self._tasks: dict[tuple[HarnessTask, str], Any] = {}
        with _quiet():
            can_generate: Any = getattr(suite.model, "can_generate", bool)
            if not can_generate():
                first = next(iter(recipe.harness))
                raise ValueError(
                    f"tasks.{first}.lm_eval: expected a base that generates text, found {type(suite.model).__name__}"
                )
            self._tokenizer = suite.tokenizer(f"tasks.{next(iter(recipe.harness))}.lm_eval")
            self._manager = _manager(recipe.lm_eval.include_path, recipe.lm_eval.builtin)
            for task in recipe.harness.values():
                self._check(task)
        if any(row.tune is not None for row in recipe.rows):
            for task in recipe.harness.values():
                self._check_tunable(task)

    def scores(self, candidate: Candidate, split: str) -> dict[str, HarnessScore]:
        """Task -> figure of a candidate on ``"val"`` or ``"test"``.

        Every model that ``candidate`` is of is made once for all tasks that it serves.
        """
        found: dict[str, HarnessScore] = {}
        for served, (enter,) in models_of(self._suite, candidate, list(self._recipe.harness)):
            with enter() as model:
                found |= self._measured(model, served, split)
        return {name: found[name] for name in self._recipe.harness}

    def _measured(self, model: nn.Module, names: Sequence[str], split: str) -> dict[str, HarnessScore]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        settings = self._recipe.lm_eval
        size = self._recipe.batch_size if settings.batch_size is None else settings.batch_size
        found = {}
        with _quiet():
            lm = HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=size)
            for together in self._calls(names, split):
                one = self._recipe.harness[together[0]]
                # The same task of two adapters is measured once where they share a model.
                tasks = {self._recipe.harness[name].lm_eval: self._task(name, split) for name in together}
                results: Any = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=list(tasks.values()),
                    num_fewshot=one.num_fewshot,
                    batch_size=size,
                    limit=one.limit,
                    log_samples=False,
                    apply_chat_template=settings.apply_chat_template,
                    system_instruction=settings.system_instruction,
                    task_manager=self._manager,
                )
                for name in together:
                    found[name] = _score(results, self._recipe.harness[name])
        return found

    def _calls(self, names: Sequence[str], split: str) -> list[list[str]]:
        """Tasks that one call measures: of the same settings, and none beside a group that holds it."""
        calls: list[tuple[Any, dict[str, set[str]], list[str]]] = []
        for name in names:
            task = self._recipe.harness[name]
            leaves = {leaf.task_name for leaf in _leaves(self._task(name, split))}
            for settings, known, together in calls:
                others = set().union(*(held for other, held in known.items() if other != task.lm_eval))
                if settings == (task.limit, task.num_fewshot) and not leaves & others:
                    known[task.lm_eval] = leaves
                    together.append(name)
                    break
            else:
                calls.append(((task.limit, task.num_fewshot), {task.lm_eval: leaves}, [name]))
        return [together for _, _, together in calls]

    def _task(self, name: str, split: str) -> Any:
        """A task or group of the harness, with its data; for ``"val"`` those of its validation split."""
        task = self._recipe.harness[name]
        if (task, split) not in self._tasks:
            try:
                (loaded,) = self._load(task.lm_eval)
            except Exception as error:
                # Of files and data of many kinds, and perhaps of code that a task file names.
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"tasks.{name}.lm_eval: the harness cannot load {task.lm_eval!r}: {reason:.300}"
                ) from error
            for leaf in _leaves(loaded):
                if split == "val":
                    leaf.set_config("test_split", leaf.get_config("validation_split"))
                    _leave_out_the_question(leaf)
            self._tasks[task, split] = loaded
        return self._tasks[task, split]

    def _load(self, name: str) -> list[Any]:
        loaded = self._manager.load([name])
        return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())

    def _check(self, task: HarnessTask) -> None:
        key = f"tasks.{task.name}.lm_eval"
        if task.lm_eval not in self._manager.all_tasks:
            hint = did_you_mean(task.lm_eval, self._manager.all_tasks)
            raise ValueError(f"{key}: the harness has no task {task.lm_eval!r}{hint}")
        if task.lm_eval in self._manager.all_tags:
            listed = sorted(self._manager.task_index[task.lm_eval].tags)
            raise ValueError(f"{key}: {task.lm_eval!r} is a tag with no figure of its own; expected one of {listed}")
        known = dict.fromkeys(
            metric for leaf in _leaves(self._task(task.name, "test")) for metric in leaf.higher_is_better()
        )
        if task.metric is not None and task.metric.partition(",")[0] not in known:
            raise ValueError(f"tasks.{task.name}.metric: expected one of {list(known)}, found {task.metric!r}")

    def _check_tunable(self, task: HarnessTask) -> None:
        for leaf in _leaves(self._task(task.name, "test")):
            test, validation = (leaf.get_config(key) for key in SPLITS.values())
            if not test or not validation or test == validation:
                raise ValueError(
                    f"methods: tune needs data beside those that are measured, and {leaf.task_name} of the harness "
                    f"(tasks.{task.name}) has test_split {test!r} and validation_split {validation!r}; give the scale "
                    "as options.scale"
                )
            questions = [{repr(doc) for doc in leaf.dataset[split]} for split in (test, validation)]
            if questions[0] <= questions[1] or questions[1] <= questions[0]:
                raise ValueError(
                    f"methods: tune needs data beside those that are measured, and {test} and {validation} of "
                    f"{leaf.task_name} of the harness (tasks.{task.name}) hold the same; give the scale as "
                    "options.scale"
                )


def _manager(include_path: Path | None, builtin: bool) -> Any:
    """The harness's index of tasks; without its own where none of them is asked for, as to read those takes seconds."""
    from lm_eval.tasks import TaskManager

    if builtin:
        return _with_builtin(include_path)
    return TaskManager(include_path=str(include_path), include_defaults=False)


@functools.lru_cache(maxsize=1)
def _with_builtin(include_path: Path | None) -> Any:
    """Once for all seeds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))


def _leaves(task: Any) -> list[Any]:
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def _leave_out_the_question(leaf: Any) -> None:
    """Where the examples in front of a question are of the split that is measured, have the harness leave out the
    question itself, which it does as long as it is told that split by name.
    """
    examples = getattr(leaf, "fewshot_cfg", None)
    if examples is not None and examples.split is None and examples.samples is None and not leaf.has_training_docs():
        examples.split = leaf.get_config("test_split")


def _score(results: Mapping[str, Any], task: HarnessTask) -> HarnessScore:
    """The figure that was asked for, of all that the harness found."""
    found = results["results"][task.lm_eval]
    figures = {
        key: value for key, value in found.items() if "," in key and not key.partition(",")[0].endswith("_stderr")
    }
    wanted = task.metric
    key = next((key for key in figures if wanted in (None, key, key.partition(",")[0])), None)
    if key is None:
        raise ValueError(f"tasks.{task.name}.metric: expected one of {list(figures)}, found {wanted!r}")
    metric, _, by = key.partition(",")
    error = found.get(f"{metric}_stderr,{by}")
    counts = results["n-samples"]
    members = _members(results["group_subtasks"], task.lm_eval)
    return HarnessScore(
        metric=metric if by == "none" else key,
        value=float(figures[key]),
        stderr=float(error) if isinstance(error, int | float) else None,
        # None where members of a group disagree, or where nobody said; the harness takes True then.
        lower_is_better=results["higher_is_better"].get(task.lm_eval, {}).get(metric) is False,
        samples=sum(counts[member]["effective"] for member in members if member in counts),
        version=results["versions"].get(task.lm_eval),
    )


def _members(groups: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The tasks of a group, of groups in it, too; of a task that itself."""
    if not groups.get(name):
        return [name]
    return [member for child in groups[name] for member in _members(groups, child)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks; its bars only where somebody looks on."""
    names = ("lm_eval", "lm-eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if on_terminal():
            yield
        else:
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

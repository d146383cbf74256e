"""The null-space ratio over the training of an adapter, beside its validation loss (Fig. 1, 3 and 4 of arXiv
2603.26317).
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nsc_merge.adapters import CONFIG_FILE, AdapterSource
from nsc_merge.analysis.null_space_ratios import low_rank_part, per_sample_ratios
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.api import merge
from nsc_merge.utils.json_text import from_json
from nsc_merge.utils.plot_style import place
from nsc_merge.utils.progress import Progress

_LAST_NUMBER = re.compile(r"(\d+)\D*$")
_TASK = "adapter"
_OUTSIDE = "other"
LOG_FILES = ("steps.jsonl", "log.jsonl", "trainer_state.json")


@dataclass(frozen=True)
class Tracking:
    """Ratios of one adapter at several steps of its training, each in the model of that step.

    Attributes:
        steps: in rising order.
        omega: module path -> mean ratio at every step.
        random: what a random A of that rank gives, ``sqrt(1 - r / d_in)``, mean over modules.
        columns: name -> step -> value, of what was logged, such as the validation loss.
    """

    steps: list[int]
    omega: dict[str, list[float]]
    random: float
    columns: dict[str, dict[int, float]] = field(default_factory=dict)

    def mean(self) -> list[float]:
        """Mean over all modules, at every step."""
        return _mean(list(self.omega.values()))

    def by_block(self) -> dict[str, list[float]]:
        """Block -> mean over its modules, at every step."""
        return self._grouped(lambda path: _OUTSIDE if place(path)[0] < 0 else str(place(path)[0]))

    def by_name(self) -> dict[str, list[float]]:
        """Last component of the path, such as ``o_proj`` -> mean over the blocks, at every step."""
        return self._grouped(lambda path: path.rpartition(".")[2])

    def _grouped(self, key: Callable[[str], str]) -> dict[str, list[float]]:
        groups: dict[str, list[list[float]]] = {}
        for path, values in self.omega.items():
            groups.setdefault(key(path), []).append(values)
        return {name: _mean(group) for name, group in groups.items()}

    def shared(self, column: str) -> list[int]:
        """Numbers of the steps at which a column has a value, too; NaN, as of a loss that overflowed, is none."""
        values = self.columns[column]
        return [number for number, step in enumerate(self.steps) if not math.isnan(values.get(step, math.nan))]

    def correlations(self, column: str) -> dict[str, Any]:
        """Spearman's rho between a column and the ratio over the steps that have both.

        Both mostly fall throughout training, so that a rho near 1 is close to automatic; ``changes``, between the
        differences of successive steps, does not share that.

        Returns:
            ``all`` (mean over modules), ``changes``, ``steps`` (how many), and by group ``blocks`` and ``names``.

        Raises:
            ValueError: if there is no such column, or fewer than three steps in common.
        """
        if column not in self.columns:
            raise ValueError(f"column: expected one of {list(self.columns)}, found {column!r}")
        shared = self.shared(column)
        if len(shared) < 3:
            raise ValueError(
                f"column: expected at least 3 steps with {column!r} and a ratio, found {len(shared)}"
            )
        logged = [self.columns[column][self.steps[number]] for number in shared]

        def rho(values: Sequence[float]) -> float:
            return rank_correlation(logged, [values[number] for number in shared])

        ours = [self.mean()[number] for number in shared]
        return {
            "all": rho(self.mean()),
            "changes": rank_correlation(_differences(logged), _differences(ours)),
            "steps": len(shared),
            "blocks": {name: rho(values) for name, values in self.by_block().items()},
            "names": {name: rho(values) for name, values in self.by_name().items()},
        }

    def document(self) -> dict[str, Any]:
        """Everything, for JSON; what is not defined is None."""
        return {
            "steps": self.steps,
            "random": self.random,
            "mean": self.mean(),
            "blocks": self.by_block(),
            "names": self.by_name(),
            "modules": self.omega,
            "columns": {
                name: {str(step): value for step, value in column.items()}
                for name, column in self.columns.items()
            },
        }


def track(
    model: nn.Module,
    checkpoints: Sequence[tuple[int, AdapterSource]],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    columns: Mapping[str, Mapping[int, float]] | None = None,
    modules: Sequence[str] | None = None,
    blocks: str | int | Sequence[int] | None = None,
    dora: str = "refuse",
    progress: bool | None = None,
) -> Tracking:
    """Measure an adapter at several steps of its training, on the same inputs.

    Args:
        model: the base model.
        checkpoints: step and adapter.
        batches: model inputs that were not trained on.
        columns: what was logged at which step, for :meth:`Tracking.correlations`.
        modules, blocks: as in :func:`nsc_merge.analysis.per_sample_ratios`.
        dora: as in :func:`nsc_merge.merge`.
        progress: as in :class:`nsc_merge.utils.progress.Progress`.

    Raises:
        ValueError: if there is no checkpoint or no batch, or if the checkpoints touch different modules.
    """
    if not checkpoints:
        raise ValueError("checkpoints: expected at least one, found none")
    ordered = sorted(checkpoints, key=lambda pair: pair[0])
    omega: dict[str, list[float]] = {}
    random = math.nan
    with Progress("checkpoints", len(ordered), progress) as bar:
        for number, (step, source) in enumerate(ordered):
            whole = merge(model, {_TASK: source}, method="task_arithmetic", scale=1.0, dora=dora)
            found = per_sample_ratios(model, whole, batches, modules=modules, blocks=blocks).by_module(_TASK)
            if number and set(found) != set(omega):
                odd = sorted(set(found) ^ set(omega))[0]
                raise ValueError(f"checkpoints: that of step {step} and the first disagree on module {odd}")
            for path, value in found.items():
                omega.setdefault(path, []).append(value)
            if not number:
                factors = low_rank_part(model, whole.adapters, modules, blocks)[_TASK].factors.values()
                random = statistics.fmean(math.sqrt(max(0.0, 1 - f.rank / f.A.shape[1])) for f in factors)
            bar.update(step=step, ratio=f"{statistics.fmean(found.values()):.4f}")
    steps = [step for step, _ in ordered]
    return Tracking(steps, omega, random, {name: dict(values) for name, values in (columns or {}).items()})


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The PEFT folders in ``folder``, or in ``folder/steps``, with the step that the last number of the name says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if two say the same step.
    """
    folder = Path(folder)
    for parent in (folder, folder / "steps"):
        found = [
            (int(match[1]), child)
            for child in (sorted(parent.iterdir()) if parent.is_dir() else ())
            if (child / CONFIG_FILE).is_file() and (match := _LAST_NUMBER.search(child.name))
        ]
        if not found:
            continue
        steps = [step for step, _ in found]
        twice = next((step for step in steps if steps.count(step) > 1), None)
        if twice is not None:
            raise ValueError(f"checkpoints: two folders in {parent} say step {twice}")
        return sorted(found)
    raise FileNotFoundError(
        f"checkpoints: {folder}: expected PEFT folders whose names end in the step, such as checkpoint-500, found none"
    )


def find_log(folder: str | Path) -> Path | None:
    """What was logged beside checkpoints: one of :data:`LOG_FILES` in the folder, or in its last checkpoint."""
    places = [Path(folder), *(path for _, path in reversed(find_checkpoints(folder)))]
    return next((file for one in places for name in LOG_FILES if (file := one / name).is_file()), None)


def read_log(file: str | Path) -> dict[str, dict[int, float]]:
    """Columns of a log by step: JSON lines with a ``step`` and numbers, or the ``trainer_state.json`` of transformers.

    Raises:
        ValueError: if it is neither.
    """
    file = Path(file)
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            entries = from_json(text, "it", not_finite=True)["log_history"]
        else:
            entries = [from_json(line, "a line", not_finite=True) for line in text.splitlines() if line.strip()]
        columns: dict[str, dict[int, float]] = {}
        for entry in entries:
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    columns.setdefault(name, {})[int(entry["step"])] = float(value)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"log: {file}: expected JSON lines with a step and numbers, or a trainer_state.json: {error}"
        ) from None
    if not columns:
        raise ValueError(f"log: {file}: expected numbers by step, found none")
    return columns


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def _differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]

"""What an evaluation recipe says: tasks, rows of the table, and how they are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.evaluation.metrics import METRICS, Metric
from nsc_merge.methods.scale_tuning import COARSE, FINE_STEP, FINE_STEPS
from nsc_merge.recipes.adapter_keys import HubAdapter
from nsc_merge.recipes.calibration_keys import CalibrationSource, check_there
from nsc_merge.recipes.placement_keys import Placed
from nsc_merge.recipes.yaml_keys import RecipeError, count, flag

SEED = "{seed}"
LABELLED = ("test", "validation")
_SEARCH = ("max_new_tokens", "num_beams")
# Of a task whose answers are generated.
ANSWER_KEYS = ("generate", *_SEARCH)


def path_of(place: Path | CalibrationSource | None) -> Path | None:
    """The file or folder of labelled or raw data; None of what is on the hub."""
    if isinstance(place, CalibrationSource):
        return Path(place.source) if place.local else None
    return place


@dataclass(frozen=True, kw_only=True)
class MeasuredTask:
    """What every task has; paths are absolute.

    Attributes:
        name: of the task.
        adapter: PEFT folder, or place on the hub.
        calibration: unlabelled inputs for methods that need data: raw data, a safetensors file of stacked inputs, or a
            folder of batches.
    """

    name: str
    adapter: Path | HubAdapter
    calibration: CalibrationSource | None = None

    @property
    def paths(self) -> dict[str, Path]:
        """Key -> path, of all that the task reads on disk."""
        adapter = {"adapter": self.adapter} if isinstance(self.adapter, Path) else {}
        calibration = path_of(self.calibration)
        return adapter | ({} if calibration is None else {"calibration": calibration})

    @property
    def sources(self) -> dict[str, CalibrationSource]:
        """Key -> raw data, or inputs for methods that need data."""
        return {} if self.calibration is None else {"calibration": self.calibration}

    @property
    def offline(self) -> bool:
        """Whether nothing that it names is on the hub."""
        return isinstance(self.adapter, Path) and all(source.offline for source in self.sources.values())


@dataclass(frozen=True, kw_only=True)
class TaskRecipe(MeasuredTask):
    """A task that is measured on labelled inputs, of which ``validation`` also serves methods that need data where
    there is no ``calibration``.

    Attributes:
        test: labelled inputs that every row is measured on: a safetensors file, or a folder of batches; or raw data.
        validation: labelled inputs for tuning.
        labels: name of the labels among the tensors, or their column in raw data; None for a usual one.
        metric: what is reported.
        head: ``"adapter"`` (what the PEFT folder brought), ``"model"`` (the model's own), a safetensors file, or None:
            the adapter's if it has one, else the model's.
        pool: of a linear head on features; see :class:`nsc_merge.evaluation.heads.LinearHead`; of an embedding, what it
            is of the features, where no modules of sentence-transformers say it.
        generate: whether answers are generated, greedily or by beams.
        max_new_tokens: of an answer; as many as the longest label has where there is none.
        num_beams: of the search; 1 is greedy.
        classes: names of the classes, by which tasks share them in the joint evaluation, and raw data name them.
    """

    test: Path | CalibrationSource
    metric: Metric
    validation: Path | CalibrationSource | None = None
    labels: str | None = None
    head: str | None = None
    pool: str | None = None
    generate: bool = False
    max_new_tokens: int | None = None
    num_beams: int = 1
    classes: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it compares texts that are read each alone."""
        return isinstance(self.test, CalibrationSource) and self.test.settings.texts is not None

    @property
    def embeds(self) -> bool:
        """Whether it compares the embeddings of such texts."""
        return self.alone and not self.metric.scores

    @property
    def classifies(self) -> bool:
        """Whether it is measured by the accuracy of classes that heads tell apart."""
        return self.metric.name == "accuracy" and not self.embeds

    @property
    def paths(self) -> dict[str, Path]:
        own = {key: place for key in LABELLED if (place := path_of(getattr(self, key))) is not None}
        head = {} if self.head in (None, "adapter", "model") else {"head": Path(str(self.head))}
        return super().paths | own | head

    @property
    def sources(self) -> dict[str, CalibrationSource]:
        held = {key: getattr(self, key) for key in LABELLED}
        return super().sources | {key: one for key, one in held.items() if isinstance(one, CalibrationSource)}


@dataclass(frozen=True, kw_only=True)
class HarnessTask(MeasuredTask):
    """A task of the lm-evaluation-harness.

    Attributes:
        lm_eval: name of a task or of a group of tasks there.
        metric: name of one of its figures, with the filter behind a comma where it has several; None for its first.
        limit: samples at most, or a share of them below 1; None for all.
        num_fewshot: examples in front of every question; None for as many as the task says.
    """

    lm_eval: str
    metric: str | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None


@dataclass(frozen=True)
class HarnessSettings:
    """How the lm-evaluation-harness measures.

    Attributes:
        include_path: folder of task files of one's own, which come before those of the harness.
        batch_size: requests per batch, or ``"auto"``; that of the recipe when None.
        apply_chat_template: whether prompts are put as the tokenizer's chat template has them.
        system_instruction: what stands in front of every prompt, in a chat as the system's message; None for nothing.
        builtin: whether some task is one of the harness's own.
        needs_network: whether some task's data are on the hub.
        data: files that tasks of one's own read.
    """

    include_path: Path | None = None
    batch_size: int | str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    builtin: bool = False
    needs_network: bool = False
    data: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """How a scale is chosen on validation data; see :func:`nsc_merge.methods.scale_tuning.tune_scale`."""

    by: str
    coarse: tuple[float, ...] = COARSE
    fine_step: float | None = FINE_STEP
    fine_steps: int = FINE_STEPS


@dataclass(frozen=True)
class Row:
    """One row of the table: a method with its options, or a folder with a finished merge, adapter or model."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tune: Tuning | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class EvalRecipe(Placed):
    """A checked evaluation recipe; paths are absolute, and may hold ``{seed}``. What it says of the base model's place
    is in :class:`nsc_merge.recipes.placement_keys.Placed`.

    Attributes:
        model: folder of the base model, or a hub id.
        local: whether ``model`` is a folder.
        revision: branch, tag or commit of a model on the hub; None for the newest.
        trust_remote_code: whether code that comes with the base model, its tokenizer and its processor may be run.
        tasks: in the order of the tables.
        rows: of the tables, with ``zero_shot`` and ``finetuned`` among them.
        out: output folder.
        data: defaults of raw calibration data, among which the tokenizer is found.
        lm_eval: how tasks of the lm-evaluation-harness are measured.
        seeds: every row is repeated for each; without any, one run of seed 0 that takes all data in order.
        joint: how the scores of several tasks' heads are put together for Hits@k; None leaves that table out.
        batch_size: rows of a data file per batch.
        shared_modules, dora: as in :func:`nsc_merge.merge`.
        plots: whether to draw.
    """

    model: str
    local: bool
    tasks: dict[str, TaskRecipe | HarnessTask]
    rows: tuple[Row, ...]
    out: Path
    revision: str | None = None
    trust_remote_code: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    lm_eval: HarnessSettings = HarnessSettings()
    seeds: tuple[int, ...] = ()
    joint: str | None = None
    batch_size: int = 32
    shared_modules: str = "lambda"
    dora: str = "exact"
    plots: bool = True

    @property
    def labelled(self) -> dict[str, TaskRecipe]:
        """The tasks that are measured on labelled inputs."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, TaskRecipe)}

    @property
    def harness(self) -> dict[str, HarnessTask]:
        """The tasks that the lm-evaluation-harness measures."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, HarnessTask)}

    @property
    def offline(self) -> bool:
        """Whether nothing may touch the network: nothing that it names is on the hub."""
        tokenizer = self.data.tokenizer is None or Path(self.data.tokenizer).is_absolute()
        places = self.local and tokenizer and all(task.offline for task in self.tasks.values())
        return places and not self.lm_eval.needs_network

    def at(self, seed: int) -> EvalRecipe:
        """The recipe with ``{seed}`` replaced in every path.

        Raises:
            RecipeError: if a path is missing.
        """

        def put(path: Path) -> Path:
            return Path(str(path).replace(SEED, str(seed)))

        tasks: dict[str, TaskRecipe | HarnessTask] = {}
        for name, task in self.tasks.items():
            changed: dict[str, Any] = {}
            for key, path in task.paths.items():
                found = put(path)
                if key in task.sources:
                    changed[key] = replace(task.sources[key], source=str(found))
                    check_there(f"tasks.{name}.{key}", changed[key])
                    continue
                if not (found.is_dir() if key == "adapter" else found.exists()):
                    wanted = "a PEFT folder" if key == "adapter" else "a safetensors file"
                    if key in LABELLED:
                        wanted += " or a folder of them"
                    raise RecipeError(f"tasks.{name}.{key}: expected {wanted}, {found} is missing")
                changed[key] = str(found) if key == "head" else found
            tasks[name] = replace(task, **changed)
        model = self.model.replace(SEED, str(seed))
        if self.local and not Path(model).is_dir():
            raise RecipeError(f"model: expected a folder or a hub id, {model} is no folder")
        rows = []
        for row in self.rows:
            folder = None if row.folder is None else put(row.folder)
            if folder is not None and not folder.is_dir():
                raise RecipeError(f"methods.{row.name}.folder: expected a folder, {folder} is none")
            rows.append(replace(row, folder=folder))
        return replace(self, model=model, tasks=tasks, rows=tuple(rows))


def answer_keys(value: Mapping[str, Any], prefix: str, metric: Metric) -> dict[str, Any]:
    """Whether answers are generated, of how many tokens at most, and by how many beams, as a task says it.

    Raises:
        RecipeError: naming the key, if it does not go with the metric or the other keys of the task.
    """
    generate = flag(value, "generate", prefix, False)
    found: dict[str, Any] = {one: count(value[one], prefix + one) for one in _SEARCH if value.get(one) is not None}
    if not generate:
        if metric.writes:
            raise RecipeError(f"{prefix}generate: metric {metric.name} needs true, found false")
        if found:
            raise RecipeError(f"{prefix}{next(iter(found))}: is of generated answers; expected generate: true, too")
        return {}
    written = [one.name for one in METRICS.values() if one.writes]
    if metric.name not in ("exact_match", *written):
        raise RecipeError(
            f"{prefix}metric: a task that generates has exact_match or one of {written}, found {metric.name}"
        )
    if value.get("pool") is not None or value.get("head") not in (None, "model"):
        raise RecipeError(f"{prefix}head: a task that generates uses the model's own head")
    return {"generate": True, **found}

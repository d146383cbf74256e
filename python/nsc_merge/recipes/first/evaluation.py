"""A first evaluation recipe: labelled raw data of each task looked at, and what they are measured by."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nsc_merge.adapters.folder_about import class_names
from nsc_merge.calibration.raw.chats import is_chat
from nsc_merge.calibration.raw.columns import choose
from nsc_merge.calibration.raw.drawing import Row
from nsc_merge.calibration.raw.labels import CLASS_COLUMNS, Labelling
from nsc_merge.calibration.raw.preprocessors import Base, base_of
from nsc_merge.calibration.raw.reading import batches_of, is_raw, open_source
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.templates import named_text
from nsc_merge.calibration.raw.word_lists import as_list, holds_tags, marks_entities
from nsc_merge.models.bases.placement import PLAIN, is_choice
from nsc_merge.models.block_finding import encodes, hears
from nsc_merge.recipes.first.commented_yaml import Yaml, key_of, relative, shown
from nsc_merge.recipes.first.data import sources
from nsc_merge.recipes.first.findings import FEW_TASKS, WITHOUT_DATA, Findings
from nsc_merge.recipes.first.looking import ROWS, SAMPLES, asked_in, chats_in, compared_in, embedded_in, preferred_in
from nsc_merge.recipes.first.tasks import Task
from nsc_merge.recipes.yaml_keys import RecipeError

# By what is measured where nobody has said; others that fit.
_METRICS = {
    "class": ("accuracy", "or f1, f1_binary, matthews"),
    "classes": ("multilabel_f1", "of all classes that a logit above 0 predicts"),
    "value": ("pearson", "or spearman, rmse, l1"),
    "similar": ("spearman", "of how near two embeddings are and labels that are higher for what is alike; or pearson"),
    "same": ("ndcg", "of the second among those of all rows, by its embedding; or mrr, recall"),
    "preferred": ("pairwise_accuracy", "of the first having a higher score than the other"),
    "nearest": ("accuracy", "of the second being nearer to the first than others are"),
    "answer": ("exact_match", "or rougeL, bleu, cider, vqa"),
    "speech": ("wer", "or cer, exact_match, bleu"),
    "entities": ("entity_f1", "or accuracy, f1, exact_match"),
    "tags": ("accuracy", "of words; or f1, exact_match; entity_f1 where classes are called O, B-X, I-X, ..."),
}


@dataclass(frozen=True)
class Test:
    """Labelled data of a task.

    Attributes:
        source: absolute path.
        said: what was found, in a line.
        kind: key of the metrics that fit.
        settings: those of raw data that have to be written.
        labels: their column, where that has to be written.
    """

    source: str
    said: str
    kind: str
    settings: Mapping[str, Any]
    labels: str | None = None


def look_at_tests(arguments: Sequence[str], found: Findings, text: str | None = None) -> dict[str, Test]:
    """Task -> its labelled data, of which a few samples are encoded with their labels, so that errors come now.

    Args:
        arguments: of ``--test``, as those of ``--data``.
        found: what the recipe is written from.
        text: column or template of the text, where the rows have it beside their label; found when None.

    Raises:
        RecipeError, ValueError, OSError: naming ``--test`` and the task.
    """
    places = sources(arguments, [task.name for task in found.tasks], "--test")
    return {task.name: _look(places[task.name], task, found, text) for task in found.tasks if task.name in places}


def _look(source: str, task: Task, found: Findings, text: str | None) -> Test:
    argument = f"--test {task.name}"
    if not Path(source).is_absolute() or not is_raw(source):
        raise RecipeError(
            f"{argument}: expected raw data on disk with labels, found {source}; tensors and data sets on the hub are "
            "named in an evaluation recipe (docs/evaluation.md)"
        )
    settings = DataSettings()
    takes = base_of(found.base.source, found.base.revision, settings, argument)
    opened = open_source(source, settings, argument, of_audio=takes.audio_files)
    rows = opened.rows(range(min(opened.count, ROWS)))
    texts = embedded_in(rows, found.base.embedded) if task.name not in found.heads else None
    if texts is None:
        _check_head(task, found, argument)
    kind = _kind(task, found, tags=takes.words) if texts is None else _compared(texts, opened.columns, argument)
    if kind == "value" and texts is None and not set(CLASS_COLUMNS) & set(opened.columns):
        texts = preferred_in(rows)
        if texts is None and {"chosen", "rejected"} <= set(opened.columns):
            raise RecipeError(
                f"{argument}: nobody says how what chosen and rejected answer stands in front of them; expected both "
                'whole, or with a column prompt of their kind, or a recipe with test: {source: FILE, texts: '
                '["{question}{chosen}", "{question}{rejected}"]}, as they were put together in training'
            )
        kind = kind if texts is None else "preferred"
    if kind == "class" and any(as_list(row.get(name)) is not None for row in rows for name in CLASS_COLUMNS):
        kind = "classes"
    known = kind in ("tags", "classes") or (kind == "class" and _classifies(task, found))
    count = _count(task, found) if known else None
    labelling = Labelling(kind, None, _classes(task, found), count, generated=kind == "answer")
    if kind == "tags":
        labelling = replace(labelling, column=_tags(task, opened.columns, rows, labelling, argument))
    settings = DataSettings(texts=texts)
    if texts is None:
        kind_there = task.kind_on(found.base.model)
        try:
            settings = _settings(opened.columns, rows, takes, labelling, kind_there, argument, text)
        except ValueError as error:
            # Keys of a recipe, which is not written yet.
            way = re.search("(write|expected) text: ", str(error)) is not None
            raise ValueError(f"{error}{'; nsc-merge init has --text for it' if way else ''}") from None
    elif found.base.embedded is not None and found.base.embedded.longest is not None:
        settings = replace(settings, max_length=min(settings.max_length, found.base.embedded.longest))
    some = replace(settings, samples=SAMPLES)
    revision = found.base.revision
    batches_of(source, found.base.source, some, 1, argument, base_revision=revision, labelling=labelling)
    column = labelling.column_in(opened.columns, settings, argument, text=takes.text)
    told = f"labels in column {column!r}" if column else "labels by folder" if kind == "class" else "answers of chats"
    keys = ("text", "text_pair", "messages")
    named = {name: value for name in keys if (value := getattr(settings, name)) is not None}
    if texts is not None:
        named |= {"texts": texts} | ({"max_length": settings.max_length} if found.base.embedded is not None else {})
        told = "texts that are compared" if column is None else told
        kind = "similar" if kind == "value" else kind
    where = f" in split {opened.split}" if opened.split else ""
    if kind == "answer" and takes.audio and not takes.text:
        kind = "speech"
    elif kind == "tags" and labelling.classes and all(map(marks_entities, labelling.classes)):
        kind = "entities"
    return Test(source, f"{opened.count} rows{where}, {told}", kind, named, labelling.column)


def _tags(task: Task, columns: Sequence[str], rows: Sequence[Row], labelling: Labelling, argument: str) -> str:
    """The column of tags that a task is trained on: the one called after the task, or the only one that may be.

    Raises:
        RecipeError: if there is none, or several.
    """
    if f"{task.name}_tags" in columns:
        return f"{task.name}_tags"
    known = [name for name in columns if holds_tags(name)]
    # What is wrong with an only one is said of its row.
    fitting = [name for name in known if len(known) == 1 or _fits(name, rows, labelling)]
    if len(fitting) == 1:
        return fitting[0]
    found = f"{fitting or known or list(columns)}"
    raise RecipeError(
        f"{argument}: expected one column of tags that are classes of {task.name!r}, found {found:.200}; a task called "
        "ner is measured on ner_tags (ner=ADAPTER names it so), labels: COLUMN in an evaluation recipe says any other"
    )


def _fits(column: str, rows: Sequence[Row], labelling: Labelling) -> bool:
    """Whether a column holds lists of a task's classes."""
    try:
        for row in rows:
            for tag in as_list(row.get(column)) or ():
                labelling.number_of(tag, column)
    except ValueError:
        return False
    return any(as_list(row.get(column)) for row in rows)


def _check_head(task: Task, found: Findings, argument: str) -> None:
    """Refuse a base that has no head of the class that a task was trained in, as roberta-large, on which transformers
    puts one in training.

    Raises:
        RecipeError: with the way to one that has.
    """
    kind, own, head = task.kind_on(found.base.model), type(found.base.model).__name__, found.heads.get(task.name)
    if kind == own or own.endswith("ForSequenceClassification") or _at_last(task, found):
        return
    if not head:
        raise RecipeError(
            f"{argument}: {own} has no head of classes, and the adapter brought none (modules_to_save); expected "
            "one, as figures of a head that is drawn at random say nothing"
        )
    made = f"{kind}.from_pretrained({found.base.source!r}, num_labels={_count(task, found)}).save_pretrained(FOLDER)"
    raise RecipeError(
        f"{argument}: {own} has no place for {head[0]}; expected a base that classifies, which {made} makes of it, "
        "with its tokenizer saved there, too"
    )


def _kind(task: Task, found: Findings, *, tags: bool) -> str:
    """What the labels of a task are.

    Args:
        tags: whether the base classifies tokens.
    """
    can_generate = getattr(found.base.model, "can_generate", bool)
    if hears(found.base.model) or (can_generate() and task.name not in found.heads):
        return "answer"
    if _count(task, found) == 1:
        return "value"
    return "tags" if tags else "class"


def _compared(texts: Sequence[str], columns: Sequence[str], argument: str) -> str:
    """What the labels of texts are that are embedded each alone.

    Raises:
        RecipeError: of inferences, whose labels are classes in no order.
    """
    if any(name in columns for name in CLASS_COLUMNS) and len(texts) == 2:
        if "premise" in columns:
            raise RecipeError(
                f"{argument}: labels of a premise and a hypothesis do not say how alike they are; expected rows of "
                "anchor, positive and negative, or a score of each pair"
            )
        return "value"
    return "nearest" if len(texts) > 2 else "same"


def _count(task: Task, found: Findings) -> int:
    """How many classes the head of a task has."""
    heads = _matrices(task, found)
    # The last of several layers gives what none of them reads.
    read = {value.shape[1] for value in heads}
    last = [value for value in heads if len(value) not in read] or heads
    return min(map(len, last)) if heads else getattr(found.base.model.config, "num_labels", 2)


def _at_last(task: Task, found: Findings) -> bool:
    """Whether a task's head is one that transformers puts behind the last token of a decoder, and the base has none."""
    model: Any = found.base.model
    decoder = getattr(model, "can_generate", bool)() and not encodes(model)
    return decoder and [path.rpartition(".")[2] for path in found.heads.get(task.name, ())] == ["score"]


def _matrices(task: Task, found: Findings) -> list[Tensor]:
    """Those of the head that a task brought; none where it has the base's."""
    return [value for name, value in task.outline.trained.items() if task.name in found.heads and value.dim() == 2]


def _classifies(task: Task, found: Findings) -> bool:
    """Whether there is a head whose outputs are the classes: configurations have a number of them without one, too."""
    brought = task.name in found.heads
    return bool(_matrices(task, found)) if brought else "Classification" in type(found.base.model).__name__


def _classes(task: Task, found: Findings) -> Sequence[str]:
    """Names of a task's classes: those beside its adapter, or of the base where its head is as large."""
    named = class_names(getattr(found.base.model.config, "id2label", None) or {})
    return task.labels or (named if len(named) == _count(task, found) else [])


def _settings(
    columns: Sequence[str],
    rows: Sequence[Row],
    takes: Base,
    labelling: Labelling,
    kind: str,
    argument: str,
    text: str | None,
) -> DataSettings:
    """What of the rows is read, but for their labels, by a model of the class ``kind``: ``text`` where they have it."""
    settings = DataSettings()
    if not takes.text:
        return settings
    label = labelling.column_in(columns, settings, argument, text=True)
    left = [name for name in columns if name != label]
    if text is not None and _have(rows, text, left):
        return replace(settings, text=text)
    if (chats := chats_in(rows, left, None)) is not None:
        return replace(settings, messages=chats)
    two = compared_in(rows, kind)
    if two is not None and label not in two:
        return replace(settings, text=two[0], text_pair=two[1])
    asked = asked_in(rows, label, writes=takes.writes) if labelling.kind == "answer" else None
    settings = replace(settings, text=asked)
    chosen = choose(
        rows, settings, argument, text=True, images=takes.images, audio=takes.audio, writes=takes.writes,
        words=takes.words, columns=left,
    )  # fmt: skip
    labelling.check_read(chosen.text, settings, columns, label, argument)
    return replace(settings, text=chosen.text) if asked is None and isinstance(chosen.text, str) else settings


def _have(rows: Sequence[Row], text: str, columns: Sequence[str]) -> bool:
    """Whether rows have, in columns, all that a column or a template of text names, which is no chat."""
    try:
        named = named_text(text, columns, "", "text")
    except ValueError:
        return False
    read = [named] if isinstance(named, str) else named.columns
    return not any(is_chat(row.get(name)) for row in rows for name in read)


def evaluation_text(found: Findings, tests: Mapping[str, Test], folder: Path, name: str, merged: str = "merged") -> str:
    """The evaluation recipe.

    Args:
        found: what the recipe is written from.
        tests: every task -> its labelled data.
        folder: that its paths are relative to.
        name: of its file there.
        merged: folder of the merge that the recipe writes.
    """
    yaml = Yaml()
    yaml.remark("Measures merges on labelled data. Written by nsc-merge init, to be edited.")
    yaml.remark("All keys: nsc-merge eval --help")
    yaml.verbatim(f"#   {shown(shlex.join(['nsc-merge', 'eval', name]))}")
    yaml.section()
    yaml.entries({"model": (relative(found.base.source, folder), "")})
    if found.base.revision is not None:
        yaml.entries({"revision": (found.base.revision, "")})
    if is_choice(found.base.quantised):
        yaml.entries({"quantization": (PLAIN, "as the merge")})
    yaml.verbatim("tasks:")
    for task in found.tasks:
        test = tests[task.name]
        metric, others = _METRICS[test.kind]
        yaml.verbatim(f"  {key_of(task.name)}:")
        source = relative(test.source, folder)
        place = {"source": source, **test.settings} if test.settings else source
        entries: dict[str, tuple[Any, str]] = {
            "adapter": (relative(task.source, folder), ""),
            "test": (place, test.said),
            "metric": (metric, others),
        }
        if _at_last(task, found):
            entries["pool"] = ("last", "where a classifier on a language model has its head")
        if test.labels is not None:
            entries["labels"] = (test.labels, "the column of a tag for each word")
        if test.kind in ("answer", "speech"):
            entries["generate"] = (True, "greedily, as many tokens as the longest answer has")
        yaml.entries(entries, 4)
    count = len(found.tasks)
    scale = 1.0 if count == 1 else 0.4 if count <= FEW_TASKS else round(1 / count, 4)
    yaml.section("The base and each adapter alone are always measured; folders are what nsc-merge run has written.")
    yaml.verbatim(
        "methods:",
        f"  - {{method: {WITHOUT_DATA}, options: {{scale: {scale}}}}}",
        f"  - {{folder: {merged}}}",
        "output: {dir: evaluation}",
    )
    return str(yaml)

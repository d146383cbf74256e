"""A first evaluation recipe: labelled raw data of each task looked at, and what they are measured by."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from nsc_merge.recipes.first.commented_yaml import Yaml, key_of, relative, shown
from nsc_merge.recipes.first.data import naming_options, sources
from nsc_merge.recipes.first.findings import FEW_TASKS, WITHOUT_DATA, Findings
from nsc_merge.recipes.first.looking import ROWS, SAMPLES, asked_in, chats_in, compared_in, embedded_in, preferred_in
from nsc_merge.recipes.first.task_heads import at_last, check_head, classes_of, classifies, count_of, kind_of_labels
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
    "answer": ("exact_match", "or rougeL, bleu, cider, vqa, relaxed_accuracy, anls"),
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


def look_at_tests(
    arguments: Sequence[str], found: Findings, text: str | None = None, labels: str | None = None
) -> dict[str, Test]:
    """Task -> its labelled data, of which a few samples are encoded with their labels, so that errors come now.

    Args:
        arguments: of ``--test``, as those of ``--data``.
        found: what the recipe is written from.
        text: column or template of the text, where the rows have it beside their label; found when None.
        labels: column of the labels, where the rows have it; found when None.

    Raises:
        RecipeError, ValueError, OSError: naming ``--test`` and the task.
    """
    places = sources(arguments, [task.name for task in found.tasks], "--test")
    tests, named = {}, False
    for task in found.tasks:
        if task.name not in places:
            continue
        tests[task.name], there = _look(places[task.name], task, found, text, labels)
        named = named or there
    if labels is not None and not named:
        raise RecipeError(f"--labels: no data of --test have a column {labels!r}")
    return tests


def _look(
    source: str, task: Task, found: Findings, text: str | None, labels: str | None
) -> tuple[Test, bool]:
    """The labelled data of a task, and whether they have the column that is named."""
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
    own = labels if labels in opened.columns else None
    usual = CLASS_COLUMNS if own is None else (own,)
    texts = embedded_in(rows, found.base.embedded) if task.name not in found.heads else None
    embeds = texts is not None
    if texts is None:
        check_head(task, found, argument)
        kind = kind_of_labels(task, found, tags=takes.words)
        if kind == "value" and not set(usual) & set(opened.columns):
            texts = _preferred(rows, opened.columns, argument)
            kind = kind if texts is None else "preferred"
    else:
        kind = _compared(texts, opened.columns, usual, argument)
    labelling = _labelling(kind, task, found, rows, usual, own)
    if kind == "tags" and own is None:
        labelling = replace(labelling, column=_tags(task, opened.columns, rows, labelling, argument))
    if texts is None:
        there = task.kind_on(found.base.model)
        with naming_options():
            settings = _settings(opened.columns, rows, takes, labelling, there, argument, text)
    elif found.base.embedded is None or found.base.embedded.longest is None:
        settings = DataSettings(texts=texts)
    else:
        longest = min(settings.max_length, found.base.embedded.longest)
        settings = DataSettings(texts=texts, max_length=longest)
    some, revision = replace(settings, samples=SAMPLES), found.base.revision
    with naming_options():
        batches_of(source, found.base.source, some, 1, argument, base_revision=revision, labelling=labelling)
    column = labelling.column_in(opened.columns, settings, argument, text=takes.text)
    told = f"labels in column {column!r}" if column else "labels by folder" if kind == "class" else "answers of chats"
    if texts is not None and column is None:
        told = "texts that are compared"
    keys = ("text", "text_pair", "messages")
    named = {name: value for name in keys if (value := getattr(settings, name)) is not None}
    if texts is not None:
        named["texts"] = texts
    if embeds:
        named["max_length"] = settings.max_length
    where = f" in split {opened.split}" if opened.split else ""
    measured = _measured(labelling, takes, embeds)
    test = Test(source, f"{opened.count} rows{where}, {told}", measured, named, labelling.column)
    return test, own is not None


def _labelling(
    kind: str, task: Task, found: Findings, rows: Sequence[Row], usual: Sequence[str], own: str | None
) -> Labelling:
    """What the labels of a task are, in the column that is its ``own``, or one of the usual ones."""
    if kind == "class" and any(as_list(row.get(name)) is not None for row in rows for name in usual):
        kind = "classes"
    known = kind in ("tags", "classes") or (kind == "class" and classifies(task, found))
    count = count_of(task, found) if known else None
    return Labelling(kind, own, classes_of(task, found), count, generated=kind == "answer")


def _measured(labelling: Labelling, takes: Base, embeds: bool) -> str:
    """The key of the metrics that fit labels."""
    if embeds and labelling.kind == "value":
        return "similar"
    if labelling.kind == "answer" and takes.audio and not takes.text:
        return "speech"
    if labelling.kind == "tags" and labelling.classes and all(map(marks_entities, labelling.classes)):
        return "entities"
    return labelling.kind


def _preferred(rows: Sequence[Row], columns: Sequence[str], argument: str) -> list[str] | None:
    """The texts of which one is preferred, where rows have such.

    Raises:
        RecipeError: if nobody says what is in front of them.
    """
    texts = preferred_in(rows)
    if texts is None and {"chosen", "rejected"} <= set(columns):
        raise RecipeError(
            f"{argument}: nobody says how what chosen and rejected answer stands in front of them; expected both "
            'whole, or with a column prompt of their kind, or a recipe with test: {source: FILE, texts: '
            '["{question}{chosen}", "{question}{rejected}"]}, as they were put together in training'
        )
    return texts


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


def _compared(texts: Sequence[str], columns: Sequence[str], usual: Sequence[str], argument: str) -> str:
    """What the labels of texts are that are embedded each alone, in one of the ``usual`` columns if there are any.

    Raises:
        RecipeError: of inferences, whose labels are classes in no order.
    """
    if any(name in columns for name in usual) and len(texts) == 2:
        if "premise" in columns:
            raise RecipeError(
                f"{argument}: labels of a premise and a hypothesis do not say how alike they are; expected rows of "
                "anchor, positive and negative, or a score of each pair"
            )
        return "value"
    return "nearest" if len(texts) > 2 else "same"


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
        if at_last(task, found):
            entries["pool"] = ("last", "where a classifier on a language model has its head")
        if test.labels is not None:
            tags = test.kind in ("tags", "entities")
            entries["labels"] = (test.labels, "the column of a tag for each word" if tags else "their column")
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

"""What is in the data of a first recipe: a few samples are encoded as a merge would, so that its errors come now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.calibration.batch_summary import summary
from nsc_merge.calibration.raw.chats import is_chat, messages_of
from nsc_merge.calibration.raw.columns import CHAT_COLUMNS, TRANSCRIPT_COLUMNS, choose
from nsc_merge.calibration.raw.drawing import Row
from nsc_merge.calibration.raw.labels import CLASS_COLUMNS
from nsc_merge.calibration.raw.preprocessors import base_of
from nsc_merge.calibration.raw.reading import batches_of, is_raw, open_source
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.templates import TEXT_COLUMNS
from nsc_merge.models.embeddings.files import Texts
from nsc_merge.recipes.first.data import Data, naming_options, stored_inputs

# Samples that are encoded, and rows that are looked at for it.
SAMPLES, ROWS = 16, 256
_SHOWN = 60
# Columns of a question, what it is about and its answer, as public data sets call them: all are taken, as when the
# adapter was trained.
_TOGETHER = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("context", "question", "answer"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
# What an encoder reads, and the answer, where models with one are trained.
_PAIRS = (
    ("inputs", "targets"),
    ("input", "target"),
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
)
# Two texts that a classifier compares, as public data sets call them, or in one of which an answer is marked.
_MARKED = (("question", "context"),)
_COMPARED = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "text"),
    ("anchor", "positive"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_A", "sentence_B"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "answer"),
)
# A question or a title and what is found by it, perhaps with what is not; and texts that mean the same, or do not.
_SEARCHED = (
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "answer"),
    ("query", "text"),
    ("question", "positive"),
    ("question", "answer"),
    ("question", "passage"),
    ("title", "body"),
    ("title", "abstract"),
)
_ALIKE = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
)
# Names of a prompt of what is searched.
_DOCUMENTS = ("document", "passage", "corpus")
# What was preferred to what, behind what both answer.
_PROMPT, _CHOSEN, _REJECTED = "prompt", "chosen", "rejected"
_ASKED = ("question", "instruction", "query", "input")
_NAMED_OTHERWISE = (
    "expected columns called query and positive, or sentence1 and sentence2; others are named in a recipe, as data: "
    "{texts: [FIRST, SECOND]}, each is embedded alone"
)
# What was said or is written there, behind an encoder of speech or images.
_TRANSCRIPTS = ("text", *TRANSCRIPT_COLUMNS, "raw_transcription")


def look(
    places: Mapping[str, str],
    base: str,
    model: nn.Module,
    batch_size: int,
    text: str | None,
    revision: str | None,
    embedded: Texts | None = None,
    *,
    scores: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, Data]:
    """Task -> what is in its data.

    Args:
        places: task -> path, or id of a dataset on the hub.
        base: folder or hub id of the base model.
        model: its outline.
        batch_size: samples of a batch.
        text: column or template of the text of raw data; found when None.
        revision: of a base on the hub.
        embedded: what texts are for a base that embeds them, each alone.
        scores: whether its head gives a text one number.
        kinds: task -> class of the model that it was trained in, where that is not the base's.

    Raises:
        ValueError, OSError: if it is no data for the model, naming what it looks like.
    """
    seen: dict[tuple[str, str], Data] = {}
    key_of = {task: (source, (kinds or {}).get(task, type(model).__name__)) for task, source in places.items()}
    for task, key in key_of.items():
        if key in seen:
            continue
        source, kind = key
        if not Path(source).is_absolute():
            # It would be fetched as a whole.
            seen[key] = Data(source, "a dataset on the hub, not fetched yet", None, text, raw=True, words=True)
        elif is_raw(source):
            settings = DataSettings(text=text)
            seen[key] = _raw(source, base, batch_size, settings, f"--data {task}", revision, kind, embedded, scores)
        else:
            seen[key] = stored_inputs(source, model, batch_size, task)
    return {task: seen[key] for task, key in key_of.items()}


def _raw(
    source: str,
    base: str,
    batch_size: int,
    settings: DataSettings,
    argument: str,
    revision: str | None,
    kind: str,
    embedded: Texts | None,
    scores: bool,
) -> Data:
    takes = base_of(base, revision, settings, argument)
    found = open_source(source, settings, argument, of_audio=takes.audio_files)
    rows = found.rows(range(min(found.count, ROWS)))
    # A merge reads no labels, which may be names of classes.
    labels = CLASS_COLUMNS if kind.endswith("ForSequenceClassification") else ()
    left = [name for name in found.columns if name not in labels]
    preferred = preferred_in(rows) if takes.text and scores and settings.text is None else None
    chats = chats_in(rows, left, settings.text) if takes.text and preferred is None else None
    if preferred is not None:
        settings = replace(settings, texts=preferred)
    elif chats is not None:
        settings = replace(settings, text=None, messages=chats)
    elif takes.text and settings.text is None and (several := embedded_in(rows, embedded)) is not None:
        settings = replace(settings, texts=several)
    elif takes.text and settings.text is None and (two := compared_in(rows, kind)) is not None:
        settings = replace(settings, text=two[0], text_pair=two[1])
    elif takes.text and settings.text is None:
        asked, answer = _templates(rows, left, writes=takes.writes)
        settings = replace(settings, text=asked, target=answer)
    elif takes.writes and not takes.text:
        said_there = next((name for name in _TRANSCRIPTS if _hold_texts(rows, [name])), None)
        settings = replace(settings, target=settings.text or said_there, text=None)
    place = f"{argument}: {Path(source).name}"
    try:
        with naming_options():
            columns = choose(
                rows, settings, place, text=takes.text, images=takes.images, audio=takes.audio, writes=takes.writes,
                words=takes.words, columns=left,
            )  # fmt: skip
    except ValueError as error:
        why, unnamed, _ = str(error).partition("; write text: ")
        if unnamed and embedded is not None:
            raise ValueError(f"{why}; {_NAMED_OTHERWISE}") from None
        raise
    if len(left) < len(found.columns) and isinstance(columns.text, str):
        settings = replace(settings, text=columns.text)
    # Each by itself, so that padding says nothing of the lengths.
    batches = batches_of(source, base, replace(settings, samples=SAMPLES), 1, argument, base_revision=revision)
    counted = summary(batches)
    where = f" in split {found.split}" if found.split else ""
    table = f"{found.count} rows of {', '.join(found.columns)}{where}; {columns.said()}"
    files = {"image": "images", "audio": "audio files"}
    alone = files.get(found.columns[0]) if len(found.columns) == 1 else None
    said = [f"{found.count} {alone}{where}" if alone else table]
    if counted.tokens:
        said.append(f"about {counted.tokens:.0f} tokens each")
    if batches.first:
        shown = " ".join(batches.first.split())
        said.append(f"such as {shown[:_SHOWN] + ('...' if len(shown) > _SHOWN else '')!r}")
    longest = max(batches, key=lambda batch: max(value.shape[1:].numel() for value in batch.values()))
    # The first of these needs no word, but in front of a second text.
    usual = columns.text in (None, TEXT_COLUMNS[0]) and settings.text_pair is None
    written = None if usual else settings.text or str(columns.text)
    return Data(
        source,
        ", ".join(said),
        {name: _rows(value, min(batch_size, found.count)) for name, value in longest.items()},
        written,
        settings.text_pair,
        None if settings.texts is None else list(settings.texts),
        None if embedded is None else embedded.longest,
        settings.target,
        chats,
        raw=True,
        words=takes.text or takes.decodes,
        audio=columns.audio is not None,
    )


def chats_in(rows: Sequence[Row], columns: Sequence[str], named: str | None) -> str | None:
    """The column of chats that is named as one of text; where none is, and none holds texts nor has the usual name, the
    first, as of prompts or preferred answers.
    """
    found = [name for name in columns if rows and all(is_chat(row.get(name)) for row in rows)]
    if named is not None:
        return named if named in found else None
    texts = any(isinstance(row.get(name), str) for row in rows for name in set(columns) - set(found))
    return found[0] if found and not texts and not set(columns) & set(CHAT_COLUMNS) else None


def compared_in(rows: Sequence[Row], kind: str) -> tuple[str, str] | None:
    """The columns of two texts that a model of a class compares, where its data have them."""
    heads = {"ForSequenceClassification": _COMPARED, "ForQuestionAnswering": _MARKED}
    known = next((names for head, names in heads.items() if kind.endswith(head)), ())
    return next((names for names in known if _hold_texts(rows, names)), None)


def embedded_in(rows: Sequence[Row], embedded: Texts | None) -> list[str] | None:
    """The columns of texts that a base embeds each alone, where its data have some that are compared, with the prompts
    that its files have for them; None of other bases.
    """
    names = next((names for names in (*_SEARCHED, *_ALIKE) if _hold_texts(rows, names)), None)
    if embedded is None or names is None:
        return None
    query = document = embedded.default
    if names in _SEARCHED:
        query = embedded.prompts.get("query", query)
        document = next((embedded.prompts[one] for one in _DOCUMENTS if one in embedded.prompts), document)
    return [_behind(prompt, name) for prompt, name in zip([query, *[document] * len(names)], names, strict=False)]


def preferred_in(rows: Sequence[Row]) -> list[str] | None:
    """The texts, or chats, that a reward model scores each alone, where the rows say which of two is preferred; behind
    their prompt where they do not begin with it (https://huggingface.co/docs/trl/dataset_formats). None where what they
    answer is in another column, or no chat as they are: nobody says how it was put in front in training.
    """
    both = [row.get(name) for row in rows for name in (_CHOSEN, _REJECTED)]
    chats = bool(both) and all(map(is_chat, both))
    texts = bool(both) and all(isinstance(one, str) and not is_chat(one) for one in both)
    if not (chats or texts) or any(_hold_texts(rows, [name]) for name in _ASKED):
        return None
    prompts = [row.get(_PROMPT) for row in rows]
    if all(is_chat(one) if chats else isinstance(one, str) and not is_chat(one) for one in prompts):
        begun = any(_begins(row[_CHOSEN], row[_PROMPT], chats) for row in rows)
        front = "" if begun else f"{{{_PROMPT}}}"
        return [f"{front}{{{name}}}" if front else name for name in (_CHOSEN, _REJECTED)]
    answers = chats and all(messages_of(one, _CHOSEN)[0]["role"] == "assistant" for one in both)
    return None if answers else [_CHOSEN, _REJECTED]


def _begins(chosen: Any, prompt: Any, chats: bool) -> bool:
    if chats:
        chosen, prompt = messages_of(chosen, _CHOSEN), messages_of(prompt, _PROMPT)
    return chosen[: len(prompt)] == prompt


def _behind(prompt: str, name: str) -> str:
    """A column, or a template with a prompt in front of it."""
    return prompt.replace("{", "{{").replace("}", "}}") + f"{{{name}}}" if prompt else name


def asked_in(rows: Sequence[Row], answer: str | None, *, writes: bool) -> str | None:
    """The text in front of a column of answers, where the rows hold what goes with it, as it stands there in training:
    an encoder reads it alone, behind other models' a line ends.
    """
    for names in (*_TOGETHER, *_PAIRS):
        if names[-1] == answer and _hold_texts(rows, names[:-1]):
            return _joined(names[:-1]) if writes else _in_lines(names[:-1]) + "\n"
    return None


def _templates(rows: Sequence[Row], columns: Sequence[str], *, writes: bool) -> tuple[str | None, str | None]:
    """The settings text and target, where the rows hold question and answer: the answer is the target where a decoder
    reads it, and else behind the question.
    """
    if set(columns) & {TEXT_COLUMNS[0], *CHAT_COLUMNS}:
        return None, None
    for names in (*_TOGETHER, *_PAIRS) if writes else _TOGETHER:
        if _hold_texts(rows, names):
            return (_joined(names[:-1]), names[-1]) if writes else (_joined(names), None)
    return None, None


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else _in_lines(names)


def _in_lines(names: Sequence[str]) -> str:
    return "{" + "}\n{".join(names) + "}"


def _hold_texts(rows: Sequence[Row], names: Sequence[str]) -> bool:
    return bool(rows) and all(isinstance(row.get(name), str) for row in rows for name in names)


def _rows(value: Tensor, count: int) -> Tensor:
    """One sample as often as a batch has samples; images without their numbers."""
    if value.is_floating_point():
        return torch.empty(count, *value.shape[1:], dtype=value.dtype, device="meta")
    return value[:1].expand(count, *value.shape[1:])

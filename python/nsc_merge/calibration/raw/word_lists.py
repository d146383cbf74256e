"""Columns of texts as lists of words, as data of token classification have them, and of the words' tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nsc_merge.calibration.raw.drawing import Row
from nsc_merge.calibration.raw.templates import TEXT_COLUMNS, no_text

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "pos_tags", "chunk_tags", "tags", "labels", "label", "ner", "pos", "upos", "xpos")

_ENTITIES = re.compile(r"O|[BIES](-.*)?", re.DOTALL)


def marks_entities(tag: str) -> bool:
    """Whether it is a tag of entities by IOB1, IOB2 or IOBES."""
    return _ENTITIES.fullmatch(tag) is not None


def holds_tags(column: str) -> bool:
    """Whether a column is called like one of tags."""
    return column in TAG_COLUMNS or column.endswith("_tags")


def as_list(value: Any) -> list[Any] | None:
    """A list, or an array of numpy or of pandas as one; None for anything else."""
    value = value.tolist() if getattr(value, "ndim", 0) == 1 else value
    return value if isinstance(value, list) else None


def has_words(rows: Sequence[Row], column: str) -> bool:
    """Whether a column of some rows holds lists of texts."""
    return any(isinstance(one, str) for row in rows for one in as_list(row.get(column)) or ())


def word_column(rows: Sequence[Row], columns: Sequence[str], argument: str) -> str | None:
    """The column of lists of words where none is named: one of the usual names, or, where there is no text of a usual
    name, the only one that is not called like tags; None where there is none.

    Raises:
        ValueError: if it is not clear which is meant.
    """
    held = [name for name in columns if has_words(rows, name)]
    usual = next((name for name in WORD_COLUMNS if name in held), None)
    if usual is not None:
        return usual
    held = [name for name in held if not holds_tags(name)]
    texts = any(isinstance(row.get(name), str) for row in rows for name in TEXT_COLUMNS)
    if len(held) > 1 and not texts:
        raise ValueError(f"{argument}: several columns of lists of words and none is named, {held}; write text: NAME")
    return held[0] if held and not texts else None


def words_of(row: Row, column: str, where: str) -> list[str] | None:
    """The words that a row has in a column; None where it has none, or nothing but spaces.

    Raises:
        ValueError: naming the row, if it holds something else than a list of texts.
    """
    if column not in row:
        raise no_text(where, column, "a list of words")
    value = [] if row[column] is None else as_list(row[column])
    if value is None:
        raise ValueError(f"{where}: column {column!r}: expected a list of words, found {row[column]!r:.60}")
    odd = [word for word in value if not isinstance(word, str)]
    if odd:
        raise ValueError(f"{where}: column {column!r}: expected words as text, found {odd[0]!r:.60} among them")
    return value if any(word.strip() for word in value) else None


def tag_column(columns: Sequence[str], place: str) -> str | None:
    """The column of tags where none is named; None where none is called like one.

    Raises:
        ValueError: if several are, as of names and of parts of speech: they may have as many tags.
    """
    found = [name for name in columns if holds_tags(name)]
    if len(found) > 1:
        raise ValueError(f"{place}: several columns of tags and none is named, {found}; expected labels: COLUMN")
    return found[0] if found else None

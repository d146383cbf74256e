"""Columns of text, and templates over columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from nsc_merge.calibration.raw.chats import is_chat
from nsc_merge.calibration.raw.drawing import Row
from nsc_merge.utils.option_checks import did_you_mean

# Where none is named, the first of these that there is, else the only column of texts.
TEXT_COLUMNS = ("text", "prompt", "content", "instruction", "question")
WORDS_ELSEWHERE = (
    "lists of words are read for a base that classifies tokens alone, as AutoModelForTokenClassification saves it"
)
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """Text with names of columns in braces, ``"{question}\\n{answer}"``; ``{{`` and ``}}`` stand for braces.

    Nothing but whole columns is looked up: no attributes, no indices.

    Attributes:
        pieces: texts and names of columns in turn, beginning with a text.
    """

    pieces: tuple[str, ...]

    @classmethod
    def parse(cls, template: str, columns: Sequence[str], argument: str) -> Template:
        """Raises ValueError, naming the brace or the column that is not there."""
        pieces, literal, end = [], "", 0
        for match in _PLACEHOLDER.finditer(template):
            literal += template[end : match.start()]
            end = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif match[1] is None:
                raise ValueError(
                    f"{argument}: a {match[0]!r} alone in the template {template!r:.80}; write {match[0] * 2!r} for a "
                    "brace"
                )
            elif match[1] not in columns:
                raise no_column(f"{argument}: the template's", match[1], columns)
            else:
                pieces += [literal, match[1]]
                literal = ""
        if not pieces:
            raise ValueError(f"{argument}: the template {template!r:.80} names no column of {list(columns)}")
        return cls((*pieces, literal + template[end:]))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.pieces[1::2]

    def fill(self, row: Row, where: str) -> str:
        """The text of a row."""
        parts = list(self.pieces)
        parts[1::2] = [text_of(row, name, where) for name in self.columns]
        return "".join(parts)


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a column.

    Raises:
        ValueError: if it holds none, or something else than text or a number.
    """
    value: Any = row.get(column)
    if isinstance(value, str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        # An array or a tensor of one number.
        value = value.item()
    # Of numpy, too, and Decimal, as Parquet has it.
    number = isinstance(value, Number)
    if number and value == value:
        return str(value)
    if value is None or number:
        raise no_text(where, column, "text")
    hint = f"; write messages: {column}" if is_chat(value) else ""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        hint = f"; {WORDS_ELSEWHERE}"
    raise ValueError(f"{where}: column {column!r}: expected text, found {value!r:.60}{hint}")


def named_text(name: str, columns: Sequence[str], argument: str, setting: str) -> str | Template:
    if name in columns:
        return name
    if "{" in name or "}" in name:
        return Template.parse(name, columns, f"{argument}: {setting}")
    raise no_column(f"{argument}: {setting}:", name, columns)


def said(text: str | Template) -> str:
    return f"a template over {', '.join(text.columns)}" if isinstance(text, Template) else f"column {text!r}"


def filled(text: str | Template | None, row: Row, where: str) -> str | None:
    """What a row has in a column or a template; None where that is null or blank."""
    if text is None:
        return None
    if isinstance(text, Template):
        found = text.fill(row, where)
        return found if any(str(row[name]).strip() for name in text.columns) else None
    null = text in row and row[text] is None
    found = "" if null else text_of(row, text, where)
    return found if found.strip() else None


def no_text(where: str, column: str, expected: str) -> ValueError:
    return ValueError(f"{where}: holds nothing in column {column!r}; expected {expected}")


def no_column(place: str, name: str, columns: Sequence[str]) -> ValueError:
    hint = did_you_mean(name, columns) or f" (columns: {', '.join(columns)})"
    return ValueError(f"{place} column {name!r:.60} is not there{hint}")

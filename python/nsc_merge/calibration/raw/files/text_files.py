"""Rows of files of text: JSON, one value or one a line; CSV; plain lines; each also packed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsc_merge.calibration.raw.drawing import Row
from nsc_merge.calibration.raw.files.wrong_files import looks_like
from nsc_merge.utils.json_text import from_json

# The column that a line of plain text, or a JSON string, becomes.
TEXT = "text"
# The key of an object that holds the rows.
_DATA = "data"
# Suffix of a packed file -> what unpacks it.
_PACKED: dict[str, Callable[[io.BytesIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Text takes a tenth when it is packed; what grows further is made to fill the memory, but for small files.
_MOST_UNPACKED, _MOST_GROWTH = 1 << 28, 100
# Data are long where configurations are not; what a machine holds.
_MOST_VALUES = 200_000_000


def rows_of_text(file: Path, raw: bytes, argument: str) -> list[Row]:
    """The rows of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.txt`` file, or of such a one that is packed.

    Args:
        file: for its suffix, and for messages.
        raw: what it holds.
        argument: how messages call it.

    Raises:
        ValueError: naming file and line, what was found and what was expected.
    """
    place = f"{argument}: {file}"
    if file.suffix.lower() in _PACKED:
        raw = _unpacked(file, raw, place)
    text = _decoded(raw, file, place)
    rows = READERS[kind_of(file)](text, place)
    if not rows:
        raise ValueError(f"{place} holds no row; expected at least one")
    return rows


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, in lower case: of a packed one, that of what is in it."""
    suffix = file.suffix.lower()
    inner = Path(file.stem).suffix.lower()
    return inner if suffix in _PACKED and inner in READERS else suffix


def _unpacked(file: Path, raw: bytes, place: str) -> bytes:
    most = max(_MOST_UNPACKED, _MOST_GROWTH * len(raw))
    found = bytearray()
    try:
        with _PACKED[file.suffix.lower()](io.BytesIO(raw)) as opened:
            while len(found) <= most and (part := opened.read(1 << 20)):
                found += part
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{place} is damaged: {error}") from None
    if len(found) > most:
        raise ValueError(
            f"{place}: expected text that is packed, found {len(raw)} bytes that unpack to more than {most}; unpack it "
            "yourself if you trust it"
        )
    return bytes(found)


def _decoded(raw: bytes, file: Path, place: str) -> str:
    if not raw.strip():
        raise ValueError(f"{place} is empty; expected rows of data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        text, reason = "\0", f"byte {raw[error.start]:#04x} in line {line}"
    else:
        reason = "bytes of value 0"
    if "\0" in text:
        found = looks_like(file, raw[:512])
        expected = "; expected text in UTF-8 (iconv -f LATIN1 -t UTF-8 converts an older file)"
        raise ValueError(f"{place} {found}" if found else f"{place} is not UTF-8: {reason}{expected}")
    return text


def _json_lines(text: str, place: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            value = from_json(line, where, not_finite=True)
        except ValueError:
            if not rows and text.lstrip()[0] in "[{" and _is_json(text):
                raise ValueError(
                    f"{place} looks like one JSON value over several lines; expected one a line: call it .json"
                ) from None
            raise
        if isinstance(value, list) and number == 1 and text.count("\n") <= 1:
            raise ValueError(f"{place} looks like a JSON list; expected one object a line: call it .json")
        rows.append(_row(value, where))
    return rows


def _json_value(text: str, place: str) -> list[Row]:
    try:
        value = from_json(text, place, not_finite=True, most=_MOST_VALUES)
    except ValueError:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and all(_is_json(line) for line in lines[:2]):
            raise ValueError(f"{place} looks like one JSON value a line: call it .jsonl") from None
        raise
    if isinstance(value, dict):
        value = _listed(value, place)
    if not isinstance(value, list):
        raise ValueError(f"{place}: expected a list of rows, found {value!r:.60}")
    return [_row(one, f"{place}, row {number}") for number, one in enumerate(value, 1)]


def _listed(value: dict[str, Any], place: str) -> list[Any]:
    """The rows of an object: its ``data``, its only value, or those of its columns."""
    lists = [one for one in value.values() if isinstance(one, list)]
    if isinstance(value.get(_DATA), list):
        return value[_DATA]
    if len(lists) == len(value) == 1 and all(isinstance(one, dict) for one in lists[0]):
        return lists[0]
    if len(lists) == len(value) > 0 and len({len(one) for one in lists}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    found = ", ".join(f"{name!r} ({_what(one)})" for name, one in list(value.items())[:6])
    raise ValueError(
        f"{place}: expected a list of rows, an object with such a list as {_DATA!r}, or columns of one length; found "
        f"an object with {found or 'nothing'}"
    )


def _what(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {TEXT: value}
    raise ValueError(f"{where}: expected an object with columns, or a text, found {value!r:.60}")


def _is_json(text: str) -> bool:
    try:
        from_json(text, "", not_finite=True, most=_MOST_VALUES)
    except ValueError:
        return False
    return True


def _separated(separator: str) -> Callable[[str, str], list[Row]]:
    def read(text: str, place: str) -> list[Row]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows: list[Row] = []
        columns: list[str] = []
        line, numbered = 1, False
        try:
            for fields in reader:
                if not columns:
                    # As pandas writes the numbers of its rows.
                    numbered = len(fields) > 1 and not fields[0]
                    columns = _header(fields[numbered:], separator, f"{place}, line {line}")
                elif fields:
                    if len(fields) != len(columns) + numbered:
                        raise ValueError(
                            f"expected {len(columns) + numbered} fields as in the header, found {len(fields)} "
                            "(fields with separators, quotes or line breaks in them stand in quotes)"
                        )
                    rows.append(dict(zip(columns, fields[numbered:], strict=True)))
                line = reader.line_num + 1
        except (csv.Error, ValueError) as error:
            if str(error).startswith(place):
                raise
            hint = "; write the rows as .jsonl" if "field limit" in str(error) else ""
            raise ValueError(f"{place}, line {line}: {error}{hint}") from None
        return rows

    return read


def _header(fields: list[str], separator: str, where: str) -> list[str]:
    other = next((one for one in ";\t," if one != separator and len(fields) == 1 and one in fields[0]), None)
    if other is not None:
        wanted = {",": "commas (.csv)", "\t": "tabs (.tsv)"}
        raise ValueError(f"{where}: columns look separated by {other!r}; expected {wanted[separator]}")
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    if repeated or not all(name.strip() for name in fields):
        found = f"{repeated[0]!r} twice" if repeated else "a column without one"
        raise ValueError(f"{where}: expected a name of its own for every column, found {found}")
    return fields


def _lines(text: str, place: str) -> list[Row]:
    return [{TEXT: line} for line in re.split(r"[\r\n]+", text) if line.strip()]


READERS: dict[str, Callable[[str, str], list[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_value,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
}

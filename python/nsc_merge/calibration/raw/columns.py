"""What of a row is taken: a column, a template over columns, a chat, images, audio."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

from nsc_merge.calibration.raw.chats import Message, is_chat, messages_of, tools_of
from nsc_merge.calibration.raw.drawing import Row, columns_of
from nsc_merge.calibration.raw.media.audio import is_audio
from nsc_merge.calibration.raw.media.images import is_image
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.utils.option_checks import did_you_mean

# Where none is named, the first of these that there is, else the only column of texts.
TEXT_COLUMNS = ("text", "prompt", "content", "instruction", "question")
CHAT_COLUMNS = ("messages", "conversations")
# Beside a chat, the functions that it may call.
TOOLS = "tools"
IMAGE_COLUMNS = ("image", "images", "image_path", "file_name")
AUDIO_COLUMNS = ("audio", "audio_path")

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Sample:
    """What one row gives.

    Attributes:
        where: how messages call the row.
        text: as it is; None where there is a chat, or images alone.
        messages: of a chat.
        images: what the row holds of them; they are not open yet.
        audio: the same of recordings.
        tools: that the chat may call.
        target: text that the decoder of a model with an encoder reads; None where it begins an answer.
        label: what the row says of its label, where samples are measured.
    """

    where: str
    text: str | None = None
    messages: list[Message] | None = None
    images: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    target: str | None = None
    label: Any = None


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
                raise _no_column(f"{argument}: the template's", match[1], columns)
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


@dataclass(frozen=True)
class Columns:
    """What is taken of every row; None where nothing is.

    Attributes:
        text: a column, or a template.
        messages: the column of the chat.
        image: the column of the image, or of a list of them.
        target: a column, or a template, of what a decoder reads behind an encoder.
        audio: the column of audio, or of a list of it.
    """

    text: str | Template | None = None
    messages: str | None = None
    image: str | None = None
    target: str | Template | None = None
    audio: str | None = None

    def said(self) -> str:
        """In words, for people."""
        text = "" if self.text is None else _said(self.text)
        chat = f"the chats in column {self.messages!r}" if self.messages is not None else ""
        image = f"images in column {self.image!r}" if self.image is not None else ""
        audio = f"audio in column {self.audio!r}" if self.audio is not None else ""
        target = "" if self.target is None else f"for the decoder {_said(self.target)}"
        return ", ".join(one for one in (text, chat, image, audio, target) if one)

    def sample(self, row: Row, where: str) -> Sample | None:
        """What a row gives; None where its text is blank, or null, and it holds no image.

        Raises:
            ValueError: naming row and column, what was found and what was expected.
        """
        images = [] if self.image is None else _several(row.get(self.image))
        audio = [] if self.audio is None else _several(row.get(self.audio))
        beside = "an image" if images else "audio"
        if self.messages is not None:
            if self.messages not in row:
                raise ValueError(f"{where}: lacks the column {self.messages!r}")
            if row[self.messages] is None or row[self.messages] == []:
                if images or audio:
                    raise ValueError(f"{where}: holds {beside} and no message in {self.said()}")
                return None
            messages = messages_of(row[self.messages], where)
            tools = tools_of(row.get(TOOLS), where)
            return Sample(where, None, messages, images, audio, tools, _filled(self.target, row, where))
        if self.text is None:
            if not images and not audio:
                what, column = ("audio", self.audio) if self.audio is not None else ("image", self.image)
                raise ValueError(f"{where}: holds no {what} in column {column!r}")
            return Sample(where, images=images, audio=audio, target=_filled(self.target, row, where))
        text = _filled(self.text, row, where)
        if text is None and (images or audio):
            raise ValueError(f"{where}: holds {beside} and no text in {self.said()}")
        if text is None:
            return None
        return Sample(where, text, None, images, audio, None, _filled(self.target, row, where))


def _said(text: str | Template) -> str:
    return f"a template over {', '.join(text.columns)}" if isinstance(text, Template) else f"column {text!r}"


def _filled(text: str | Template | None, row: Row, where: str) -> str | None:
    """What a row has in a column or a template; None where that is null or blank."""
    if text is None:
        return None
    if isinstance(text, Template):
        filled = text.fill(row, where)
        return filled if any(str(row[name]).strip() for name in text.columns) else None
    null = text in row and row[text] is None
    found = "" if null else text_of(row, text, where)
    return found if found.strip() else None


def choose(
    rows: Sequence[Row],
    settings: DataSettings,
    argument: str,
    *,
    text: bool,
    images: bool,
    audio: bool = False,
    writes: bool = False,
    columns: Sequence[str] | None = None,
) -> Columns:
    """What is taken of rows for a base that takes text, images, or both, or audio, and may write behind an encoder.

    Args:
        rows: some of them.
        columns: of all of them; those of ``rows`` when None.
        argument: how messages call the data.

    Raises:
        ValueError: if a column that is named is not there, or if none is named and it is not clear which is meant.
    """
    columns = columns_of(rows) if columns is None else columns
    image = None
    heard = None
    if images:

        def is_one(value: Any) -> bool:
            return is_image(value) and not (audio and is_audio(value))

        image = _media_column(IMAGE_COLUMNS, is_one, "image", rows, columns, settings, argument, needed=not text)
    elif settings.image is not None:
        raise ValueError(f"{argument}: image: {settings.image!r} is named, and the base takes no images")
    if audio:
        heard = _media_column(AUDIO_COLUMNS, is_audio, "audio", rows, columns, settings, argument, needed=not text)
    elif settings.audio is not None:
        raise ValueError(f"{argument}: audio: {settings.audio!r} is named, and the base takes no audio")
    target = None
    if settings.target is not None:
        if not writes:
            raise ValueError(
                f"{argument}: target: {settings.target!r} is named, and the base writes no text behind an encoder; "
                'text: "{question}\\n{answer}" takes both for one that reads on'
            )
        target = _named_text(settings.target, columns, argument, "target")
    if not text:
        named = next((name for name in ("text", "messages") if getattr(settings, name) is not None), None)
        if named is not None:
            only = "audio" if audio else "images"
            raise ValueError(f"{argument}: {named}: is named, and the base takes {only} alone")
        return Columns(image=image, audio=heard, target=target)
    if settings.messages is not None:
        if settings.messages not in columns:
            raise _no_column(f"{argument}: messages:", settings.messages, columns)
        return Columns(None, settings.messages, image, target, heard)
    if settings.text is not None:
        return Columns(_named_text(settings.text, columns, argument, "text"), None, image, target, heard)
    chat = next((name for name in CHAT_COLUMNS if any(is_chat(row.get(name)) for row in rows)), None)
    if chat is not None:
        return Columns(None, chat, image, target, heard)
    return Columns(_text_column(rows, columns, argument, images=images, audio=audio), None, image, target, heard)


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
        raise ValueError(f"{where}: holds nothing in column {column!r}; expected text")
    hint = f"; write messages: {column}" if is_chat(value) else ""
    raise ValueError(f"{where}: column {column!r}: expected text, found {value!r:.60}{hint}")


def _named_text(name: str, columns: Sequence[str], argument: str, setting: str) -> str | Template:
    if name in columns:
        return name
    if "{" in name or "}" in name:
        return Template.parse(name, columns, f"{argument}: {setting}")
    raise _no_column(f"{argument}: {setting}:", name, columns)


def _text_column(rows: Sequence[Row], columns: Sequence[str], argument: str, *, images: bool, audio: bool) -> str:
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in columns}
    of_images = [name for name, held in values.items() if held and all(is_image(one) or is_audio(one) for one in held)]
    of_text = [
        name
        for name, held in values.items()
        if held and name not in of_images and all(isinstance(value, str) and not is_chat(value) for value in held)
    ]
    found = next((name for name in TEXT_COLUMNS if name in of_text), None)
    if found is None and len(of_text) == 1:
        found = of_text[0]
    if found is not None:
        return found
    if of_images and not of_text:
        heard = not all(is_image(one) for name in of_images for one in values[name])
        beside = audio if heard else images
        wanted = "text beside them" if beside else "text"
        media = '"audio": "clips/1.wav"' if heard else '"image": "photos/1.png"'
        example = f'{{{media}, "prompt": "What is it?"}}' if beside else '{"text": "What is it?"}'
        raise ValueError(
            f"{argument}: holds {'audio' if heard else 'images'} alone ({_shown(rows, of_images)}), and the base takes "
            f"{wanted}: write a .jsonl of rows such as {example}"
        )
    chat = next((name for name in columns if any(is_chat(row.get(name)) for row in rows)), None)
    if chat is not None and not of_text:
        raise ValueError(f"{argument}: no column of text; {chat!r} holds chats: write messages: {chat}")
    what = "several columns of text and none is named" if of_text else "no column of text"
    # Numbers can be in a template, too.
    usable = of_text or [name for name, held in values.items() if held and all(isinstance(v, Number) for v in held)]
    example = "{" + "}\\n{".join(usable[:2]) + "}"
    way = f'write text: NAME, or a template such as text: "{example}"' if usable else "write a column of texts"
    raise ValueError(f"{argument}: {what}: {_shown(rows, columns)}; {way}")


def _media_column(
    usual: Sequence[str],
    is_one: Callable[[Any], bool],
    setting: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    settings: DataSettings,
    argument: str,
    *,
    needed: bool,
) -> str | None:
    """The column of images or audio: the one that the setting names, of the usual names, or that alone holds some."""
    named = getattr(settings, setting)
    if named is not None:
        if named not in columns:
            raise _no_column(f"{argument}: {setting}:", named, columns)
        return named
    found = next((name for name in usual if name in columns), None)
    if found is not None:
        return found
    likely = [name for name in columns if any(is_one(value) for row in rows for value in _several(row.get(name)))]
    if len(likely) == 1:
        return likely[0]
    if not needed and not likely:
        return None
    several = {"image": "images", "audio": "audio"}[setting]
    what = f"several columns of {several}, {likely}" if likely else f"no column of {several}"
    way = f"write {setting}: NAME, or give a folder of {several}"
    raise ValueError(f"{argument}: {what}: {_shown(rows, columns)}; {way}")


def _several(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, list) else [value]


def _shown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Columns with the first value of each."""
    first = {name: next((row[name] for row in rows if row.get(name) is not None), None) for name in columns}
    return ", ".join(f"{name} ({value!r:.40})" for name, value in list(first.items())[:8])


def _no_column(place: str, name: str, columns: Sequence[str]) -> ValueError:
    hint = did_you_mean(name, columns) or f" (columns: {', '.join(columns)})"
    return ValueError(f"{place} column {name!r:.60} is not there{hint}")

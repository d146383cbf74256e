"""What of a row is taken: a column, a template over columns, a chat, images, audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

from nsc_merge.calibration.raw.chats import Message, is_chat, messages_of, tools_of
from nsc_merge.calibration.raw.drawing import Row, columns_of
from nsc_merge.calibration.raw.media.audio import is_audio
from nsc_merge.calibration.raw.media.images import is_image
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.templates import (
    TEXT_COLUMNS,
    WORDS_ELSEWHERE,
    Template,
    filled,
    named_text,
    no_column,
    said,
)
from nsc_merge.calibration.raw.word_lists import WORD_COLUMNS, has_words, word_column, words_of

# What was said, or is written in a picture.
TRANSCRIPT_COLUMNS = ("sentence", "transcription", "transcript", "normalized_text")
CHAT_COLUMNS = ("messages", "conversations")
# Beside a chat, the functions that it may call.
TOOLS = "tools"
IMAGE_COLUMNS = ("image", "images", "image_path", "file_name")
AUDIO_COLUMNS = ("audio", "audio_path")

@dataclass(frozen=True)
class Sample:
    """What one row gives.

    Attributes:
        where: how messages call the row.
        text: as it is; None where there is a chat, words, or images alone.
        words: a text as a list of them.
        messages: of a chat.
        images: what the row holds of them; they are not open yet.
        audio: the same of recordings.
        tools: that the chat may call.
        target: text that the decoder of a model with an encoder reads; None where it begins an answer.
        pair: a second text, which the tokenizer puts behind the first.
        texts: that are read each alone, or chats; None among them where one is blank.
        label: what the row says of its label, where samples are measured.
    """

    where: str
    text: str | None = None
    words: list[str] | None = None
    messages: list[Message] | None = None
    images: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    target: str | None = None
    pair: str | None = None
    texts: list[str | list[Message] | None] | None = None
    label: Any = None


@dataclass(frozen=True)
class Columns:
    """What is taken of every row; None where nothing is.

    Attributes:
        text: a column, or a template.
        messages: the column of the chat.
        image: the column of the image, or of a list of them.
        target: a column, or a template, of what a decoder reads behind an encoder.
        audio: the column of audio, or of a list of it.
        pair: a column, or a template, of a second text.
        words: whether the column of the text holds lists of words.
        texts: columns, or templates, of texts that are read each alone.
    """

    text: str | Template | None = None
    messages: str | None = None
    image: str | None = None
    target: str | Template | None = None
    audio: str | None = None
    pair: str | Template | None = None
    words: bool = False
    texts: tuple[str | Template, ...] = ()

    def said(self) -> str:
        """In words, for people."""
        text = "" if self.text is None else said(self.text)
        text = f"the words in {text}" if self.words else text
        chat = f"the chats in column {self.messages!r}" if self.messages is not None else ""
        image = f"images in column {self.image!r}" if self.image is not None else ""
        audio = f"audio in column {self.audio!r}" if self.audio is not None else ""
        pair = "" if self.pair is None else f"with {said(self.pair)} behind it"
        target = "" if self.target is None else f"for the decoder {said(self.target)}"
        alone = " and ".join(map(said, self.texts))
        return ", ".join(one for one in (text, alone, pair, chat, image, audio, target) if one)

    def sample(self, row: Row, where: str) -> Sample | None:
        """What a row gives; None where its text is blank, or null, and it holds no image.

        Raises:
            ValueError: naming row and column, what was found and what was expected.
        """
        images = [] if self.image is None else _several(row.get(self.image))
        audio = [] if self.audio is None else _several(row.get(self.audio))
        media = Sample(where, images=images, audio=audio)
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
            return replace(media, messages=messages, tools=tools, target=filled(self.target, row, where))
        if self.texts:
            texts = [_text_or_chat(one, row, where) for one in self.texts]
            return replace(media, texts=texts) if any(texts) else None
        if self.text is None:
            if not images and not audio:
                what, column = ("audio", self.audio) if self.audio is not None else ("image", self.image)
                raise ValueError(f"{where}: holds no {what} in column {column!r}")
            return replace(media, target=filled(self.target, row, where))
        if self.words:
            words = words_of(row, str(self.text), where)
            return None if words is None else replace(media, words=words)
        text = filled(self.text, row, where)
        if text is None and (images or audio):
            raise ValueError(f"{where}: holds {beside} and no text in {self.said()}")
        if text is None:
            return None
        pair = filled(self.pair, row, where)
        if self.pair is not None and pair is None:
            raise ValueError(f"{where}: holds a text and none in {said(self.pair)} behind it")
        return replace(media, text=text, pair=pair, target=filled(self.target, row, where))


def _text_or_chat(text: str | Template, row: Row, where: str) -> str | list[Message] | None:
    """What a row has in a column or a template: the chat there, or that of several columns (prompt and answer) in a
    template of nothing but these.
    """
    columns = text.columns if isinstance(text, Template) else (text,)
    alone = not isinstance(text, Template) or not any(text.pieces[::2])
    if alone and all(is_chat(row.get(name)) for name in columns):
        return [message for name in columns for message in messages_of(row[name], where)]
    return filled(text, row, where)


def choose(
    rows: Sequence[Row],
    settings: DataSettings,
    argument: str,
    *,
    text: bool,
    images: bool,
    audio: bool = False,
    writes: bool = False,
    words: bool = False,
    columns: Sequence[str] | None = None,
) -> Columns:
    """What is taken of rows for a base that takes text, images, or both, or audio, and may write behind an encoder, or
    classify words.

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
        target = named_text(settings.target, columns, argument, "target")
    media = Columns(image=image, audio=heard, target=target)
    if not text:
        named = next((name for name in ("text", "messages", "texts") if getattr(settings, name) is not None), None)
        if named is not None:
            only = "audio" if audio else "images"
            raise ValueError(f"{argument}: {named}: is named, and the base takes {only} alone")
        return media
    if settings.texts is not None:
        if images or audio:
            raise ValueError(f"{argument}: texts: the base takes images or audio, too; expected text: COLUMN")
        each = tuple(named_text(one, columns, argument, "texts") for one in settings.texts)
        return replace(media, texts=each)
    if settings.messages is not None:
        if settings.messages not in columns:
            raise no_column(f"{argument}: messages:", settings.messages, columns)
        return replace(media, messages=settings.messages)
    if settings.text is not None:
        pair = settings.text_pair
        behind = None if pair is None else named_text(pair, columns, argument, "text_pair")
        if words and has_words(rows, settings.text):
            if pair is not None:
                raise ValueError(f"{argument}: text_pair: stands behind texts, and {settings.text!r} holds words")
            return replace(media, text=settings.text, words=True)
        return replace(media, text=named_text(settings.text, columns, argument, "text"), pair=behind)
    of_words = word_column(rows, columns, argument) if words else None
    if of_words is not None:
        return replace(media, text=of_words, words=True)
    chat = next((name for name in CHAT_COLUMNS if any(is_chat(row.get(name)) for row in rows)), None)
    if chat is not None:
        return replace(media, messages=chat)
    return replace(media, text=_text_column(rows, columns, argument, images=images, audio=audio))


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
    way += f"; {WORDS_ELSEWHERE}" if not of_text and any(has_words(rows, name) for name in WORD_COLUMNS) else ""
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
            raise no_column(f"{argument}: {setting}:", named, columns)
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

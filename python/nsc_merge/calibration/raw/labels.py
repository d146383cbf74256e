"""Labels of raw samples, for measuring: a class, a value, an answer as tokens, or a class of every word."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.calibration.raw.chats import said_last
from nsc_merge.calibration.raw.columns import TRANSCRIPT_COLUMNS, Sample
from nsc_merge.calibration.raw.drawing import DECODED, MASK, TOKENS, Encoded, Filling, Row
from nsc_merge.calibration.raw.inputs.checks import check_unicode, longest
from nsc_merge.calibration.raw.inputs.text import first_tokens
from nsc_merge.calibration.raw.preprocessors import Base
from nsc_merge.calibration.raw.settings import DataSettings
from nsc_merge.calibration.raw.word_lists import TAG_COLUMNS, as_list, tag_column

LABELS = "labels"
# Of a class or a value, and of answers, where no column is named.
CLASS_COLUMNS = ("label", "labels", "class", "score", "similarity_score")
ANSWER_COLUMNS = (
    *("answer", "answers", "completion", "response", "output", "target", "summary", "highlights"),
    *TRANSCRIPT_COLUMNS,
)
# Columns that are read together with others, in questions and in pairs.
_BESIDE = (
    *("instruction", "input", "context", "passage", "document", "query", "question", "sentence"),
    *("premise", "hypothesis", "sentence1", "sentence2", "question1", "question2", "text_pair"),
)
# Beside what they answer, where a class or a value is of both.
_ANSWERED = ("completion", "response", "answer")
# Where no column of text is named.
_TEXT = "text"
# Kinds of labels that are in the texts themselves.
WITHOUT_COLUMN = ("same", "nearest", "preferred")
# What labels hold where nothing is known, or asked for.
UNKNOWN = -100
# Inputs of a text beside its tokens that go on with an answer -> their value there.
_CONTINUED = {MASK: 1, "mm_token_type_ids": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class Labelling:
    """What the labels of raw samples are.

    Attributes:
        kind: ``"class"``, numbers ``[N]`` of 64 bits; ``"classes"``, which are true, ``[N, C]`` in float32;
            ``"value"``, ``[N]`` in float32; ``"answer"``, tokens;
            ``"tags"``, classes of words ``[N, T]``, each at the first token of its word, -100 elsewhere; of several
            texts that are read alone ``"same"``, numbers ``[N, S]`` that those of one text share, or ``"nearest"``, the
            place of the second among all behind the first, counted from the end, ``[N]``, or ``"preferred"``, the place
            of the first, ``[N]``. These have no column.
        column: that holds them; None for a usual name, else the folder that a file lies in, or the last turn of a chat.
        classes: their names in the order of their numbers; empty where the labels are numbers.
        count: of the classes; None where it is not known.
        generated: whether answers are apart from prompts, ``[N, T]``, or of several references ``[N, R, T]``, filled up
            by -100; else they stand behind the prompts, for which labels are -100.
    """

    kind: str
    column: str | None = None
    classes: Sequence[str] = ()
    count: int | None = None
    generated: bool = False

    def is_all(self, settings: DataSettings) -> bool:
        """Whether the labels are the very text that is read, every token of which is predicted from those before it."""
        read = settings.text or _TEXT
        return self.kind == "answer" and not self.generated and self.column == read and settings.text_pair is None

    def column_in(self, columns: Sequence[str], settings: DataSettings, place: str, *, text: bool) -> str | None:
        """The column of the labels; None where there is none of a usual name.

        Args:
            text: whether the base reads text, of which a column ``text`` then is.

        Raises:
            ValueError: if the one that is named is not there, or is part of what the model is to read.
        """
        if self.kind in WITHOUT_COLUMN:
            return None
        column = self._column_in(columns, place, text=text)
        if text and self.is_all(settings):
            return None
        read_alone = [("texts", one) for one in settings.texts or ()]
        for name, read in (("text", settings.text), ("text_pair", settings.text_pair), *read_alone):
            if column is not None and read is not None and (read == column or f"{{{column}}}" in read):
                raise ValueError(
                    f"{place}: {name}: {read!r:.60} holds the column {column!r} of the labels, which the model would "
                    "read; expected the other columns alone"
                )
        return column

    def _column_in(self, columns: Sequence[str], place: str, *, text: bool) -> str | None:
        if self.column is not None:
            if self.column not in columns:
                listed = ", ".join(columns)
                raise ValueError(f"{place}: labels: column {self.column!r} is not there (columns: {listed})")
            return self.column
        if self.kind == "tags":
            return tag_column(columns, place)
        usual = ANSWER_COLUMNS if self.kind == "answer" else CLASS_COLUMNS
        usual = usual if text or self.kind != "answer" else (*usual, _TEXT)
        return next((name for name in usual if name in columns), None)

    def check_read(
        self, text: Any, settings: DataSettings, columns: Sequence[str], label: str | None, place: str
    ) -> None:
        """Refuse a column of text that nobody named, beside others that usually are read with it: figures would be of
        half a question.

        Args:
            text: the column that is read.
            columns: of the data.
            label: the column of the labels.

        Raises:
            ValueError: naming the columns.
        """
        known = _BESIDE if self.kind == "answer" else (*_BESIDE, *_ANSWERED)
        beside = [name for name in known if name in columns and name not in (text, label)]
        if settings.text is None and isinstance(text, str) and beside and self.kind != "tags":
            both = "text_pair" if self.kind != "answer" else f'text: "{{{text}}}\\n{{{beside[0]}}}\\n"'
            raise ValueError(
                f"{place}: column {text!r} would be read alone, beside {', '.join(beside)}; expected text: {text}, or "
                f"both ({both})"
            )

    def check_blank(self, row: Row, column: str | None, where: str) -> None:
        """Refuse a row without words that has tags: of some others, which are missing.

        Raises:
            ValueError: naming it.
        """
        tags = as_list(row.get(column)) if column is not None else None
        if tags:
            raise ValueError(f"{where}: expected a word for each of its {len(tags)} tags, found none")

    def label_of(self, row: Row, column: str | None, media: str | None, where: str) -> Any:
        """What a row says of its label.

        Args:
            media: the column of files, whose folders are the classes where no column holds them.

        Raises:
            ValueError: if it says nothing.
        """
        if column is not None:
            return row.get(column)
        file = row.get(media) if media is not None else None
        folder = Path(file).parent.name if isinstance(file, str) else ""
        if self.kind != "class" or not folder:
            usual = {"answer": ANSWER_COLUMNS, "tags": TAG_COLUMNS}.get(self.kind, CLASS_COLUMNS)
            raise ValueError(
                f"{where}: no column of labels, such as {usual[0]}, in {', '.join(row)}; expected labels: COLUMN"
                + (", or a folder of images for each class" if self.kind == "class" else "")
            )
        return folder

    def number_of(self, label: Any, where: str) -> float:
        """A class by its name or number, -100 where it is unknown; or a value, NaN where it is.

        Raises:
            ValueError: naming the sample, what was found and what was expected.
        """
        if label is None or label == "" or label != label:
            return math.nan if self.kind == "value" else UNKNOWN
        if self.kind == "value":
            try:
                return float(label)
            except (TypeError, ValueError):
                raise ValueError(f"{where}: expected a number as its label, found {label!r:.60}") from None
        names = list(self.classes)
        if isinstance(label, str) and label in names:
            return names.index(label)
        number = _whole(label)
        if number is None or (names and number >= len(names)):
            if label == -1:
                raise ValueError(f"{where}: expected a class of the head, found -1; where none is known, write null")
            if names:
                raise ValueError(f"{where}: expected a class of {f'{names}':.200}, or its number, found {label!r:.60}")
            raise ValueError(
                f"{where}: expected the number of a class, found {label!r:.60}; classes: [FIRST, SECOND, ...] of the "
                "task, or id2label in a config.json beside its adapter, names those of its head, in order"
            )
        if self.count is not None and number >= self.count:
            raise ValueError(
                f"{where}: expected the number of a class from 0 to {self.count - 1}, as the head has {self.count}, "
                f"found {label!r:.60}"
            )
        # Stars from 1 to 5, which classes are called by, or classes from 0 to 4.
        others = any(name.isdecimal() and name != str(place) for place, name in enumerate(names))
        if (others and isinstance(label, str)) or (str(number) in names and names[number] != str(number)):
            raise ValueError(
                f"{where}: {label!r:.60} may be a name or a number, as classes are called {f'{names}':.200}; expected "
                "their names as text, alone"
            )
        return number

    def labelled(
        self, sample: Sample, row: Row, column: str | None, media: str | None, settings: DataSettings
    ) -> Sample:
        """A sample of a row with its label. Where no column holds answers, a chat's last turn is one, and no longer
        part of the chat.

        Raises:
            ValueError: if the row has no label.
        """
        if self.kind in WITHOUT_COLUMN:
            return sample
        if sample.text is not None and self.is_all(settings):
            return replace(sample, label=sample.text)
        answer = said_last(sample.messages or []) if column is None and self.kind == "answer" else None
        if answer is not None:
            return replace(sample, messages=(sample.messages or [])[:-1], label=answer)
        return replace(sample, label=self.label_of(row, column, media, sample.where))


def _whole(label: Any) -> int | None:
    """A number that is written as one, also with a point, as tables with gaps have it; None for anything else."""
    if isinstance(label, str) and re.fullmatch(r"\d+(\.0*)?", label) is None:
        return None
    whole = isinstance(label, str) or (isinstance(label, (int, float)) and label % 1 == 0 and label >= 0)
    return int(float(label)) if whole else None


def add_labels(
    encoded: Sequence[Encoded],
    padded: dict[str, Filling] | None,
    samples: Sequence[Sample],
    labelling: Labelling,
    tokenizer: Any,
    base: Base,
    settings: DataSettings,
) -> None:
    """Put labels beside the inputs of samples, and how they are padded beside how these are.

    Raises:
        ValueError: naming a sample whose label cannot be taken.
    """
    if labelling.kind != "answer":
        dtype = torch.long if labelling.kind == "class" else torch.float32
        for one, sample in zip(encoded, samples, strict=True):
            number = torch.tensor(labelling.number_of(sample.label, sample.where), dtype=dtype, device="cpu")
            one[LABELS] = number if padded is None else number[None]
        return
    side = "right" if base.decodes else settings.padding_side
    if padded is not None and not labelling.generated:
        padded[LABELS] = Filling(UNKNOWN, side)
    if labelling.is_all(settings) and base.decodes and base.text:
        raise ValueError(f"{samples[0].where}: labels: the encoder reads that very text; expected another column")
    if labelling.is_all(settings) and not base.decodes:
        for one in encoded:
            one[LABELS] = one[TOKENS].clone()
        return
    answers = [
        [_tokens(text, tokenizer, base, sample.where) for text in _texts(sample.label, sample.where)]
        for sample in samples
    ]
    if labelling.generated:
        _beside(encoded, answers)
        return
    for one, sample, several in zip(encoded, samples, answers, strict=True):
        if len(several) != 1:
            raise ValueError(f"{sample.where}: expected one answer, found {len(several)}; generate: true takes more")
        _behind(one, several[0], sample.where, base, settings)


def _texts(label: Any, where: str) -> list[str]:
    held = _within(label)
    texts = [_within(one) for one in held] if isinstance(held, (list, tuple)) else [held]
    for text in texts:
        if not isinstance(text, (str, int, float)) or isinstance(text, bool) or not str(text).strip():
            raise ValueError(f"{where}: expected a text, or a list of texts, as its answer, found {label!r:.60}")
        check_unicode(str(text), where)
    if not texts:
        raise ValueError(f"{where}: expected an answer as its label, found none")
    return [str(text) for text in texts]


def _within(label: Any) -> Any:
    """The texts of answers as SQuAD has them, ``{text: [...], answer_start}``, or VQA, ``[{answer, ...}, ...]``; any
    other value as it is.
    """
    names = ("text", "answer") if isinstance(label, dict) else ()
    return next((label[name] for name in names if name in label), label)


def _tokens(text: str, tokenizer: Any, base: Base, where: str) -> Tensor:
    """An answer as a model is to write it, with the token that ends a text."""
    if base.decodes:
        found = tokenizer(text_target=text, verbose=False)[TOKENS]
        # They are given to the decoder, not written by it.
        found = found[len(first_tokens(tokenizer, base)) :]
    elif not base.text:
        # Of CTC, which ends with the audio.
        found = tokenizer(text, verbose=False)[TOKENS]
    else:
        end = tokenizer.eos_token_id
        found = tokenizer(text, add_special_tokens=False, verbose=False)[TOKENS] + ([] if end is None else [end])
    if not found:
        raise ValueError(f"{where}: its answer {text!r:.60} has no token")
    return torch.tensor(found, dtype=torch.long, device="cpu")


def _beside(encoded: Sequence[Encoded], answers: Sequence[Sequence[Tensor]]) -> None:
    """Answers apart from prompts, of one shape for all samples."""
    references = max(len(several) for several in answers)
    length = max(len(answer) for several in answers for answer in several)
    for one, several in zip(encoded, answers, strict=True):
        held = torch.full((1, references, length), UNKNOWN, dtype=torch.long, device="cpu")
        for number, answer in enumerate(several):
            held[0, number, : len(answer)] = answer
        one[LABELS] = held[:, 0] if references == 1 else held


def _behind(one: Encoded, answer: Tensor, where: str, base: Base, settings: DataSettings) -> None:
    """An answer that is predicted token by token: behind its prompt, or by a decoder behind what begins all answers."""
    text = DECODED if base.decodes else TOKENS
    length, prompt = len(one[text]), one[text]
    # Of a decoder's answer the last token is read of nobody.
    if base.positions is not None and length + len(answer) - base.decodes > base.positions:
        raise ValueError(
            f"{where}: expected at most {base.positions} tokens, found {length} and {len(answer)} of its answer; give "
            f"a smaller max_length than {longest(base, settings)}"
        )
    if base.decodes:
        # The last token is read of nobody; what stands at the last of the opening predicts the first.
        one[text] = torch.cat([prompt, answer[:-1]])
        one[LABELS] = torch.cat([torch.full_like(prompt[:-1], UNKNOWN), answer])
        mask = f"{text.removesuffix(TOKENS)}{MASK}"
        if mask in one:
            one[mask] = torch.ones_like(one[text])
        return
    for name, value in list(one.items()):
        if name == text or value.dim() != 1 or len(value) != length:
            continue
        if name not in _CONTINUED:
            raise ValueError(f"{where}: {name} has no value for the tokens of an answer; expected generate: true")
        # What PaliGemma writes is of a kind of its own.
        own = 1 if name == "token_type_ids" and base.config.model_type == "paligemma" else _CONTINUED[name]
        one[name] = torch.cat([value, torch.full_like(answer, own)])
    one[text] = torch.cat([prompt, answer])
    one[LABELS] = torch.cat([torch.full_like(prompt, UNKNOWN), answer])

"""How raw samples become model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nsc_merge.utils.option_checks import check_choice, check_count, check_number

SIDES = ("right", "left")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is taken of raw data, and how it is encoded.

    Attributes:
        text: name of the column that holds the text, or a template over columns such as ``"{question}\\n{answer}"``;
            None takes the first of ``text``, ``prompt``, ``content``, ``instruction`` and ``question`` that there is,
            else the only column of texts. Of a model that classifies tokens it may hold lists of words, and None then
            takes ``tokens`` or ``words``, or the only one of lists.
        text_pair: column or template of a second text, of models that compare two (NLI, rerankers): the tokenizer puts
            both together, with its separators and token types.
        texts: columns or templates of texts that are read each alone, of models that embed them (query and document,
            with the prompts in front that they were trained with) or score them (chosen and rejected, which may be
            chats): a row is as many samples as it has of them.
        messages: name of the column that holds a chat, a list of ``{role, content}``, which goes through the
            tokenizer's chat template, with the prompt for an answer where the last turn is the user's, and with the
            functions in a column ``tools`` where there is one; None takes ``messages`` or ``conversations`` where
            there is one and no ``text`` is named.
        target: of a model with an encoder (T5, BART), the column or template of what its decoder reads, as text is of
            what its encoder does; None gives the decoder the token that begins every answer, and nothing else.
        image: name of the column that holds an image or its path, relative to the file; None takes ``image``.
        audio: name of the column that holds audio or the path of a file of it, relative to the file; None takes
            ``audio``.
        split: of a dataset that has several, or of a folder whose files, or folders of images, are called by them
            (``train-0.parquet``, ``test/``); None takes ``"train"``, or the only one.
        config: of a dataset from the hub that has several.
        tokenizer: folder or hub id, where it does not lie beside the base.
        processor: folder or hub id of the processor, image processor or feature extractor, where it does not lie beside
            the base.
        revision: of a dataset from the hub.
        max_length: tokens of a sample at most, and never more than the model has positions; those that stand for
            images or audio are not counted.
        max_seconds: of audio at most, and never more than the model's feature extractor takes (Whisper's 30).
        truncation: whether longer samples are cut; they are refused where not.
        truncation_side: the end that is cut, ``"right"`` or ``"left"``.
        padding_side: the end that is padded, ``"right"`` or ``"left"``. Behind the last token of a causal model padding
            changes nothing.
        samples: how many are drawn at most, the same ones every time; None takes all.
        seed: of the draw and of the order of the batches.
        trust_remote_code: whether tokenizer and processor may run code that comes with them.
    """

    text: str | None = None
    text_pair: str | None = None
    texts: Sequence[str] | None = None
    messages: str | None = None
    target: str | None = None
    image: str | None = None
    audio: str | None = None
    split: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    processor: str | None = None
    revision: str | None = None
    max_length: int = 512
    max_seconds: float = 30.0
    truncation: bool = True
    truncation_side: str = "right"
    padding_side: str = "right"
    samples: int | None = 1024
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        columns = ("text", "text_pair", "messages", "target", "image", "audio")
        for name in (*columns, "split", "config", "tokenizer", "processor", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: expected text, found {value!r:.60}")
        if self.texts is not None:
            listed = isinstance(self.texts, (list, tuple))
            if not listed or not self.texts or not all(isinstance(one, str) and one for one in self.texts):
                raise ValueError(f"texts: expected a list of columns or templates, found {self.texts!r:.60}")
            for name in ("text", "text_pair", "messages", "target"):
                if getattr(self, name) is not None:
                    raise ValueError(f"texts, {name}: expected one of them, as each of texts is read alone")
            object.__setattr__(self, "texts", tuple(self.texts))
        if self.text is not None and self.messages is not None:
            raise ValueError(f"text, messages: expected one of them, found {self.text!r:.60} and {self.messages!r:.60}")
        if self.text_pair is not None and self.text is None:
            raise ValueError(f"text_pair: {self.text_pair!r:.60} stands behind a text; expected text: COLUMN, too")
        check_count("max_length", self.max_length)
        check_number("max_seconds", self.max_seconds, 0.0, above=True)
        if self.samples is not None:
            check_count("samples", self.samples)
        check_count("seed", self.seed, 0)
        for name in ("truncation", "trust_remote_code"):
            check_choice(name, getattr(self, name), (True, False))
        for name in ("truncation_side", "padding_side"):
            check_choice(name, getattr(self, name), SIDES)

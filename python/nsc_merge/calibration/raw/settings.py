"""How raw samples become model inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is taken of raw data, and how it is encoded.

    Attributes:
        text: name of the column that holds the text, or a template over columns such as ``"{question}\\n{answer}"``;
            None takes the one column that can only be it.
        messages: name of the column that holds a chat, a list of ``{role, content}``, which goes through the
            tokenizer's chat template; None takes ``messages`` or ``conversations`` where there is one and no ``text``
            is named.
        image: name of the column that holds an image or its path, relative to the file; None takes ``image``.
        split: of a dataset that has several; None takes ``"train"``, or the only one.
        tokenizer: folder or hub id, where it does not lie beside the base.
        processor: folder or hub id of the processor or image processor, where it does not lie beside the base.
        revision: of a dataset from the hub.
        max_length: tokens of a sample at most.
        truncation: whether longer samples are cut; they are refused where not.
        truncation_side: the end that is cut, ``"right"`` or ``"left"``.
        padding_side: the end that is padded, ``"right"`` or ``"left"``. Behind the last token of a causal model padding
            changes nothing.
        samples: how many are drawn at most, the same ones every time; None takes all.
        seed: of the draw and of the order of the batches.
        trust_remote_code: whether tokenizer and processor may run code that comes with them.
    """

    text: str | None = None
    messages: str | None = None
    image: str | None = None
    split: str | None = None
    tokenizer: str | None = None
    processor: str | None = None
    revision: str | None = None
    max_length: int = 512
    truncation: bool = True
    truncation_side: str = "right"
    padding_side: str = "right"
    samples: int | None = 1024
    seed: int = 0
    trust_remote_code: bool = False

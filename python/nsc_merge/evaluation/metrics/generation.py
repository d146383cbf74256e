"""Sequences of tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nsc_merge.evaluation.metrics import cider_score
from nsc_merge.evaluation.metrics.classification import Outputs, Predicted, hits
from nsc_merge.evaluation.metrics.labels import IGNORE, compared

Decode = Callable[[Sequence[int]], str]

OWN = "own"
PROGRAMS = (OWN, "pycocoevalcap")


def exact_match(outputs: Outputs, labels: Tensor) -> float:
    """Share of sequences of which every known token is predicted.

    Args:
        outputs: logits ``[N, T, C]``, what :func:`predicted` keeps of them, or predicted tokens (integers) ``[N, T]``
            or longer, of which only the first T are asked for; in shorter ones the others are not predicted.
        labels: tokens ``[N, T]``, integers; :data:`IGNORE` where nothing is asked. Sequences of which nothing is asked
            do not count.

    Raises:
        TypeError, ValueError: as :func:`accuracy`.
    """
    return exact_match_per_sample(outputs, labels).nanmean().item()


def exact_match_per_sample(outputs: Outputs, labels: Tensor) -> Tensor:
    """0 or 1 for every sequence, ``[N]``; NaN where nothing is asked."""
    right, known = _tokens_right(outputs, labels)
    matched = (right | ~known).reshape(len(labels), -1).all(1).float()
    return matched.masked_fill(~known.reshape(len(labels), -1).any(1), torch.nan)


def _tokens_right(outputs: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(outputs, Predicted):
        return hits(outputs, labels)
    tokens = outputs
    if tokens.dim() == 2 and not tokens.is_floating_point():
        # Answers may be longer than any label, or be cut before one ends.
        tokens = F.pad(tokens, (0, max(0, labels.shape[-1] - tokens.shape[1])), value=IGNORE)[:, : labels.shape[-1]]
    if not tokens.is_floating_point() and tokens.shape == labels.shape:
        return compared(tokens, labels)
    return hits(outputs, labels)


def cider(
    outputs: Tensor,
    labels: Tensor,
    *,
    program: str = OWN,
    decode: Decode | None = None,
    ends: Collection[int] = (),
) -> float:
    """Mean CIDEr of generated captions: from 0 to 1 as :func:`nsc_merge.evaluation.metrics.cider_score.cider` has it,
    or pycocoevalcap's figure from 0 to 10, a CIDEr-D over what stands between spaces.

    Args:
        outputs: generated tokens ``[N, T]``, integers; :data:`IGNORE` after the end.
        labels: reference captions, tokens ``[N, T']``, or several per sample ``[N, R, T']``, filled up by
            :data:`IGNORE`.
        program: one of :data:`PROGRAMS`.
        decode: tokens -> text, for pycocoevalcap.
        ends: tokens that end a text and are no words of it, on either side.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or fewer than two samples.
    """
    return cider_per_sample(outputs, labels, program=program, decode=decode, ends=ends).mean().item()


def cider_per_sample(
    outputs: Tensor,
    labels: Tensor,
    *,
    program: str = OWN,
    decode: Decode | None = None,
    ends: Collection[int] = (),
) -> Tensor:
    """CIDEr of every caption, ``[N]``."""
    candidates, known = captions_of(outputs, labels, ends)
    cider_score.check(candidates, known)
    if program == OWN:
        return torch.tensor(cider_score.cider_per_sample(candidates, known), dtype=torch.float64, device="cpu")
    if decode is None:
        raise ValueError(f"decode: {program} takes text; expected what makes it of tokens, found none")
    from pycocoevalcap.cider.cider import Cider

    _, scores = Cider().compute_score(
        {number: [decode(caption) for caption in captions] for number, captions in enumerate(known)},
        {number: [decode(caption)] for number, caption in enumerate(candidates)},
    )
    return torch.from_numpy(scores)


def captions_of(
    outputs: Tensor, labels: Tensor, ends: Collection[int]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The tokens of every generated text, and of the references that a sample has.

    Raises:
        TypeError, ValueError: for other dtypes or shapes.
    """
    for name, value in (("outputs", outputs), ("labels", labels)):
        if value.is_floating_point():
            raise TypeError(f"{name}: expected tokens as integers, found {value.dtype}")
    if outputs.dim() != 2 or labels.dim() not in (2, 3) or len(outputs) != len(labels):
        raise ValueError(
            f"labels: expected texts [N, T'] or [N, R, T'] for outputs [N, T], found {list(labels.shape)} and "
            f"{list(outputs.shape)}"
        )
    several = labels[:, None] if labels.dim() == 2 else labels
    references = [[_tokens(caption, ends) for caption in sample] for sample in several]
    known = [[caption for caption in sample if caption] for sample in references]
    return [_tokens(caption, ends) for caption in outputs], known


def _tokens(caption: Tensor, ends: Collection[int]) -> list[int]:
    return [token for token in caption.tolist() if token != IGNORE and token not in ends]

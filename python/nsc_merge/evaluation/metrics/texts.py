"""Generated texts against texts that people wrote: ROUGE, BLEU, word and character error rates of torchmetrics, and the
figures of questions about images: VQA's accuracy, ChartQA's relaxed accuracy, and DocVQA's ANLS.

Outputs are generated tokens ``[N, T]``, :data:`IGNORE` after the end of each; labels are reference texts as tokens,
``[N, T']``, or several of each sample ``[N, R, T']``, filled up by :data:`IGNORE`. ``decode`` makes text of tokens;
what is in ``ends`` ends a text and is no part of it. All figures are shares from 0 to 1, but error rates, which may be
above 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc_merge.evaluation.metrics.generation import Decode, captions_of

# The human answers of a question of VQA that have to agree with one for a full score.
_ENOUGH = 3
# How far off a number may be, of the one that is right, and how alike texts have to be for any score.
_RELAXED, _ALIKE = 0.05, 0.5
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = frozenset(("a", "an", "the"))
# Words that lose nothing but an apostrophe: no word of their own is among them, as "were" and "its" would be.
_NOT = (
    "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won "
    "wouldn"
)
_CONTRACTED = (
    "I'm I've you're you've he's she's it'd it'll they're they've they'll they'd we've that's that'll what's what're "
    "where's who's who'd there's here's how's when's why's let's could've would've should've might've must've y'all "
    "o'clock"
)
_APOSTROPHES = {
    **{f"{word}t": f"{word}'t" for word in _NOT.split()},
    **{word.lower().replace("'", ""): word.lower() for word in _CONTRACTED.split()},
}


def rouge(kind: str, outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """Mean of :func:`rouge_per_sample`."""
    return rouge_per_sample(kind, outputs, labels, decode=decode, ends=ends).mean().item()


def rouge_per_sample(
    kind: str, outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()
) -> Tensor:
    """F-measure of ``rouge1``, ``rouge2`` or ``rougeL`` with the reference that it is highest for (Lin 2004), ``[N]``:
    over words of the letters a to z and digits in lower case, without stemming, as the package ``rouge-score`` has it.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or references of which none has such a word.
    """
    from torchmetrics.functional.text import rouge_score

    candidates, references = texts_of(outputs, labels, decode, ends)
    if not any(re.search("[a-z0-9]", text.lower()) for texts in references for text in texts):
        raise ValueError(
            f"labels: ROUGE is of words of the letters a to z, and there are none, as in {references[0][0]!r:.60}; "
            "expected another metric, such as cider, which is of tokens"
        )
    scores = [
        rouge_score(candidate, [texts], rouge_keys=kind)[f"{kind}_fmeasure"]
        for candidate, texts in zip(candidates, references, strict=True)
    ]
    return torch.stack(scores).double()


def bleu(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """BLEU of all texts together (Papineni et al. 2002), words as in ``13a`` and not in lower case: a hundredth of
    what sacrebleu prints, and 0 where no four words in a row are right.

    Raises:
        TypeError, ValueError: for other dtypes or shapes.
    """
    return float(_counted(*texts_of(outputs, labels, decode, ends)).compute())


def bleu_per_sample(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> Tensor:
    """BLEU of every sentence by itself, ``[N]``, smoothed, as few have all lengths of matches: one more match and one
    more n-gram of all lengths but the first (Lin and Och 2004). 0 where no word is right.
    """
    pairs = zip(*texts_of(outputs, labels, decode, ends), strict=True)
    return torch.stack([_smoothed(_counted([candidate], [texts])) for candidate, texts in pairs])


def _counted(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    """torchmetrics' counts of n-grams and words. Of references that are as near to a text in length the shorter one
    counts, as for sacrebleu: torchmetrics takes the first.
    """
    from torchmetrics.text import SacreBLEUScore

    counts = SacreBLEUScore()
    counts.update(candidates, [sorted(texts, key=lambda text: len(counts.tokenizer(text))) for texts in references])
    return counts


def _smoothed(counts: Any) -> Tensor:
    """BLEU with smoothing, which torchmetrics leaves out where some length has no match."""
    matches, grams = counts.numerator.double(), counts.denominator.double()
    if not matches[0]:
        return matches[0]
    more = torch.tensor([0.0] + [1.0] * (len(grams) - 1), device=grams.device)
    brevity = (1 - counts.target_len.double() / counts.preds_len).clamp(max=0).exp()
    return brevity * ((matches + more) / (grams + more)).log().mean().exp()


def error_rate(unit: str, outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """Words (``unit`` ``"word"``: WER) or characters (``"char"``: CER) that have to be put in, left out or changed,
    over those of all references: of the texts as they are, whose case and punctuation count.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or several references of a sample.
    """
    candidates, references = _one_reference(outputs, labels, decode, ends)
    return float(_rate(unit)(candidates, references))


def error_rate_per_sample(
    unit: str, outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()
) -> Tensor:
    """The error rate of every text with a minus, ``[N]``."""
    pairs = zip(*_one_reference(outputs, labels, decode, ends), strict=True)
    rates = [-float(_rate(unit)([candidate], [reference])) for candidate, reference in pairs]
    return torch.tensor(rates, dtype=torch.float64, device="cpu")


def _rate(unit: str) -> Any:
    from torchmetrics.functional import text

    return {"word": text.word_error_rate, "char": text.char_error_rate}[unit]


def _one_reference(
    outputs: Tensor, labels: Tensor, decode: Decode, ends: Collection[int]
) -> tuple[list[str], list[str]]:
    candidates, references = texts_of(outputs, labels, decode, ends)
    for number, known in enumerate(references):
        if len(known) != 1 or not known[0]:
            found = "one without words" if len(known) == 1 else f"{len(known)}"
            raise ValueError(f"labels: expected one reference with words of every sample, found {found} of {number}")
    return candidates, [known[0] for known in references]


def vqa(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """Mean of :func:`vqa_per_sample`."""
    return vqa_per_sample(outputs, labels, decode=decode, ends=ends).mean().item()


def vqa_per_sample(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> Tensor:
    """Accuracy of VQA (Antol et al. 2015), ``[N]``: min(1, how many people gave this answer / 3), averaged over leaving
    out each of the ten people in turn. Where one answer alone is known, whether it is given.

    Answers are compared by :func:`as_answer`, on both sides.
    """
    candidates, references = texts_of(outputs, labels, decode, ends)
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        answer, known = as_answer(candidate), [as_answer(text) for text in texts]
        same = [one == answer for one in known]
        shares = [min(1.0, (sum(same) - left_out) / _ENOUGH) for left_out in same]
        scores.append(float(same[0]) if len(known) == 1 else sum(shares) / len(shares))
    return torch.tensor(scores, dtype=torch.float64, device="cpu")


def as_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it (https://visualqa.org/evaluation.html): in lower case; without commas
    in numbers and periods that are no decimal points; spaces for all other punctuation but apostrophes and colons;
    digits for numbers to ten; without articles; with the apostrophes of contractions.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s.':]|_", " ", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def relaxed_accuracy(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """Mean of :func:`relaxed_accuracy_per_sample`."""
    return relaxed_accuracy_per_sample(outputs, labels, decode=decode, ends=ends).mean().item()


def relaxed_accuracy_per_sample(
    outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()
) -> Tensor:
    """Relaxed accuracy of ChartQA (Masry et al. 2022, after Methani et al. 2020), ``[N]``: of numbers, whether the
    answer is within 5 % of the reference, and of texts whether it is the same, in whatever case; by the best of several
    references. ``12 %`` is 0.12, and of a reference of 0 nothing is 5 %: texts are compared.
    """

    def right(candidate: str, text: str) -> float:
        found, wanted = _number(candidate), _number(text)
        if found is not None and wanted:
            return float(abs(found - wanted) <= _RELAXED * abs(wanted))
        return float(candidate.lower() == text.lower())

    return _best(right, *texts_of(outputs, labels, decode, ends))


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> float:
    """Mean of :func:`anls_per_sample`."""
    return anls_per_sample(outputs, labels, decode=decode, ends=ends).mean().item()


def anls_per_sample(outputs: Tensor, labels: Tensor, *, decode: Decode, ends: Collection[int] = ()) -> Tensor:
    """Normalised Levenshtein similarity of DocVQA (Biten et al. 2019, Eq. 1), ``[N]``, whose mean is ANLS: 1 less the
    characters to put in, leave out or change over those of the longer text, with the reference that it is highest for,
    and 0 if that is below 0.5. Case, and how many spaces are between words, are no change.
    """
    from torchmetrics.functional.text import edit_distance

    def alike(candidate: str, text: str) -> float:
        found, wanted = (" ".join(one.lower().split()) for one in (candidate, text))
        # As the challenge's own evaluation has it, of the texts as they are.
        longer = max(len(candidate), len(text))
        similarity = 1 - float(edit_distance([found], [wanted])) / longer if longer else 1.0
        return similarity if similarity >= _ALIKE else 0.0

    return _best(alike, *texts_of(outputs, labels, decode, ends))


def _best(
    score: Callable[[str, str], float], candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Tensor:
    """Of every text, the score with the reference that it is highest for."""
    found = [max(score(one, text) for text in texts) for one, texts in zip(candidates, references, strict=True)]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def texts_of(
    outputs: Tensor, labels: Tensor, decode: Decode, ends: Collection[int]
) -> tuple[list[str], list[list[str]]]:
    """The generated text, and the references, of every sample.

    Raises:
        TypeError, ValueError: for other dtypes or shapes, or a sample without a reference.
    """
    candidates, references = captions_of(outputs, labels, ends)
    for number, known in enumerate(references):
        if not known:
            raise ValueError(f"labels: expected a reference of every sample, found none of sample {number}")

    def written(tokens: Any) -> str:
        return decode(tokens).strip()

    return [written(one) for one in candidates], [[written(one) for one in known] for known in references]

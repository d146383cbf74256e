"""The tasks: what is asked, in words, and what the answer is.

* ``relation``: what a second word is to a first one (what that is a kind of, what it is a part of, its opposite,
  nothing), given the glosses of both, as in inference between a premise and a hypothesis. WordNet.
* ``topic``: which of eight categories a saying is from. ``fortune``.
* ``language``: which of twelve languages in Latin script a message is in. Django's translations.
* ``sentiment``: how positive a tweet, a review or a line of news is, from -4 to 4. A regression. VADER's texts.
* ``number``: a number in words, to be written in digits. By rule.
* ``lemma``: the base form of an irregular form. WordNet. Both are answered through the language model's own head.

What a text is made from (a word, a saying, a message whatever its language, a number) is in one split only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from ...suite import TaskInfo
from .sources import Raw

TASKS = {
    task.name: task
    for task in (
        TaskInfo("relation", "acc", False, "classification"),
        TaskInfo("topic", "acc", False, "classification"),
        TaskInfo("language", "acc", False, "classification"),
        TaskInfo("sentiment", "MAE", True, "regression"),
        TaskInfo("number", "exact", False, "generation"),
        TaskInfo("lemma", "exact", False, "generation"),
    )
}
RELATIONS = ("kind", "part", "opposite", "none")
TOPICS = ("art", "computers", "men-women", "politics", "science", "songs-poems", "wisdom", "work")
LANGUAGES = ("ca", "cs", "da", "es", "gl", "it", "nb", "nl", "pt", "sk", "sl", "sv")
CLASSES = {"relation": len(RELATIONS), "topic": len(TOPICS), "language": len(LANGUAGES)}

SPLITS = ("train", "val", "test")
# Of what texts are made from, in a hundred.
_SHARES = {"train": 64, "val": 12, "test": 24}
_GLOSS_WORDS = 6
# Of each relation.
_PAIRS = 4000
# Which relation of WordNet's files; of nouns, and of adjectives alike for opposites.
_POINTERS = {"kind": ("@",), "part": ("#p", "#m"), "opposite": ("!",)}


@dataclass(frozen=True)
class Text:
    """A question, its answer (a class, a value, or words to be written), and what it was made from."""

    question: str
    answer: int | float | str
    origin: str


def make_texts(task: str, raw: Raw, counts: dict[str, int]) -> dict[str, list[Text]]:
    """Split -> so many texts of a task; equal arguments give equal texts.

    Raises:
        ValueError: if there are not as many.
    """
    rng = random.Random(f"texts of {task}")
    found = _MAKERS[task](raw, rng)
    places = sorted({text.origin for text in found})
    rng.shuffle(places)
    first = 0
    splits: dict[str, list[Text]] = {}
    for split in SPLITS:
        last = first + len(places) * _SHARES[split] // 100
        origins = set(places[first:last])
        first = last
        texts = _in_turn([text for text in found if text.origin in origins], task, rng)
        if len(texts) < counts[split]:
            raise ValueError(f"{split}: expected at most {len(texts)} texts of {task}, found {counts[split]}")
        splits[split] = texts[: counts[split]]
    return splits


def _in_turn(texts: list[Text], task: str, rng: random.Random) -> list[Text]:
    """In a random order; where there are classes, one of each in turn, as long as all have one."""
    rng.shuffle(texts)
    if task not in CLASSES:
        return texts
    classes = [[text for text in texts if text.answer == label] for label in range(CLASSES[task])]
    return [text for together in zip(*classes, strict=False) for text in together]


def _relation(raw: Raw, rng: random.Random) -> list[Text]:
    synsets: dict[str, tuple[str, str]] = {}
    pointers: list[tuple[str, str, str]] = []
    for name, lines in raw.wordnet("data.noun", "data.adj").items():
        kind = name[5]
        # The licence comes first, indented.
        for line in (line for line in lines if not line.startswith("  ")):
            fields, _, gloss = line.partition("|")
            place, _, _, words, *rest = fields.split()
            synsets[kind + place] = rest[0].split("(")[0].replace("_", " "), _shortened(gloss)
            rest = rest[2 * int(words, 16) :]
            for first in range(1, 1 + 4 * int(rest[0]), 4):
                symbol, other, part = rest[first : first + 3]
                pointers.append((symbol, kind + place, part.replace("s", "a") + other))
    found: list[tuple[str, str, int]] = []
    for label, symbols in enumerate(_POINTERS.values()):
        pairs = [(a, b) for symbol, a, b in pointers if symbol in symbols and b in synsets]
        found += [(a, b, label) for a, b in rng.sample(pairs, min(len(pairs), _PAIRS))]
    for kind in "na":
        names = sorted(name for name in synsets if name[0] == kind)
        drawn = (rng.sample(names, 2) for _ in range(_PAIRS // 2))
        found += [(a, b, RELATIONS.index("none")) for a, b in drawn]
    return [Text("\n".join(": ".join(synsets[one]) for one in (a, b)), label, min(a, b)) for a, b, label in found]


def _shortened(gloss: str) -> str:
    return " ".join(re.split(r"[;(]", gloss.strip())[0].split()[:_GLOSS_WORDS])


def _topic(raw: Raw, rng: random.Random) -> list[Text]:
    found = []
    for label, texts in enumerate(raw.fortunes(*TOPICS).values()):
        for text in texts:
            # Underlined by overstriking, in places.
            words = text.replace("_\b", "").split()
            if len(words) >= 6:
                found.append(Text(" ".join(words[:14]), label, " ".join(words[:6])))
    return found


def _language(raw: Raw, rng: random.Random) -> list[Text]:
    found = []
    for label, messages in enumerate(raw.messages(*LANGUAGES).values()):
        for english, translated in messages.items():
            words = re.sub(r"%\(\w+\)s|%s|\\n|<[^>]*>|&\w+;", "", translated).split()
            if len(words) >= 2:
                found.append(Text(" ".join(words[:6]), label, english))
    return found


def _sentiment(raw: Raw, rng: random.Random) -> list[Text]:
    return [
        Text(" ".join(text.split()[:16]), rating / 1.5, text)
        for texts in raw.rated().values()
        for text, rating in texts
        if len(text.split()) >= 3
    ]


def _number(raw: Raw, rng: random.Random) -> list[Text]:
    numbers = {int(10 ** rng.uniform(1.0, 5.0)) for _ in range(12_000)}
    return [Text(f"{in_words(n)} =", f" {n}", str(n)) for n in sorted(numbers)]


def _lemma(raw: Raw, rng: random.Random) -> list[Text]:
    found = []
    kinds = {"noun.exc": "noun", "verb.exc": "verb", "adj.exc": "adjective"}
    for name, lines in raw.wordnet(*kinds).items():
        for line in lines:
            form, base = line.split()[:2]
            if form != base and form.isalpha() and base.isalpha():
                found.append(Text(f"{kinds[name]} {form} ->", f" {base}", base))
    return found


_MAKERS: dict[str, Callable[[Raw, random.Random], list[Text]]] = {
    "relation": _relation,
    "topic": _topic,
    "language": _language,
    "sentiment": _sentiment,
    "number": _number,
    "lemma": _lemma,
}

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """``number``, below a million, in English words."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    large, small = divmod(number, 1000 if number >= 1000 else 100)
    name = "thousand" if number >= 1000 else "hundred"
    link = " and " if small < 100 else " "
    return f"{in_words(large)} {name}" + (f"{link}{in_words(small)}" if small else "")

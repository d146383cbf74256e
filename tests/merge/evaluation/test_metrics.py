"""Metrics against figures by hand, normalisation, the union of tasks, and heads."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload
from torch import nn
from zoo import KINDS, build

from nsc_merge.evaluation import heads, metrics
from nsc_merge.evaluation.joint_classes import Union, hits
from nsc_merge.evaluation.metrics import cider_score
from nsc_merge.evaluation.normalise import average, normalised
from nsc_merge.evaluation.tables import _spread

METRICS = metrics.METRICS


def logits(predicted, classes):
    return nn.functional.one_hot(torch.tensor(predicted), classes).float()


# Metrics


def test_accuracy_by_hand():
    outputs, labels = logits([0, 2, 1, 1], 3), torch.tensor([0, 1, 1, metrics.IGNORE])
    assert metrics.accuracy(outputs, labels) == pytest.approx(2 / 3)
    per_sample = metrics.accuracy_per_sample(outputs[:3], labels[:3])
    assert per_sample.tolist() == [1, 0, 1]


def test_a_share_is_not_rounded_to_the_default_dtype():
    outputs, labels = logits([[0, 1, 1]], 2), torch.tensor([[0, 0, 0]])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert metrics.accuracy_per_sample(outputs, labels).tolist() == pytest.approx([1 / 3], abs=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mean_iou_by_hand():
    # Class 0: 2 of 3 pixels in common; class 1: 1 of 3; class 2 neither occurs nor is predicted.
    outputs = logits([[0, 0, 1, 1]], 3)
    labels = torch.tensor([[0, 0, 0, 1]])
    assert metrics.mean_iou(outputs, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
    two = torch.cat([outputs, logits([[1, 1, 1, 1]], 3)]), torch.cat([labels, torch.tensor([[1, 1, 1, 1]])])
    assert metrics.mean_iou_per_sample(*two).tolist() == pytest.approx([(2 / 3 + 1 / 2) / 2, 1.0])
    # Together: class 0 2/3, class 1 5/6; an unknown pixel counts nowhere.
    assert metrics.mean_iou(*two) == pytest.approx((2 / 3 + 5 / 6) / 2)
    ignored = torch.tensor([[0, 0, metrics.IGNORE, 1]])
    assert metrics.mean_iou(outputs, ignored) == 1.0


def test_a_prediction_that_is_no_number_is_wrong():
    """argmax takes NaN for the highest: a broken model would have the share of the first class."""
    broken, labels = torch.full((1, 4, 3), math.nan), torch.tensor([[0, 0, 1, 0]])
    for name in ("accuracy", "miou", "f1", "matthews", "exact_match"):
        assert METRICS[name].measure(broken, labels) == 0
        assert METRICS[name].quality(broken, labels).tolist() == [0]
    # One logit is enough, of whichever class.
    outputs = logits([[0, 0, 1, 0]], 3)
    outputs[0, 0, 2] = math.nan
    assert metrics.accuracy(outputs, labels) == 3 / 4
    # Class 0: 2 of 3 pixels, the third is missed; class 1 in full; class 2 is not predicted.
    assert metrics.mean_iou(outputs, labels) == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.exact_match(outputs, labels) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 7), (8, 4, 5)])
@pytest.mark.parametrize("name", ["accuracy", "miou", "f1", "f1_binary", "matthews", "perplexity", "exact_match"])
def test_what_is_kept_of_logits_has_their_figures(name, shape, dtype):
    classes = 2 if name == "f1_binary" else 6
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, shape, generator=generator)
    outputs = 4 * nn.functional.one_hot(labels, classes) + 3 * torch.randn(*shape, classes, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = metrics.IGNORE
    labels[1] = metrics.IGNORE
    outputs = outputs.to(dtype)
    kept = metrics.predicted(outputs, labels)
    assert kept.classes.shape == kept.surprise.shape == shape
    whole, metric = outputs.float(), METRICS[name]
    assert metric.measure(kept, labels) == pytest.approx(metric.measure(whole, labels), rel=1e-6)
    assert metric.loss(kept, labels).item() == pytest.approx(metric.loss(whole, labels).item(), rel=1e-6)
    # Some that are known then are left out afterwards, for standard errors.
    labels[::3] = metrics.IGNORE
    assert metric.measure(kept, labels) == pytest.approx(metric.measure(whole, labels), rel=1e-6)
    each = metric.quality(whole, labels).tolist()
    assert metric.quality(kept, labels).tolist() == pytest.approx(each, rel=1e-5, nan_ok=True)
    outputs[0, 0, 1] = math.nan
    broken = metrics.predicted(outputs, labels)
    if name != "perplexity":
        assert metric.measure(broken, labels) == metric.measure(outputs.float(), labels)


def test_errors_by_hand():
    outputs, labels = torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [2.0, math.nan]])
    assert metrics.rmse(outputs, labels) == pytest.approx(math.sqrt(10 / 3))
    assert metrics.l1(outputs[..., None], labels) == pytest.approx(4 / 3)
    assert METRICS["rmse"].quality(outputs, labels).tolist() == pytest.approx([-math.sqrt(5), 0])
    assert METRICS["l1"].quality(outputs, labels).tolist() == pytest.approx([-2, 0])
    assert float(METRICS["rmse"].loss(outputs, labels)) == pytest.approx(10 / 3)


def test_mean_angle_by_hand():
    outputs = torch.tensor([[[2.0, 0.0], [3.0, 3.0]], [[0.0, -1.0], [1.0, 0.0]]])
    labels = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [math.nan, 0.0]]])
    assert metrics.mean_angle(outputs, labels) == pytest.approx((0 + 45 + 180) / 3, rel=1e-5)
    assert METRICS["mean_angle"].quality(outputs, labels).tolist() == pytest.approx([-22.5, -180])
    assert float(metrics.cosine_loss(outputs, labels)) == pytest.approx((0 + 1 - math.sqrt(0.5) + 2) / 3)


def test_angles_are_of_directions_and_exact_where_they_are_small():
    """Of labels that are longer than 1, as normals read from pictures may be, and of none without a direction."""
    outputs, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    for length in (1e-20, 0.3, 1.0, 2.0):
        assert metrics.mean_angle(1e-4 * outputs, length * labels) == pytest.approx(45)
        assert METRICS["mean_angle"].quality(outputs, length * labels).item() == pytest.approx(-45)
        assert float(metrics.cosine_loss(outputs, length * labels)) == pytest.approx(1 - math.sqrt(0.5))
    with pytest.raises(ValueError, match="labels: expected vectors with a direction, found one of length 0"):
        metrics.mean_angle(outputs, torch.zeros(1, 2))
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1000, 3, generator=generator)
    second = first + 1e-4 * torch.randn(1000, 3, generator=generator)
    sine = torch.linalg.cross(first.double(), second.double()).norm(dim=-1)
    angles = torch.atan2(sine, (first.double() * second.double()).sum(-1))
    assert metrics.mean_angle(first, second) == pytest.approx(angles.rad2deg().mean().item(), rel=1e-4)


def test_correlations_of_outputs_in_half_precision():
    outputs, labels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16), torch.tensor([1.0, 3.0, 2.0])
    assert metrics.pearson(outputs, labels) == pytest.approx(1 / math.sqrt(28 / 3))
    assert metrics.spearman(outputs, labels) == pytest.approx(0.5)


def test_edge_f_by_hand():
    truth = torch.zeros(1, 5, 5)
    truth[0, :, 2] = 1
    scores = torch.zeros(1, 5, 5)
    scores[0, :, 3], scores[0, 0, 0] = 0.9, 0.6
    # Above 0.6 only the column beside the edge is predicted: right within one pixel, wrong within none.
    assert metrics.edge_f(scores, truth) == pytest.approx(1.0)
    assert metrics.edge_f(scores, truth, tolerance=0) == 0
    # With the stray pixel, precision is 5/6 and recall 1.
    assert metrics.edge_f(scores, truth, thresholds=1) == pytest.approx(2 * (5 / 6) / (5 / 6 + 1))
    assert metrics.edge_f(10 * (scores - 0.5), truth, logits=True, thresholds=1) == pytest.approx(10 / 11)
    # At thresholds of a third and two thirds the stray pixel is left out by the higher one; of logits, too.
    for given, told in ((scores, {}), (torch.logit(scores, 1e-6), {"logits": True})):
        assert metrics.edge_f(given, truth, thresholds=2, **told) == 1
        assert metrics.edge_f(given, truth, thresholds=1, **told) == pytest.approx(10 / 11)
    # An edge is above a half; one pixel of five is right on either side.
    short = torch.where(truth > 0, 0.6, 0.5)
    across = torch.zeros(1, 5, 5)
    across[0, 2, :] = 1
    assert metrics.edge_f(across, short, tolerance=0) == pytest.approx(1 / 5)
    one = torch.zeros(1, 5, 5)
    one[0, 2, 2] = 1
    assert metrics.edge_f(one, one, tolerance=0) == 1
    blank = torch.cat([scores, torch.zeros(1, 5, 5)]), torch.cat([truth, truth])
    assert metrics.edge_f_per_sample(*blank).tolist() == pytest.approx([1.0, 0.0])


def test_the_loss_of_edges_is_of_known_pixels():
    outputs, labels = torch.tensor([[[2.0, -1.0], [0.5, 3.0]]]), torch.tensor([[[1.0, 0.0], [math.nan, 1.0]]])
    found = METRICS["edge_f"].with_options(logits=True).loss(outputs, labels)
    assert float(found) == pytest.approx(sum(math.log1p(math.exp(-x)) for x in (2, 1, 3)) / 3)
    assert METRICS["edge_f"].with_options(logits=True).loss(outputs[..., None], labels) == found
    assert float(METRICS["edge_f"].loss(outputs, labels)) == pytest.approx((1 + 1 + 2) / 3)


def test_exact_match_by_hand():
    labels = torch.tensor([[1, 2, metrics.IGNORE], [1, 2, 0]])
    tokens = torch.tensor([[1, 2, 7], [1, 0, 0]])
    assert metrics.exact_match_per_sample(tokens, labels).tolist() == [1, 0]
    assert metrics.exact_match(logits([[1, 2, 0], [1, 2, 0]], 3), labels) == 1


def test_samples_without_anything_to_measure_do_not_count():
    labels = torch.tensor([[1, 2], [metrics.IGNORE, metrics.IGNORE], [1, 0]])
    tokens = torch.tensor([[1, 2], [1, 2], [1, 2]])
    found = metrics.exact_match_per_sample(tokens, labels)
    torch.testing.assert_close(found, torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)
    assert metrics.exact_match(tokens, labels) == 0.5
    truth, scores = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    truth[0, 1], scores[0, 1] = 1, 1
    scores[2, 2] = 1
    # Without an edge, predicting none leaves nothing to measure, and predicting one is wrong.
    found = metrics.edge_f_per_sample(scores, truth)
    torch.testing.assert_close(found, torch.tensor([1.0, math.nan, 0.0]).double(), equal_nan=True)


def test_what_is_generated_beyond_the_labels_is_not_asked_for():
    labels = torch.tensor([[1, 2], [3, metrics.IGNORE]])
    assert metrics.exact_match(torch.tensor([[1, 2, 9], [3, 4, 5]]), labels) == 1
    assert metrics.exact_match(torch.tensor([[1, 1, 2], [3, 4, 5]]), labels) == 0.5
    # Answers that are cut before a label ends have not said the rest.
    assert metrics.exact_match(torch.tensor([[1], [3]]), labels) == 0.5


def test_cider_by_hand():
    references = [["a cat sat"], ["a dog ran", "the dog ran"]]
    assert cider_score.cider(["A cat sat.", "a dog ran"], references) < 1
    # "a" is in both samples and weighs nothing. Length 1: cat and sat weigh alike, so that the cosine of "cat" with
    # them is sqrt(1/2); no longer n-gram occurs.
    scores = cider_score.cider_per_sample(["cat", "the dog ran"], [["a cat sat"], ["a dog ran"]])
    assert scores[0] == pytest.approx(math.sqrt(0.5) / 4)
    # the, dog, ran against dog, ran: sqrt(2/3). Of "the dog", "dog ran" against "a dog", "dog ran": 1/2.
    assert scores[1] == pytest.approx((math.sqrt(2 / 3) + 1 / 2) / 4)
    # A caption that is its own reference: 1 for every length up to its own.
    same = cider_score.cider_per_sample(["one two three four five", "six"], [["one two three four five"], ["six"]])
    assert same == pytest.approx([1.0, 0.25])


def test_cider_of_tokens_is_that_of_words():
    outputs = torch.tensor([[3, metrics.IGNORE, metrics.IGNORE], [5, 6, 7]])
    labels = torch.tensor([[1, 3, 4], [1, 6, 7]])
    words = cider_score.cider_per_sample(["cat", "the dog ran"], [["a cat sat"], ["a dog ran"]])
    assert METRICS["cider"].quality(outputs, labels).tolist() == pytest.approx(words)
    several = labels[:, None].repeat(1, 2, 1)
    several[:, 1] = metrics.IGNORE
    assert METRICS["cider"].measure(outputs, several) == pytest.approx(sum(words) / 2)


def test_the_end_of_a_caption_is_no_word_of_it():
    """A model that ends its captions is no worse for references without the token of the end."""
    references, end = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15]], 2
    bare, ended = (
        torch.tensor([[*row, *more, *[metrics.IGNORE] * (5 - len(row) - len(more))] for row in references])
        for more in ([], [end])
    )
    # A text of three words has no sequence of four.
    expected = (1 + 1 + 3 / 4) / 3
    for outputs in (bare, ended):
        for labels in (bare, ended):
            assert METRICS["cider"].measure(outputs, labels, ends=(end,)) == pytest.approx(expected)
            assert METRICS["cider"].quality(outputs, labels, ends=(end,))[2] == pytest.approx(3 / 4)
    # Without ends a token is a token.
    assert METRICS["cider"].measure(ended, bare) < 0.8


@pytest.mark.parametrize("name", METRICS)
def test_quality_and_metric_agree_in_direction(name):
    """A perfect prediction is the best there is, overall and for every sample."""
    metric = METRICS[name]
    generator = torch.Generator().manual_seed(0)
    if name in ("accuracy", "miou", "f1", "f1_binary", "matthews", "perplexity", "entity_f1"):
        classes = 2 if name == "f1_binary" else 3
        labels = torch.randint(0, classes, (4, 6), generator=generator)
        good, bad = logits(labels.tolist(), classes), logits(((labels + 1) % classes).tolist(), classes)
    elif name == "exact_match" or metric.writes:
        labels = torch.randint(0, 30, (4, 6), generator=generator)
        good, bad = labels, labels + 1
    elif metric.several:
        labels = (torch.rand(4, 6, generator=generator) > 0.5).float()
        good, bad = 2 * labels - 1, 1 - 2 * labels
    elif metric.embeds:
        # Of every row two texts: the second is found by the first, or is opposite to it.
        metric = metric.with_options(k=1)
        labels = torch.arange(12)[:4, None].expand(4, 2)
        found = nn.functional.one_hot(labels, 4).float()
        good, bad = found, found * torch.tensor([1.0, -1.0])[:, None]
    elif metric.scores:
        labels = torch.tensor([0, 1, 0, 2])
        good, bad = nn.functional.one_hot(labels, 3).float(), nn.functional.one_hot((labels + 1) % 3, 3).float()
    elif name == "mean_angle":
        labels = nn.functional.normalize(torch.randn(4, 6, 3, generator=generator), dim=-1)
        good, bad = labels, -labels
    else:
        labels = (torch.rand(4, 6, 6, generator=generator) > 0.7).float()
        good, bad = labels, 1 - labels
    further = {"decode": lambda tokens: " ".join(f"w{token}" for token in tokens)} if metric.decodes else {}
    further |= {"classes": ["O", "B-PER", "B-LOC"]} if metric.named else {}
    best, worst = (metric.measure(outputs, labels, **further) for outputs in (good, bad))
    assert (best < worst) == metric.lower_is_better
    quality, worse = metric.quality(good, labels, **further), metric.quality(bad, labels, **further)
    assert quality.shape == (4,)
    assert (quality >= worse).all()
    assert quality.mean() > worse.mean()
    if metric.loss is not None and good.is_floating_point():
        assert metric.loss(good, labels) < metric.loss(bad, labels)


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "error", "words"),
    [
        ("accuracy", torch.zeros(2, 3), torch.zeros(2), TypeError, "labels: expected class indices"),
        ("accuracy", torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), TypeError, "labels: .* found torch.bool"),
        ("accuracy", torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "outputs: expected logits"),
        ("accuracy", torch.zeros(3), torch.zeros(3).long(), ValueError, r"expected logits \[N, ..., C\]"),
        (
            "miou",
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            ValueError,
            "classes from 0 to 2 .or -100., found 3",
        ),
        ("accuracy", torch.zeros(2, 1), torch.zeros(2).long(), ValueError, r"two classes or more, found one, \[2, 1\]"),
        ("miou", torch.zeros(1, 3), torch.tensor([-100]), ValueError, "at least one known label"),
        (
            "rmse",
            torch.zeros(2, 3),
            torch.zeros(2),
            ValueError,
            r"expected \[2\] or \[2, 1\].*found \[2, 3\]",
        ),
        ("f1_binary", torch.zeros(2, 3), torch.zeros(2).long(), ValueError, "logits of two classes, found 3"),
        ("pearson", torch.zeros(2, 3), torch.zeros(2), ValueError, r"expected \[2\] or \[2, 1\]"),
        *(
            (name, torch.zeros(2, 3, 2), torch.zeros(3, 2).long(), ValueError, r"found \[2, 3, 2\] and \[3, 2\]")
            for name in ("miou", "f1", "matthews")
        ),
        ("l1", torch.zeros(2), torch.zeros(2).long(), TypeError, "labels: expected floating point"),
        ("l1", torch.zeros(2), torch.full((2,), math.nan), ValueError, "at least one known label"),
        ("mean_angle", torch.zeros(2), torch.zeros(2), ValueError, r"expected vectors \[N, ..., D\]"),
        ("mean_angle", torch.ones(3, 3, 1), torch.ones(3, 3), ValueError, r"expected vectors .*found \[3, 3, 1\]"),
        ("edge_f", torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), ValueError, "at least one edge pixel"),
        ("mean_angle", torch.ones(2, 3), torch.full((2, 3), math.nan), ValueError, "at least one known label"),
        ("edge_f", torch.zeros(2, 3), torch.ones(2, 3), ValueError, r"expected edge maps \[N, H, W\]"),
        ("cider", torch.zeros(2, 3), torch.zeros(2, 3).long(), TypeError, "expected tokens as integers"),
        *(
            ("cider", torch.ones(outputs).long(), torch.ones(labels).long(), ValueError, "labels: expected texts")
            for outputs, labels in (((2, 3, 3), (2, 3)), ((2, 3), (2,)), ((2, 3), (3, 3)))
        ),
        ("exact_match", torch.zeros(2, 4, 5), torch.zeros(2, 3).long(), ValueError, "expected logits"),
        ("exact_match", torch.zeros(2, 3), torch.zeros(2, 3).long(), ValueError, "expected logits"),
        ("cider", torch.ones(1, 3).long(), torch.ones(1, 3).long(), ValueError, "at least two samples"),
    ],
)
def test_wrong_outputs_are_refused_by_name(name, outputs, labels, error, words):
    with pytest.raises(error, match=words):
        METRICS[name].measure(outputs, labels)


def test_what_a_sample_is_judged_by_is_called_what_it_is():
    """No sample has a correlation or an F-measure of its own."""
    found = {name: metric.quality_label for name, metric in METRICS.items()}
    assert [found[name] for name in ("accuracy", "rmse", "mean_angle")] == ["acc", "-RMSE", "-deg"]
    assert [found[name] for name in ("f1", "matthews", "spearman", "perplexity")] == ["acc", "acc", "-L1", "-log ppl"]


def test_metrics_take_only_their_own_options():
    with pytest.raises(ValueError, match=r"tolerance: not an option of metric 'rmse' \(options: none\)"):
        METRICS["rmse"].with_options(tolerance=2)
    assert METRICS["edge_f"].with_options(tolerance=2).settings == {"tolerance": 2}
    for wrong in ({"tolerance": -1}, {"thresholds": 0}, {"logits": "no"}):
        # As the recipe is read, and not once the first row is measured.
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected "):
            METRICS["edge_f"].with_options(**wrong)


# Summary


def test_normalised_by_hand():
    assert normalised(0.4, 0.5, False) == pytest.approx(80)
    assert normalised(0.5, 0.4, True) == pytest.approx(80)
    # Against a score of 0, or one below 0, as a correlation may have, nothing is a percentage.
    for value, reference in ((0.4, 0.0), (-0.1, -0.2), (0.3, -0.2)):
        assert math.isnan(normalised(value, reference, False))
    for value, reference in ((0.4, 0.0), (0.0, 0.4), (0.0, 0.0)):
        assert math.isnan(normalised(value, reference, True))
    assert normalised(-0.1, 0.5, False) == pytest.approx(-20)
    assert average({"a": 80.0, "b": 120.0}) == 100
    assert (_spread([79.0, 80.0, 81.0], 2), _spread([3.0], 2)) == ("80.00 ± 1.00", "3.00")


def test_the_union_of_tasks_by_hand():
    union = Union.of({"a": 2, "b": 3}, None)
    assert (union.size, union.columns) == (5, {"a": [0, 1], "b": [2, 3, 4]})
    named = Union.of({"a": 2, "b": 3}, {"a": ["cat", "dog"], "b": ["owl", "cat", "elk"]})
    assert (named.size, named.columns) == (4, {"a": [0, 1], "b": [2, 0, 3]})
    outputs = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[0.0, 3.0, -1.0]])}
    assert named.scores(outputs).tolist() == [[3.0, 2.0, 0.0, -1.0]]
    shares = named.scores(outputs, "probabilities")
    assert shares[0, 0] == pytest.approx(outputs["b"].softmax(-1)[0, 1].item())
    assert named.labels("b", torch.tensor([2, 0])).tolist() == [3, 2]
    found = hits(torch.tensor([[3.0, 2.0, 0.0, -1.0], [3.0, 2.0, 0.0, -1.0]]), torch.tensor([1, 3]))
    assert found == {1: 0.0, 3: 0.5, 5: 1.0}
    # Equal scores rank by index, so that a constant model is no better than it is.
    assert hits(torch.zeros(4, 4), torch.arange(4)) == {1: 0.25, 3: 0.75, 5: 1.0}
    # A score that is no number is never among the highest.
    assert hits(torch.full((2, 4), math.nan), torch.tensor([0, 3])) == {1: 0.0, 3: 0.0, 5: 0.0}
    with pytest.raises(ValueError, match="classes.a: expected 2 names, found 1"):
        Union.of({"a": 2}, {"a": ["cat"]})
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 3"):
        hits(torch.zeros(1, 4), torch.tensor([4]))


# Heads


def test_linear_heads_pool_as_they_say():
    model, inputs = build("llama"), KINDS["llama"].inputs(0)
    with torch.no_grad():
        features = model.model(**inputs).last_hidden_state
    weight, bias = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    expected = {
        "first": features[:, 0],
        "last": torch.stack([features[0, -1], features[1, 4], features[2, -1]]),
        "mean": torch.stack([features[0].mean(0), features[1, :5].mean(0), features[2].mean(0)]),
        "tokens": features,
    }
    for pool, pooled in expected.items():
        with torch.no_grad():
            output = heads.LinearHead(weight, bias, pool)(model, inputs)
        torch.testing.assert_close(output, pooled @ weight.t() + 1)
    # Where nothing says which tokens are padding, none is.
    everywhere = {"input_ids": inputs["input_ids"]}
    for pool in ("last", "mean"):
        with torch.no_grad():
            features = model.model(**everywhere).last_hidden_state
            output = heads.LinearHead(weight, bias, pool)(model, everywhere)
        pooled = features[:, -1] if pool == "last" else features.mean(1)
        torch.testing.assert_close(output, pooled @ weight.t() + 1)
    # On which side padding is makes no difference.
    front = {name: torch.stack([value[0], value[1].roll(2), value[2]]) for name, value in inputs.items()}
    assert front["attention_mask"][1].tolist() == [0, 0, 1, 1, 1, 1, 1]
    for pool in ("first", "last", "mean"):
        with torch.no_grad():
            output = heads.LinearHead(weight, bias, pool)(model, front)
        torch.testing.assert_close(output, expected[pool] @ weight.t() + 1)
    # A head is read in float32, whatever the model is in.
    half = model.bfloat16()
    with torch.no_grad():
        features = half.model(**inputs).last_hidden_state
        output = heads.LinearHead(weight, bias, "first")(half, inputs)
    torch.testing.assert_close(output, features[:, 0] @ weight.bfloat16().t() + 1)
    with pytest.raises(ValueError, match="expected a model of images"):
        heads.LinearHead(weight, bias, "patches")(model, inputs)
    with pytest.raises(ValueError, match=r"expected weight \[C, 32\].*found \[3, 8\]"):
        heads.LinearHead(weight[:, :8], bias, "first")(model, inputs)


@pytest.mark.parametrize("kind", [tf.Wav2Vec2ForSequenceClassification, tf.WavLMForSequenceClassification])
def test_sound_is_pooled_as_transformers_pools_it(kind):
    """Their mask is of samples, and a classifier of theirs takes the mean over what these make."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4, "initializer_range": 0.2}
    model = kind(kind.config_class(**sizes, feat_extract_norm="layer", num_labels=3)).eval()
    mask = (torch.arange(800) < torch.tensor([[800], [500], [300]])).long()
    inputs = {"input_values": torch.randn(3, 800) * mask, "attention_mask": mask}
    with torch.no_grad():
        weight = model.classifier.weight @ model.projector.weight
        bias = model.classifier.weight @ model.projector.bias + model.classifier.bias
        output = heads.LinearHead(weight, bias, "mean")(model, inputs)
        torch.testing.assert_close(output, model(**inputs).logits)
        # Of a sound by itself, without padding, the last position is the last one that its mask keeps.
        alone = model.base_model(input_values=inputs["input_values"][2:, :300]).last_hidden_state[:, -1]
        last = heads.LinearHead(weight, bias, "last")(model, inputs)[2:]
    torch.testing.assert_close(last, alone @ weight.t() + bias, rtol=1e-3, atol=1e-4)


def test_images_are_laid_out_patch_by_patch():
    model, inputs = build("vit"), KINDS["vit"].inputs(0)
    with torch.no_grad():
        patches = model.vit(**inputs).last_hidden_state[:, 1:]
        weight = torch.randn(2 * 16, 32, generator=torch.Generator().manual_seed(0))
        image = heads.LinearHead(weight, None, "image")(model, inputs)
        pooled = heads.LinearHead(weight, None, "patches")(model, inputs)
    assert image.shape == (3, 8, 8, 2)
    # Patch (1, 0), channel 1, pixel (2, 3) of it.
    expected = patches[0, 2] @ weight[16 + 2 * 4 + 3]
    torch.testing.assert_close(image[0, 4 + 2, 3, 1], expected)
    torch.testing.assert_close(pooled, patches.mean(1) @ weight.t())


def test_a_brought_classifier_may_have_other_classes_and_is_taken_out_again():
    model, inputs = build("llama-cls"), KINDS["llama-cls"].inputs(0)
    before = model(**inputs).logits
    head = heads.head_of({"score.weight": torch.zeros(5, 32)}, model, None, "head")
    assert head(model, inputs).tolist() == [[0.0] * 5] * 3
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="head: expected a pool for a linear layer"):
        heads.head_of({"weight": torch.zeros(5, 32)}, model, None, "head")
    with pytest.raises(ValueError, match="to which no pool applies"):
        heads.head_of({"score.weight": torch.zeros(5, 32)}, model, "first", "head")
    with pytest.raises(ValueError, match="expected parameters of LlamaForSequenceClassification, or weight"):
        heads.head_of({"a": torch.zeros(1)}, model, None, "head")
    with pytest.raises(ValueError, match=r"head: LlamaForCausalLM has no score.weight, .* expected a model of"):
        head(build("llama"), inputs)


class Coded(nn.Linear):
    """In whole numbers, as bitsandbytes keeps a linear."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((64 * linear.weight.detach()).round().to(torch.int8), requires_grad=False)

    def forward(self, z):
        return nn.functional.linear(z, self.weight.float() / 64)


@pytest.mark.parametrize("kept", ["in memory", "on disk", "in codes"])
def test_a_brought_classifier_counts_wherever_the_bases_is_kept(kept, tmp_path):
    """What is fetched as the model runs would take its place, and codes would be made of it."""
    model, inputs = build("llama-cls"), KINDS["llama-cls"].inputs(0)
    features = model.model(**inputs).last_hidden_state
    if kept == "in memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif kept == "on disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        model.score = Coded(model.score)
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(**inputs).logits
        head = heads.head_of({"score.weight": weight}, model, None, "head")
        last = features[torch.arange(3), inputs["attention_mask"].sum(1) - 1]
        torch.testing.assert_close(head(model, inputs), last @ weight.t())
        assert torch.equal(model(**inputs).logits, before)


def test_generation_stops_at_the_end_and_wants_padding_in_front():
    model = build("llama")
    inputs = {name: value.flip(1) for name, value in KINDS["llama"].inputs(0).items()}
    model.generation_config.eos_token_id = None
    free = heads.GeneratingHead(4)(model, inputs)
    assert free.shape == (3, 4)
    torch.testing.assert_close(free[0, 0], model(**inputs).logits[0, -1].argmax())
    end = int(free[0, 1])
    model.generation_config.eos_token_id = end
    stopped = heads.GeneratingHead(4)(model, inputs)
    written = free[0].tolist()[: free[0].tolist().index(end) + 1]
    assert stopped[0].tolist() == [*written, *[metrics.IGNORE] * (4 - len(written))]
    with pytest.raises(ValueError, match="expected prompts padded in front"):
        heads.GeneratingHead(4)(model, KINDS["llama"].inputs(0))

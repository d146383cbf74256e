"""AdaMerging and Fisher merging of models that predict every token: what counts, and the least information."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

import nsc_merge
from nsc_merge import Factor
from nsc_merge.calibration.forward_passes import Part, Pass
from nsc_merge.evaluation.heads import LinearHead, ModelHead
from nsc_merge.methods import METHODS, Problem
from nsc_merge.methods.closed_form import fisher
from nsc_merge.methods.gradient import adamerging
from nsc_merge.methods.likelihoods import LIKELIHOODS
from nsc_merge.methods.task_outputs import real_positions, share_of
from nsc_merge.methods.task_vectors.elementwise import dense_update
from nsc_merge.models.fitting import fit

TASKS = ("1", "2")
# Of which nothing is asked but how it reads sound.
MODEL = torch.nn.Module()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def adapters_at(path):
    """Of a square linear as wide as SIZES says."""
    return {
        task: nsc_merge.Adapter(task, {path: Factor(torch.randn(2, 32), torch.randn(32, 2), 1.0)}) for task in TASKS
    }


@pytest.fixture
def llama():
    return zoo.build("llama")


@pytest.fixture
def problem(llama, tmp_path):
    adapters = {
        task: nsc_merge.load_adapter(
            zoo.write_adapter(
                llama, tmp_path / task, int(task), r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
            task,
        )
        for task in TASKS
    }
    return Problem(llama, fit(adapters, llama), {task: [zoo.text(int(task))] for task in TASKS})


def other_padding(batch):
    """The batch with other tokens at padding, which a causal model's real tokens do not see."""
    return {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(40))}


def padded_otherwise(problem):
    calibration = {task: [other_padding(batch) for batch in held] for task, held in problem.calibration.items()}
    return Problem(problem.model, problem.adapters, calibration)


def losses(problem, **options):
    result = METHODS["adamerging"].run(problem, {"steps": 1, "progress": False, **options})
    return result.history[0]["loss"]


def logits(problem, batch, lam=0.4):
    """Of the model with every update added at ``lam``."""
    weights = dict(problem.model.named_parameters())
    for adapter in problem.adapters.values():
        for path, factor in adapter.factors.items():
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + lam * factor.delta().float()
    with torch.no_grad():
        return functional_call(problem.model, weights, (), dict(batch)).logits


def test_a_mask_fits_every_position_or_every_next_token():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.equal(real_positions(MODEL, torch.zeros(2, 4, 5), mask), mask.bool())
    next_tokens = [[True, True, False], [False, True, True]]
    assert real_positions(MODEL, torch.zeros(2, 3, 5), mask).tolist() == next_tokens
    for shape in ((2, 2, 5), (1, 4, 5), (2, 4), (2, 4, 4, 5)):
        assert real_positions(MODEL, torch.zeros(shape), mask) is None
    assert real_positions(MODEL, torch.zeros(2, 4, 5), None) is None


def test_the_share_of_a_part_is_that_of_its_real_positions():
    """Of three rows with 3, 2 and 4 real tokens, this process has the first two."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    whole = {"mask": mask}
    part = Pass({"mask": mask[:2]}, (whole,), ((0,),), part=Part(whole, slice(0, 2), 3))
    for positions, share in ((4, 5 / 9), (3, 3 / 6)):
        real = real_positions(MODEL, torch.zeros(2, positions, 7), mask[:2])
        assert share_of(MODEL, part, real, "mask") == pytest.approx(share)


def test_single_is_the_default_also_without_a_mask(problem):
    for batches in problem.calibration.values():
        del batches[0]["attention_mask"]
    found = losses(problem)
    assert found == losses(problem, tokens="single")
    for task, (batch,) in problem.calibration.items():
        expected = adamerging.entropy(logits(problem, batch)[:, -1]).mean()
        assert found[task] == pytest.approx(expected.item(), rel=1e-4)


def test_the_default_with_outputs_is_class(problem):
    outputs = dict.fromkeys(TASKS, ModelHead())
    assert losses(problem, outputs=outputs) == losses(problem, outputs=outputs, tokens="class")
    assert losses(problem, outputs=outputs) != losses(problem)


def test_entropy_of_next_tokens_leaves_out_padding(problem):
    outputs = dict.fromkeys(TASKS, ModelHead(shifted=True))
    for tokens in ("class", "single"):
        found = losses(problem, outputs=outputs, tokens=tokens)
        assert losses(padded_otherwise(problem), outputs=outputs, tokens=tokens) == pytest.approx(found, rel=1e-5)
        for task, (batch,) in problem.calibration.items():
            values = adamerging.entropy(logits(problem, batch)[:, :-1])
            real = batch["attention_mask"][:, 1:].bool()
            expected = values[real] if tokens == "class" else values[torch.arange(3), real.sum(1) - 1]
            assert found[task] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_single_refuses_positions_that_the_mask_does_not_speak_of(problem):
    outputs = dict.fromkeys(TASKS, lambda model, batch: model(**batch).logits[:, 3:])
    with pytest.raises(ValueError, match=r"logits \[N, T, C\] that fit the mask \[3, 7\], found \[3, 4, 64\]"):
        losses(problem, outputs=outputs, tokens="single")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("head", [ModelHead(), ModelHead(shifted=True), LinearHead(torch.eye(32)[:5], None, "tokens")])
def test_fisher_information_leaves_out_padding(problem, head, likelihood):
    options = fisher.FisherOptions(outputs={"1": head}, likelihood=likelihood)
    path = "model.layers.0.self_attn.v_proj"
    (batch,) = problem.calibration["1"]
    first, second = (
        fisher.information(problem, "1", [path], [one], options)[path] for one in (batch, other_padding(batch))
    )
    assert first.any()
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6 * float(first.max()))


@pytest.mark.parametrize("normalise", [True, False])
def test_information_is_floored_before_it_is_normalised(problem, monkeypatch, normalise):
    """As in the authors' code, with the norm of what was not floored; a task without information has the floor.
    MergeLM's adds it, to the norm too.
    """
    generator = torch.Generator().manual_seed(0)
    paths = list(problem.adapters["1"].factors)
    shapes = {path: problem.model.get_submodule(path).weight.shape for path in paths}
    held = {
        "1": {path: 1e-5 * torch.rand(shape, generator=generator) for path, shape in shapes.items()},
        "2": {path: torch.zeros(shape) for path, shape in shapes.items()},
    }
    monkeypatch.setattr(fisher, "information", lambda problem, task, *others: dict(held[task]))

    def average(weights, path):
        above = sum(weight * dense_update(problem.adapters[task].factors[path]) for task, weight in weights.items())
        return above / sum(weights.values())

    result = METHODS["fisher"].run(problem, {"normalise": normalise, "floor": 4e-6, "batches": 1})
    norm = torch.cat([value.flatten() for value in held["1"].values()]).norm() if normalise else 1.0
    for path in paths:
        weights = {"1": held["1"][path].clamp(min=4e-6) / norm, "2": torch.full(shapes[path], 4e-6)}
        torch.testing.assert_close(result.delta(path).float(), average(weights, path), rtol=1e-5, atol=1e-7)
    result = METHODS["fisher"].run(problem, {"preset": "mergelm", "normalise": normalise, "floor": 4e-6, "batches": 1})
    for path in paths:
        size = {task: float(norm) + 4e-6 if normalise else 1.0 for task, norm in (("1", norm), ("2", 0.0))}
        weights = {task: (held[task][path] + 4e-6) / size[task] for task in held}
        torch.testing.assert_close(result.delta(path).float(), average(weights, path), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("outputs", [5, False, [torch.relu], torch.relu])
@pytest.mark.parametrize("method", ["distill", "adamerging", "fisher"])
def test_outputs_are_a_mapping(method, outputs):
    """Said before anything is loaded."""
    with pytest.raises(TypeError, match="outputs: expected a mapping of tasks to functions of model and batch, found"):
        METHODS[method].resolved({"outputs": outputs}, ["a"])


def segformer():
    """Three classes of pixels, in images wider than high."""
    sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 16}
    stages = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **stages, mlp_ratios=[2, 2], num_labels=3)).eval()


def test_classes_of_pixels_are_the_second_dimension_of_logits():
    model = segformer()
    (path,) = (name for name, _ in model.named_modules() if name.endswith("stages.0.blocks.0.attention.v_proj"))
    generator = torch.Generator().manual_seed(1)
    adapters = {
        task: nsc_merge.Adapter(
            task,
            {path: Factor(torch.randn(2, 16, generator=generator), 9 * torch.randn(16, 2, generator=generator), 1.0)},
        )
        for task in TASKS
    }
    batches = {task: [{"pixel_values": torch.randn(2, 3, 16, 24, generator=generator)}] for task in TASKS}

    def predicted(scales, batch):
        deltas = [scale * adapters[task].factors[path].delta().float() for task, scale in scales.items()]
        weights = {f"{path}.weight": model.get_parameter(f"{path}.weight") + sum(deltas)}
        return functional_call(model, weights, (), batch).logits.softmax(1)

    options = {"steps": 1, "progress": False}
    entropy = nsc_merge.merge(model, adapters, batches, "adamerging", **options).history[0]["loss"]
    distance = nsc_merge.merge(model, adapters, batches, "distill", **options).history[0]["loss"]
    for task in TASKS:
        merged = predicted(dict.fromkeys(TASKS, 0.4), batches[task][0])
        own = predicted({task: 1.0}, batches[task][0])
        assert entropy[task] == pytest.approx(float(-(merged * merged.log()).sum(1).mean()), rel=1e-5)
        assert distance[task] == pytest.approx(float((merged - own).abs().sum(1).mean()) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "way_out"),
    [("distill", "likelihood: .* 'gaussian'"), ("adamerging", "outputs: .* functions for tasks with classes")],
)
def test_a_head_of_one_class_is_refused_where_classes_are_compared(method, way_out):
    """As of a regression: it was certain, so that nothing was learnt, without a word."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=96, num_labels=1)).eval()
    path = "bert.encoder.layer.0.attention.self.value"
    adapters = adapters_at(path)
    batches = {task: [{"input_ids": torch.randint(3, 96, (4, 6))}] for task in TASKS}
    options = {"steps": 1, "progress": False}
    with pytest.raises(ValueError, match=r"the output \[4, 1\] of '1' has one class") as refused:
        nsc_merge.merge(model, adapters, batches, method, **options)
    refused.match(way_out)
    if method == "distill":
        found = nsc_merge.merge(model, adapters, batches, method, likelihood="gaussian", **options)
        assert found.objective["before"] > 0


def test_a_decoder_that_labels_every_token_is_compared_at_each():
    torch.manual_seed(0)
    model = LlamaForTokenClassification(LlamaConfig(**SIZES, vocab_size=96, num_labels=5)).eval()
    path = "model.layers.0.self_attn.v_proj"
    adapters = adapters_at(path)
    ids, mask = torch.randint(3, 96, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}

    def predicted(scales):
        deltas = [scale * adapters[task].factors[path].delta().float() for task, scale in scales.items()]
        weights = {f"{path}.weight": model.get_parameter(f"{path}.weight").detach() + sum(deltas)}
        return functional_call(model, weights, (), batch).logits.detach().softmax(-1)[mask.bool()]

    merged = predicted(dict.fromkeys(TASKS, 0.4))
    options = {"steps": 1, "progress": False}
    batches = {task: [batch] for task in TASKS}
    distance = nsc_merge.merge(model, adapters, batches, "distill", **options).history[0]["loss"]
    entropy = nsc_merge.merge(model, adapters, batches, "adamerging", **options).history[0]["loss"]
    for task in TASKS:
        apart = (merged - predicted({task: 1.0})).abs().sum(-1)
        assert distance[task] == pytest.approx(float(apart.mean()) / 2, rel=1e-4)
        assert entropy[task] == pytest.approx(float(-(merged * merged.log()).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("method", ["distill", "adamerging", "fisher"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda model, batch: model(**batch), r"found CausalLMOutput.*; return its logits"),
        (lambda model, batch: model(**batch).logits.argmax(-1), r"found torch.int64 of shape \[3, 7\]"),
        (lambda model, batch: model(**batch).logits.mean(), r"found torch.float32 of shape \[\]"),
        (lambda model, batch: (model(**batch).logits,), "found tuple$"),
    ],
)
def test_outputs_that_are_no_tensor_of_numbers_are_refused(problem, method, output, message):
    quiet = {} if method == "fisher" else {"progress": False}
    with pytest.raises(TypeError, match=r"outputs\['1'\]: expected a tensor of numbers \[N, \.\.\.\], " + message):
        METHODS[method].run(problem, {"outputs": dict.fromkeys(TASKS, output), **quiet})

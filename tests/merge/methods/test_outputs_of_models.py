"""Methods that look at outputs, of models that give other ones than ``logits``, or heads with statistics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import zoo
from own_cases import QUIET
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    EsmConfig,
    EsmForMaskedLM,
    PatchTSTConfig,
    PatchTSTForClassification,
    PatchTSTForPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

import nsc_merge
from nsc_merge.methods import METHODS, Problem
from nsc_merge.methods.task_outputs import output_in
from nsc_merge.models.fitting import fit

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SERIES = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16, "num_attention_heads": 2,
          "ffn_dim": 24, "num_hidden_layers": 2, "num_input_channels": 3}
METHODS_OF_OUTPUTS = {"distill": {"steps": 3}, "adamerging": {"steps": 3}, "fisher": {}}
TASKS = ("a", "b")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def reader():
    return BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=32))


def forecaster():
    return PatchTSTForPrediction(PatchTSTConfig(**SERIES, prediction_length=4))


def sorter():
    return PatchTSTForClassification(PatchTSTConfig(**SERIES, num_targets=3))


def segmenter():
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2]}
    more = {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **more, num_labels=5))


def problem_of(build, head, batch, tmp_path):
    """Two adapters with heads of their own, whose buffers are not the base's either."""
    torch.manual_seed(0)
    model = build().eval()
    targets = ["query", "value", "q_proj", "v_proj"]
    folders = {
        task: zoo.write_adapter(model, tmp_path / task, 1 + number, target_modules=targets, modules_to_save=[head])
        for number, task in enumerate(TASKS)
    }
    adapters = fit({task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}, model)
    for adapter in adapters.values():
        for name, value in adapter.trained.items():
            adapter.trained[name] = value + 1 if "running_var" in name else value
    return Problem(model, adapters, {task: [batch] for task in TASKS})


def deltas(problem, method, **options):
    result = METHODS[method].run(problem, {**({} if method == "fisher" else QUIET), **options})
    return torch.cat([result.delta(path).flatten() for path in result.paths])


def functions(problem, of):
    """A function for each task that says the same of its output."""
    heads = {task: adapter.trained for task, adapter in problem.adapters.items()}

    def function(task):
        return lambda model, batch: of(functional_call(model, heads[task], (), dict(batch)), batch)

    return {task: function(task) for task in problem.tasks}


def ends(output, batch):
    """Of where the answer starts and where it ends, two rows each."""
    both = torch.stack([output.start_logits, output.end_logits], 1)
    return both.where(batch["attention_mask"][:, None].bool(), torch.tensor(-1e9))


def questions(length):
    ids = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": F.pad(ids * mask, (0, length - 9)), "attention_mask": F.pad(mask, (0, length - 9))}


@pytest.mark.parametrize("method", METHODS_OF_OUTPUTS)
def test_answers_in_a_text_are_judged_by_where_they_start_and_end(method, tmp_path):
    problem = problem_of(reader, "qa_outputs", questions(9), tmp_path)
    options = METHODS_OF_OUTPUTS[method]
    found = deltas(problem, method, **options)
    expected = deltas(problem, method, **options, outputs=functions(problem, ends))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if method != "fisher":
        # Fisher draws a position, of which there are others.
        longer = Problem(problem.model, problem.adapters, {task: [questions(14)] for task in TASKS})
        torch.testing.assert_close(deltas(longer, method, **options), found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["distill", "fisher"])
def test_forecasts_are_values(method, tmp_path):
    problem = problem_of(forecaster, "head", {"past_values": random(4, 16, 3)}, tmp_path)
    options = {**METHODS_OF_OUTPUTS[method], "likelihood": "gaussian"}
    own = functions(problem, lambda output, _: output.prediction_outputs)
    expected = deltas(problem, method, **options, outputs=own)
    torch.testing.assert_close(deltas(problem, method, **options), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no logits; likelihood 'gaussian' takes its prediction_outputs"):
        deltas(problem, method, **METHODS_OF_OUTPUTS[method])


def test_forecasts_have_no_entropy(tmp_path):
    problem = problem_of(forecaster, "head", {"past_values": random(4, 16, 3)}, tmp_path)
    with pytest.raises(ValueError, match="PatchTSTForPrediction has no logits; expected a function"):
        deltas(problem, "adamerging", steps=1)


@pytest.mark.parametrize("method", METHODS_OF_OUTPUTS)
@pytest.mark.parametrize(
    ("build", "head", "batch", "of"),
    [
        (sorter, "head", {"past_values": random(4, 16, 3)}, lambda output, _: output.prediction_logits),
        # With a BatchNorm, which counts its batches in whole numbers.
        (
            segmenter,
            "decode_head",
            {"pixel_values": random(2, 3, 16, 16)},
            lambda output, _: output.logits.movedim(1, -1),
        ),
    ],
)
def test_classes_by_another_name_and_heads_with_statistics(method, build, head, batch, of, tmp_path):
    problem = problem_of(build, head, batch, tmp_path)
    options = METHODS_OF_OUTPUTS[method]
    expected = deltas(problem, method, **options, outputs=functions(problem, of))
    torch.testing.assert_close(deltas(problem, method, **options), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [{"method": "regmean"}, {"method": "distill", "steps": 2, "regmean": True, **QUIET}])
def test_a_module_that_never_runs_and_was_never_trained_needs_no_inputs(method, tmp_path):
    """ESM's head of contacts is no part of a forward, and ``all-linear`` adapts it."""
    torch.manual_seed(0)
    config = EsmConfig(**SIZES, vocab_size=33, mask_token_id=32, pad_token_id=1, max_position_embeddings=32)
    model = EsmForMaskedLM(config).eval()
    texts = {"input_ids": torch.randint(4, 30, (4, 9), generator=torch.Generator().manual_seed(1))}
    calibration = {task: [texts] for task in TASKS}
    given = {task: zoo.write_adapter(model, tmp_path / task, 1, target_modules="all-linear") for task in TASKS}
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in given.items()}
    silent = "esm.contact_head.regression"
    with pytest.raises(RuntimeError, match=f"never reached.*{silent}"):
        nsc_merge.merge(model, adapters, calibration, **method)
    untrained = {
        task: adapter.with_factors(
            lambda path, factor: type(factor)(factor.A, 0 * factor.B, 1.0) if path == silent else factor
        )
        for task, adapter in adapters.items()
    }
    result = nsc_merge.merge(model, untrained, calibration, **method)
    assert silent in result.paths
    assert not result.delta(silent).any()
    assert all(result.delta(path).any() for path in result.paths if path != silent)


@pytest.mark.parametrize(("name", "shape"), [("pixel_values", (2, 3, 4, 5)), ("input_ids", (2, 5, 3, 4))])
def test_four_dimensions_are_of_pixels_where_there_are_any(name, shape):
    """Elsewhere the last one is of classes already, as in GLiNER's logits of spans."""
    logits = torch.randn(2, 5, 3, 4)
    found = output_in(SimpleNamespace(logits=logits), torch.nn.Module(), {name: torch.ones(2, 1)}, values=False)
    assert found is not None
    assert found.shape == shape

"""AdaMerging against explicit computations on dense weights."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, write_adapter
from data_cases import Dense, dense_weights, llama, problem_of
from torch.func import functional_call
from transformers import BertConfig, BertForTokenClassification

import nsc_merge
from nsc_merge.methods import METHODS
from nsc_merge.methods.gradient.learned_coefficients import presence


def test_adamerging_objective_and_gradient(model, folders, calibration, outputs):
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(
        model,
        folders,
        calibration,
        "adamerging",
        outputs=outputs,
        steps=1,
        optimizer="adam",
        weight_decay=0.0,
        lr=1e-3,
        init=0.4,
        progress=False,
    )
    lam = (0.4 * presence(problem)).requires_grad_()
    dense = Dense(model, dense_weights(problem, lam))
    losses = {}
    for task in folders:
        p = outputs[task](dense, calibration[task][0]).softmax(-1)
        losses[task] = -(p * p.log()).sum(-1).mean()
    (grad,) = torch.autograd.grad(sum(losses.values()) / 3, lam)
    for task, loss in losses.items():
        assert result.history[0]["loss"][task] == pytest.approx(loss.item(), rel=1e-5)
    moved = torch.tensor([list(row.values()) for row in result.coefficients.values()]) - 0.4 * presence(problem)
    # Adam's first step is -lr times the sign of the gradient.
    live = presence(problem) & (grad.abs() > 1e-6)
    torch.testing.assert_close(moved[live], (-1e-3 * grad.sign())[live], rtol=1e-2, atol=1e-6)
    assert live.sum() > 20


def test_adamerging_task_share_moves_by_the_summed_gradient(model, folders, calibration, outputs):
    result = nsc_merge.merge(
        model, folders, calibration, "adamerging", outputs=outputs, steps=3, share="task", progress=False
    )
    for task in folders:
        values = {row[task] for path, row in result.coefficients.items() if path in result.adapters[task].factors}
        assert max(values) - min(values) < 1e-6
        assert abs(max(values) - 0.4) > 1e-4


def test_single_token_entropy_is_at_the_last_real_token(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, tokens="single", progress=False)
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        batch = calibration[task][0]
        values = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            logits = functional_call(model, weights, (), {"input_ids": ids[mask.bool()][None]}).logits[0, -1]
            p = logits.softmax(-1)
            values.append(-(p * p.log()).sum())
        assert result.history[0]["loss"][task] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_full_is_the_entropy_along_greedy_decoding(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(
        model, folders, calibration, "adamerging", steps=1, tokens="full", new_tokens=4, progress=False
    )
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        batch, total = calibration[task][0], 0.0
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            for _ in range(4):
                p = functional_call(model, weights, (), {"input_ids": ids[None]}).logits[0, -1].softmax(-1)
                total += -(p * p.log()).sum().item() / 3
                ids = torch.cat([ids, p.argmax()[None]])
                if ids[-1] == 2:
                    break
        assert result.history[0]["loss"][task] == pytest.approx(total, rel=1e-4)
    # AdamW's first step is of its rate whatever the gradient; without one the weight decay of 1e-5 alone is left.
    steps = [abs(value - 0.4 * (1 - 1e-5)) for row in result.coefficients.values() for value in row.values()]
    assert steps == pytest.approx([1e-3] * len(steps), rel=1e-2)


def test_full_decodes_from_prompts_of_unequal_lengths_of_whisper():
    """Its decoder takes positions under a name of its own."""
    whisper = ARCHITECTURES["Whisper"]
    model = whisper.build()
    path = "model.decoder.layers.0.self_attn.v_proj"
    adapters = {
        task: nsc_merge.Adapter(task, {path: nsc_merge.Factor(torch.randn(2, 32), torch.randn(32, 2), 1.0)})
        for task in ("a", "b")
    }
    sound, prompts = whisper.inputs()["input_features"], torch.randint(3, 80, (2, 5))

    def loss(features, ids, mask):
        batch = {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        batches = {task: [batch] for task in adapters}
        options = {"tokens": "full", "new_tokens": 3, "steps": 1, "progress": False}
        return nsc_merge.merge(model, adapters, batches, "adamerging", **options).history[0]["objective"]

    short = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    alone = [loss(sound[n : n + 1], prompts[n : n + 1, :size], short[n : n + 1, :size]) for n, size in ((0, 5), (1, 3))]
    assert loss(sound, prompts, short) == pytest.approx(sum(alone) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["Qwen2-VL", "T5"])
def test_full_decodes_with_positions_that_are_not_places_and_behind_an_encoder(name, tmp_path):
    """The entropy of every token is that of generation."""
    kind = ARCHITECTURES[name]
    model, batch = kind.build(), kind.inputs()
    model.generation_config.eos_token_id = None
    if name == "T5":
        model.generation_config.decoder_start_token_id = 7
        batch["decoder_input_ids"][:, 0] = 7
    adapters = {task: write_adapter(model, tmp_path / task, 1, target_modules=kind.targets) for task in ("a", "b")}
    options = {"tokens": "full", "new_tokens": 3, "steps": 1, "init": 0.0, "progress": False}
    found = nsc_merge.merge(model, adapters, {task: [batch] for task in adapters}, "adamerging", **options)
    given = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3, "do_sample": False}
    p = torch.stack(model.generate(**batch, **given).logits).softmax(-1)
    wanted = -(p * p.log()).sum(-1).mean(1).sum()
    assert found.history[0]["loss"]["a"] == pytest.approx(wanted.item(), rel=1e-4)


def test_adamerging_on_a_decoder_with_a_classification_head(tmp_path):
    model, folders, calibration = llama(tmp_path, "llama-cls")
    model.config.pad_token_id = 0
    problem = problem_of(model, folders, calibration)
    result = nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, progress=False)
    weights = dense_weights(problem, 0.4 * presence(problem))
    for task in folders:
        p = functional_call(model, weights, (), calibration[task][0]).logits.softmax(-1)
        assert result.history[0]["loss"][task] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)


def test_decoding_refuses_other_inputs_of_every_token(tmp_path):
    model, folders, calibration = llama(tmp_path)
    for batches in calibration.values():
        batches[0]["position_ids"] = torch.arange(7).expand(3, 7)
    with pytest.raises(ValueError, match="after input_ids and attention_mask alone, found 'position_ids'"):
        nsc_merge.merge(model, folders, calibration, "adamerging", steps=1, tokens="full", progress=False)


def test_class_entropy_leaves_out_padding(tmp_path):
    model, folders, calibration = llama(tmp_path)
    options = {"steps": 1, "tokens": "class", "progress": False}
    first = nsc_merge.merge(model, folders, calibration, "adamerging", **options)
    for batches in calibration.values():
        batches[0]["input_ids"][1, 5:] = 40
    second = nsc_merge.merge(model, folders, calibration, "adamerging", **options)
    assert second.history[0]["loss"] == pytest.approx(first.history[0]["loss"], rel=1e-5)


def test_padding_has_no_entropy_where_every_token_is_labelled():
    """In models that predict no next token, such as BERT."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**sizes, vocab_size=96)).eval()
    path = "bert.encoder.layer.0.attention.self.value"
    adapters = {
        task: nsc_merge.Adapter(task, {path: nsc_merge.Factor(torch.randn(2, 32), torch.randn(32, 2), 1.0)})
        for task in ("a", "b")
    }
    ids = torch.randint(3, 96, (2, 6))
    mask = torch.ones_like(ids)
    padded = {"input_ids": torch.cat([ids, 0 * ids], 1), "attention_mask": torch.cat([mask, 0 * mask], 1)}
    padded, plain = (
        nsc_merge.merge(model, adapters, {"a": [batch], "b": [batch]}, "adamerging", steps=1, progress=False)
        for batch in (padded, {"input_ids": ids, "attention_mask": mask})
    )
    assert padded.objective["before"] == pytest.approx(plain.objective["before"], rel=1e-6)


def test_tasks_without_logits_have_no_entropy(model, folders, calibration, outputs):
    some = {task: outputs[task] for task in ("plain", "mixed")}
    result = nsc_merge.merge(model, folders, calibration, "adamerging", outputs=some, steps=2, progress=False)
    entry = result.history[0]
    assert set(entry["loss"]) == set(some)
    assert entry["objective"] == pytest.approx(sum(entry["loss"].values()) / 2)


@pytest.mark.parametrize("clamp", [2, True, float("nan"), "", {}, (1.0,), (1.0, 0.0), (0.0, float("nan"))])
def test_bounds_that_are_none_are_refused_by_name(clamp):
    with pytest.raises(ValueError, match="clamp: expected a lower and a higher bound, found"):
        METHODS["adamerging"].resolved({"clamp": clamp}, ["a"])


@pytest.mark.parametrize("clamp", [(), []])
def test_empty_bounds_are_none(clamp):
    assert METHODS["adamerging"].resolved({"preset": "original"}, ["a"]).clamp == (0.0, 1.0)
    assert METHODS["adamerging"].resolved({"preset": "original", "clamp": clamp}, ["a"]).clamp is None


def test_answers_beyond_the_last_position_say_so(tmp_path):
    kind = ARCHITECTURES["GPT-2"]
    model, batch = kind.build(), kind.inputs()
    folders = {}
    for n, task in enumerate("ab"):
        folders[task] = write_adapter(model, tmp_path / task, n, r=2, target_modules=kind.targets)
    options = {"steps": 1, "tokens": "full", "new_tokens": model.config.n_positions, "progress": False}
    with pytest.raises(IndexError, match="calibration: in forwards of .*expected tokens that the model has, and no"):
        nsc_merge.merge(model, folders, {"a": [batch], "b": [batch]}, "adamerging", **options)

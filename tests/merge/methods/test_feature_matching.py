"""Feature matching against explicit computations, and at which positions it looks."""

from __future__ import annotations

import pytest
import torch
import transformers
from data_cases import alone, dense_weights, llama, problem_of
from loop_cases import Around
from torch.func import functional_call

import nsc_merge
from nsc_merge.calibration.forward_passes import one_by_one
from nsc_merge.methods.gradient import feature_matching
from nsc_merge.methods.gradient.learned_coefficients import attached, presence
from nsc_merge.methods.gradient.task_models import OwnModels


def test_match_objective_is_the_explicit_distance(tmp_path):
    model, folders, calibration = llama(tmp_path)
    problem = problem_of(model, folders, calibration)
    for normalise in feature_matching.NORMALISATIONS:
        result = nsc_merge.merge(
            model, folders, calibration, "match", steps=1, normalise=normalise, positions="all", progress=False
        )
        weights = dense_weights(problem, 0.4 * presence(problem))

        def hidden(weights, batch):
            trunk = {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
            with torch.no_grad():
                found = functional_call(model.base_model, trunk, (), batch).last_hidden_state
            return found[batch["attention_mask"].bool()]

        for task in folders:
            batch = calibration[task][0]
            ours, own = hidden(weights, batch), hidden(alone(problem, task), batch)
            expected = (ours - own).square().mean()
            if normalise == "scale":
                expected = expected / own.square().mean()
            if normalise == "task":
                expected = expected / (own - hidden(dict(model.named_parameters()), batch)).square().mean()
            assert result.history[0]["loss"][task] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("head", "positions"),
    [
        ("ForTokenClassification", "all"),
        ("ForQuestionAnswering", "all"),
        ("ForSequenceClassification", "last"),
        ("ForCausalLM", "last"),
    ],
)
def test_decoders_are_matched_where_their_heads_look(tmp_path, head, positions):
    base, _, calibration = llama(tmp_path)
    torch.manual_seed(0)
    model = getattr(transformers, f"Llama{head}")(base.config).eval()
    path = next(path for path, _ in model.named_modules() if path.endswith("layers.0.self_attn.v_proj"))
    factors = {task: nsc_merge.Factor(torch.randn(2, 32), torch.randn(16, 2), 1.0) for task in calibration}
    adapters = {task: nsc_merge.Adapter(task, {path: factor}) for task, factor in factors.items()}

    def loss(**options):
        result = nsc_merge.merge(model, adapters, calibration, "match", steps=1, progress=False, **options)
        return result.history[0]["loss"]

    assert loss(positions="all") != loss(positions="last")
    assert loss() == loss(positions=positions)


def one_module(model, ending, width):
    path = next(path for path, _ in model.named_modules() if path.endswith(ending))
    factors = [nsc_merge.Factor(torch.randn(2, 32), torch.randn(width, 2), 1.0) for _ in range(2)]
    return {str(number): nsc_merge.Adapter(str(number), {path: one}) for number, one in enumerate(factors, 1)}


def test_the_final_features_of_a_model_without_a_trunk_are_what_its_head_reads():
    """T5's, whose output is logits alone; the head reads the last norm's output by d_model ** -0.5."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    adapters = one_module(model, "decoder.block.0.layer.0.SelfAttention.v", 32)
    ids = torch.randint(2, 64, (2, 5))
    batch = {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}

    def loss(**options):
        data = {task: [batch] for task in adapters}
        result = nsc_merge.merge(model, adapters, data, "match", positions="all", steps=1, progress=False, **options)
        return result.history[0]["loss"]

    norm = loss(features=["decoder.final_layer_norm"])
    assert loss() == pytest.approx({task: value / 32 for task, value in norm.items()}, rel=1e-4)


def test_a_trunk_whose_decoder_takes_other_inputs_is_run_by_its_model():
    """SpeechT5's takes frames of sound or embeddings, where the model around it takes tokens."""
    torch.manual_seed(0)
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder")
             for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}
    sound = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4}
    sizes = {"hidden_size": 32, "vocab_size": 40, "num_conv_pos_embedding_groups": 2, **sides, **sound}
    model = transformers.SpeechT5ForSpeechToText(transformers.SpeechT5Config(**sizes, apply_spec_augment=False)).eval()
    adapters = one_module(model, "encoder.wrapped_encoder.layers.0.attention.v_proj", 32)
    batch = {"input_values": torch.randn(2, 64), "decoder_input_ids": torch.randint(2, 40, (2, 5))}

    def loss(**options):
        data = {task: [batch] for task in adapters}
        result = nsc_merge.merge(model, adapters, data, "match", positions="all", steps=1, progress=False, **options)
        return result.history[0]["loss"]

    assert loss() == pytest.approx(loss(features=["speecht5.decoder.wrapped_decoder"]), rel=1e-5)


def test_a_model_around_another_is_matched_before_its_head_or_at_modules_that_are_named(tmp_path):
    base, _, calibration = llama(tmp_path)
    model = Around(base)
    adapters = one_module(model, "layers.0.self_attn.v_proj", 16)
    settings = {"steps": 1, "progress": False}
    final = nsc_merge.merge(model, adapters, calibration, "match", positions="all", **settings)
    around = nsc_merge.merge(model, adapters, calibration, "match", features=["inside.model.norm"], **settings)
    assert final.history[0]["loss"] == around.history[0]["loss"]
    inside = {
        task: nsc_merge.Adapter(task, {path.removeprefix("inside."): one for path, one in adapter.factors.items()})
        for task, adapter in adapters.items()
    }
    alone = nsc_merge.merge(base, inside, calibration, "match", positions="all", **settings)
    assert around.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-5)


def test_what_gives_logits_and_has_no_head_of_tokens_is_matched_at_modules_that_are_named(tmp_path):
    base, _, calibration = llama(tmp_path)
    base.get_output_embeddings = lambda: None
    model = Around(base)
    adapters = one_module(model, "layers.0.self_attn.v_proj", 16)
    with pytest.raises(ValueError, match="features: 'final' is the last hidden state, and Around gives logits alone"):
        nsc_merge.merge(model, adapters, calibration, "match", steps=1, progress=False)


def test_match_gradient_by_finite_differences(model, folders, calibration):
    problem = problem_of(model, folders, calibration)
    options = feature_matching.MatchOptions(steps=1)
    watcher = feature_matching.Watcher(problem, options.features, options.positions)
    present = presence(problem)
    with attached(problem, options) as coefficients:
        targets = feature_matching.Targets(watcher, OwnModels(problem, coefficients, present), "task")
        drawn = [calibration[task][0] for task in folders]

        def value():
            total = 0
            for one in one_by_one(drawn, torch.device("cpu")):
                wanted = targets.of(one)
                coefficients.spread()
                found = watcher.see(one).features
                total = total + sum(targets.distance(wanted[number], one, found) for number in one.tasks[0])
            return total

        (grad,) = torch.autograd.grad(value(), coefficients.flat)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            direction = torch.randn(grad.shape, generator=generator) * present
            with torch.no_grad():
                coefficients.flat += 1e-2 * direction
                up = value()
                coefficients.flat -= 2e-2 * direction
                down = value()
                coefficients.flat += 1e-2 * direction
            assert (grad * direction).sum().item() == pytest.approx(((up - down) / 2e-2).item(), rel=2e-2, abs=1e-3)


def test_match_of_one_adapter_goes_to_one(model, folders, calibration):
    one = {"plain": folders["plain"]}, {"plain": calibration["plain"]}
    result = nsc_merge.merge(
        model, *one, "match", steps=120, lr=4e-2, weight_decay=0.0, schedule="cosine", progress=False
    )
    lam = torch.tensor([row["plain"] for path, row in result.coefficients.items() if path not in result.dead])
    assert result.history[-1]["objective"] < 1e-2 * result.history[0]["objective"]
    assert float((lam - 1).abs().mean()) < 0.15


def test_match_holds_out_its_first_batches_and_keeps_the_best(model, folders, calibration):
    """With a learning rate that only does harm, the start is what is kept."""
    result = nsc_merge.merge(
        model, folders, calibration, "match", steps=12, lr=5.0, hold_out=1, init=0.4, progress=False
    )
    values = [value for row in result.coefficients.values() for value in row.values()]
    assert all(value in (0.0, pytest.approx(0.4)) for value in values)
    assert len(result.history) == 12


def test_warm_up_shares_coefficients_and_then_lets_go(model, folders, calibration):
    def values(steps):
        result = nsc_merge.merge(
            model, folders, calibration, "match", steps=steps, warm_up=4, optimizer="adam", weight_decay=0.0,
            progress=False,
        )  # fmt: skip
        return [row["plain"] for path, row in result.coefficients.items() if path not in result.dead]

    assert max(values(4)) - min(values(4)) < 1e-6
    assert max(values(6)) - min(values(6)) > 1e-4


def test_match_initial_scale_of_one_adapter_is_one(model, folders, calibration):
    problem = problem_of(model, {"plain": folders["plain"]}, {"plain": calibration["plain"]})
    assert feature_matching.best_scale(problem, feature_matching.MatchOptions(init="match")) == 1.0


@pytest.mark.parametrize("options", [{"lr": "x"}, {"steps": 0}, {"share": "layer"}, {"clamp": (1, 0)}, {"steps": -1}])
def test_options_are_checked_also_with_a_matched_init(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        feature_matching.MatchOptions(init="match", **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("match", {"features": []}, "features: expected 'final' or paths of modules, found none"),
        ("match", {"features": ["layers.9"]}, r"features: expected .* modules of ViTModel, found 'layers\.9'"),
        ("match", {"features": ["unused"]}, r"features: the forward of ViTModel never reached .'unused'., expected"),
        ("adamerging", {"tokens": "full"}, "tokens: ViTModel has no tokens to predict; expected 'class', found 'full'"),
        ("adamerging", {"outputs": {}}, "outputs: expected a function for at least one task, found none"),
        ("adamerging", {"outputs": {"plain": 3}}, r"outputs\['plain'\]: expected a function .*, found 3"),
        ("distill", {}, "outputs: ViTModel has no logits; expected a function .* for 'plain', or method"),
    ],
)
def test_what_a_model_does_not_have_is_refused(model, folders, calibration, method, options, message):
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        nsc_merge.merge(model, folders, calibration, method, steps=1, progress=False, **options)


def test_match_needs_no_family_where_modules_are_named(model, folders, calibration):
    model.config.model_type = "unheard-of"
    nsc_merge.merge(model, folders, calibration, "match", steps=1, features=["layers.3"], progress=False)

"""Each task's own model, and what is held out: never mixed up with the merged one."""

from __future__ import annotations

import pytest
import torch
import zoo
from own_cases import merge, merged, problem_of
from torch import nn

import nsc_merge
from nsc_merge.calibration.batches import held_out, restartable, streams
from nsc_merge.calibration.forward_passes import Pass
from nsc_merge.methods import METHODS, Problem
from nsc_merge.methods.closed_form import regmean
from nsc_merge.methods.gradient import feature_matching, task_models
from nsc_merge.methods.gradient.learned_coefficients import attached, presence
from nsc_merge.methods.gradient.task_models import OwnModels
from nsc_merge.models.attachment import attach
from nsc_merge.models.fitting import fit
from nsc_merge.models.forward_contexts import evaluating, shared_forward


@pytest.mark.parametrize("options", [{}, {"positions": "last"}])
def test_match_at_the_last_real_token(tmp_path, options):
    problem = problem_of("llama", tmp_path)
    result = merge(problem, "match", steps=1, **options)

    def hidden(model, batch):
        with torch.no_grad():
            found = model.base_model(**batch).last_hidden_state
        return found[torch.arange(3), batch["attention_mask"].sum(1) - 1]

    both = merged(problem, {"a": 0.4, "b": 0.4})
    for task in ("a", "b"):
        batch = problem.calibration[task][0]
        own = merged(problem, {"a": float(task == "a"), "b": float(task == "b")})
        expected = (hidden(both, batch) - hidden(own, batch)).square().mean()
        assert result.history[0]["loss"][task] == pytest.approx(expected.item(), rel=1e-4)


def test_named_features_that_are_not_of_tokens_count_at_all_positions(tmp_path):
    problem = problem_of("llava", tmp_path, target_modules=r".*(language_model.*q_proj|projector.linear_1)")
    places = {"features": ["model.multi_modal_projector"], "steps": 1}
    plain = merge(problem, "match", **places)
    for positions in ("all", "last"):
        assert merge(problem, "match", positions=positions, **places).coefficients == plain.coefficients


def test_names_of_features_are_checked(tmp_path):
    with pytest.raises(ValueError, match="features: expected a list of names, found 5"):
        feature_matching.MatchOptions(features=5)
    problem = problem_of("vit", tmp_path)
    with pytest.raises(ValueError, match=r"calibration\['a'\]: expected dictionaries of model inputs, found list; c"):
        merge(Problem(problem.model, problem.adapters, {"a": [[1], [2]], "b": [[1], [2]]}), "match", hold_out=1)


@pytest.mark.parametrize("policy", ["lambda", "mean", "first"])
def test_a_task_alone_has_all_of_its_shared_modules(tmp_path, policy):
    """Whatever share of them the merge has."""
    problem = problem_of("llava", tmp_path, policy, modules_to_save=["multi_modal_projector"])
    whole = problem_of("llava", tmp_path / "again", "lambda", modules_to_save=["multi_modal_projector"])
    present = presence(problem)
    with attached(problem, feature_matching.MatchOptions()) as coefficients, torch.no_grad():
        models = OwnModels(problem, coefficients, present)
        for number, task in enumerate(problem.tasks):
            batch = problem.calibration[task][0]
            expected = zoo.outputs(merged(whole, {"a": float(task == "a"), "b": float(task == "b")}), batch)
            with models.of(number):
                torch.testing.assert_close(zoo.outputs(problem.model, batch), expected, rtol=1e-4, atol=1e-5)
        with models.of(None):
            base = zoo.outputs(problem.model, batch)
        torch.testing.assert_close(base, zoo.outputs(zoo.build("llava"), batch), rtol=1e-4, atol=1e-5)
    for task in problem.tasks:
        batch = problem.calibration[task][0]
        expected = zoo.outputs(merged(whole, {"a": float(task == "a"), "b": float(task == "b")}), batch)
        with regmean.alone(problem, task):
            torch.testing.assert_close(zoo.outputs(problem.model, batch), expected, rtol=1e-4, atol=1e-5)


def test_what_is_kept_of_single_models_keeps_to_its_limit(monkeypatch):
    monkeypatch.setattr(task_models, "LIMIT", 10)
    kept = task_models.Kept(lambda value: value)
    first, second = {}, {}
    computed = []

    def ask(batch, number, value):
        return kept(batch, [number], lambda _: computed.append(value) or value)[number]

    assert [ask(first, 0, 4), ask(first, 1, 5), ask(first, 0, 0)] == [4, 5, 4]
    assert kept.held == 9
    # The first batch's values make room for the second's, and are computed anew.
    assert [ask(second, 0, 6), ask(first, 0, 3)] == [6, 3]
    assert computed == [4, 5, 6, 3]
    assert kept.held == 9


def test_held_out_batches_are_measured_in_the_merged_model_whatever_is_kept(tmp_path, monkeypatch):
    problem = problem_of("vit", tmp_path, count=3)
    options = {"steps": 12, "lr": 5e-2, "hold_out": 2, "normalise": "task"}
    expected = merge(problem, "match", **options)
    monkeypatch.setattr(task_models, "LIMIT", 1)
    assert merge(problem, "match", **options).coefficients == expected.coefficients


@pytest.mark.parametrize("kind", [list, iter])
def test_what_is_held_out_is_never_descended_on(tmp_path, monkeypatch, kind):
    problem = problem_of("vit", tmp_path, count=3)
    numbers = {id(batch): n for n, batch in enumerate(problem.calibration["a"])}
    calibration = {task: kind(batches) for task, batches in problem.calibration.items()}
    drawn = []
    descend = feature_matching.descend

    def spy(method, problem, options, losses, **rest):
        def noting(coefficients):
            loss = losses(coefficients)

            def run(one):
                if torch.is_grad_enabled():
                    drawn.append(numbers.get(id(one.sources[0])))
                return loss.backward(one)

            return loss._replace(backward=run)

        return descend(method, problem, options, noting, **rest)

    monkeypatch.setattr(feature_matching, "descend", spy)
    merge(Problem(problem.model, problem.adapters, calibration), "match", steps=5, hold_out=1, init="match")
    assert [n for n in drawn if n is not None] == [1, 2, 1, 2, 1]


def test_holding_everything_out_is_refused(tmp_path):
    problem = problem_of("vit", tmp_path, count=2)
    with pytest.raises(ValueError, match=r"calibration\['a'\]: expected more batches than the 2 held out, found 2"):
        merge(problem, "match", steps=1, hold_out=2)


def test_iterators_start_anew_and_datasets_are_not_remembered():
    made = []

    class Dataset:
        def __iter__(self):
            for n in range(3):
                made.append(n)
                yield {"x": torch.tensor(n)}

    known = restartable({"a": iter([{"x": torch.tensor(n)} for n in range(3)]), "b": Dataset()}, ["a", "b"])
    first, rest = held_out(known, ["a", "b"], 1)
    assert [int(batch["x"]) for task in ("a", "b") for batch in first[task]] == [0, 0]
    drawn = streams(rest, ["a", "b"])
    for task in ("a", "b"):
        assert [int(next(drawn[task])["x"]) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert len(made) == 2 + 3 * 3 - 1


def test_coefficients_that_nothing_depends_on_stay_through_a_warm_up(tmp_path):
    problem = problem_of("llama", tmp_path)
    options = {"steps": 20, "lr": 1e-2, "features": ["model.layers.1"]}
    found = merge(problem, "match", warm_up=3, **options)
    later = [path for path in found.coefficients if path.startswith("model.layers.2.")]
    assert sorted(found.dead) == sorted(merge(problem, "match", **options).dead) == sorted(later)
    assert all(value == pytest.approx(0.4) for path in later for value in found.coefficients[path].values())
    assert all(value != 0.4 for value in found.coefficients["model.layers.0.self_attn.q_proj"].values())


def test_ratios_are_averaged_over_the_modules_that_an_adapter_touches(tmp_path):
    model = zoo.build("llama")
    both = zoo.write_adapter(model, tmp_path / "a", 1, r=4, target_modules=["q_proj", "v_proj"])
    half = zoo.write_adapter(
        model, tmp_path / "b", 2, r=4, target_modules=r".*(layers\.[01]\..*(q|v)_proj|layers\.2\..*q_proj)"
    )
    adapters = fit({"a": nsc_merge.load_adapter(both, "a"), "b": nsc_merge.load_adapter(half, "b")}, model)
    problem = Problem(model, adapters, {task: [zoo.text(3)] for task in adapters})
    watcher = feature_matching.Watcher(problem, "final", None, ratios=True)
    watcher._scored = ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    watcher._touched = {watcher._scored[0]: torch.tensor([True, True]), watcher._scored[1]: torch.tensor([True, False])}
    with attached(problem, feature_matching.MatchOptions()) as coefficients, torch.no_grad():
        coefficients.spread()
        one = Pass(zoo.text(3), ({},), ((0, 1),))
        seen = watcher.see(one).ratios
        watcher._scored = watcher._scored[:1]
        alone = watcher.see(one).ratios
    torch.testing.assert_close(seen[1], alone[1])
    assert float(seen[1]) < 0.999


@pytest.mark.parametrize("method", ["nsc", "match", "distill", "adamerging"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_works_where_gradients_are_off(tmp_path, method, mode):
    problem = problem_of("llama-cls", tmp_path)
    expected = merge(problem, method, steps=2)
    with mode():
        found = merge(problem, method, steps=2)
        assert not torch.is_grad_enabled()
    assert found.coefficients == expected.coefficients


def test_every_module_gets_its_own_mode_back(tmp_path):
    problem = problem_of("vit", tmp_path)
    problem.model.train()
    modules = dict(problem.model.named_modules())
    frozen = next(path for path, module in modules.items() if isinstance(module, nn.LayerNorm))
    modules[frozen].eval()
    before = {path: module.training for path, module in modules.items()}
    with evaluating(problem.model):
        assert not any(module.training for module in problem.model.modules())
    for method in ("nsc", "match"):
        merge(problem, method, steps=1)
    METHODS["regmean"].run(problem, {"batches": 1})
    assert {path: module.training for path, module in problem.model.named_modules()} == before


def test_a_shared_forward_gives_an_own_forward_of_the_model_back():
    model = nn.Linear(2, 2)
    model.forward = forward = lambda z: z + 1
    with shared_forward(model):
        z = torch.zeros(2)
        assert model(z) is model(z)
    assert model.forward is forward


def test_coefficients_of_shared_modules_are_not_rounded(tmp_path):
    """A step of 3e-4 moves a bfloat16 projector, as it moves a LoRA update."""
    problem = problem_of("llava", tmp_path, modules_to_save=["multi_modal_projector"])
    model = problem.model.to(torch.bfloat16)
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with attach(model, problem.adapters, 0.4) as linears, torch.no_grad():
        module = linears["model.multi_modal_projector.linear_1"]
        assert module.denses is not None
        before = module(z)
        module.lam += 3e-4
        assert not torch.equal(module(z), before)


def test_a_linear_with_two_kinds_of_updates_has_no_share(tmp_path):
    model = zoo.build("llava")
    folders = {
        "a": zoo.write_adapter(
            model, tmp_path / "a", 1, target_modules=zoo.LANGUAGE, modules_to_save=["multi_modal_projector"]
        ),
        "b": zoo.write_adapter(model, tmp_path / "b", 2, target_modules=zoo.LANGUAGE + "|.*projector.linear_1"),
    }
    loaded = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    fit(loaded, model, "lambda")
    with pytest.raises(ValueError, match=r"shared_modules: .*linear_1 was trained in full for \['a'\].*\['b'\]"):
        fit(loaded, model, "mean")

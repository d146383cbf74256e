"""Folding the adapters into the weights, and compiling blocks, changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from loop_cases import TASKS, adapters_for, image_batches, llama, llava, same_course, text_batches, trajectory
from zoo import build, write_adapter

import nsc_merge
from nsc_kernels import AdapterBank, merged_lora
from nsc_merge.models.merged.folded_linear import Folded, least_tokens, should_fold


@pytest.fixture
def layer():
    """A linear, its bank of unequal ranks, one of them 0, and coefficients; in float64."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 10).double().requires_grad_(False)
    ranks = (3, 0, 2)
    A = [torch.randn(rank, 12, dtype=torch.float64) for rank in ranks]
    B = [torch.randn(10, rank, dtype=torch.float64) for rank in ranks]
    return linear, AdapterBank.from_factors(A, B, [1.5, 1.0, 0.5]), torch.tensor([0.3, 0.7, -0.4]).double()


def test_values_and_gradients_are_those_of_the_fused_operator(layer):
    linear, bank, lam = layer
    folded = Folded(linear, bank)
    folded.refresh(lam)

    def run(forward):
        coefficients = lam.clone().requires_grad_()
        z = torch.arange(120, dtype=torch.float64).reshape(2, 5, 12).sin().requires_grad_()
        y = forward(z, coefficients)
        return y, *torch.autograd.grad((y * y.detach().cos()).sum(), (z, coefficients))

    for found, expected in zip(
        run(folded), run(lambda z, lam: merged_lora(z, bank, lam, linear(z))), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences(layer):
    linear, bank, lam = layer

    def forward(z, coefficients):
        folded = Folded(linear, bank)
        folded.refresh(coefficients.detach())
        return folded(z, coefficients)

    z = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(forward, (z, lam.requires_grad_()))


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 4, 12), (2, 2, 4, 12), (0, 4, 12)])
def test_what_it_gives_may_be_changed_in_place(layer, shape):
    """As by a ReLU of that kind behind the linear."""
    linear, bank, lam = layer
    folded = Folded(linear, bank)
    folded.refresh(lam.detach())
    z = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(torch.relu_(y).sum(), (z, lam))
        for y in (folded(z, lam.requires_grad_()), merged_lora(z, bank, lam, base=linear(z)))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"batch_tasks": True}, {"checkpointing": True}, {"score_blocks": [1, 3]}])
@pytest.mark.parametrize("make", [llama, llava])
def test_the_course_is_that_of_the_fused_operator(make, options):
    model = make()
    adapters = adapters_for(model, ["q_proj", "v_proj", "o_proj"])
    batches = image_batches() if make is llava else text_batches()
    plain = trajectory(model, adapters, batches, fold=False, **options)
    folded = trajectory(model, adapters, batches, fold=True, **options)
    assert folded.coefficients != plain.coefficients
    same_course(folded, plain)


@pytest.fixture
def folds(monkeypatch):
    """Every folding of a linear, in order."""
    refresh, seen = Folded.refresh, []
    monkeypatch.setattr(Folded, "refresh", lambda self, lam: seen.append(self) or refresh(self, lam))
    return seen


@pytest.mark.parametrize(
    ("tokens", "options"), [(2, {}), (7, {}), (7, {"batch_tasks": True}), (7, {"checkpointing": True})]
)
def test_a_step_folds_if_all_of_its_passes_have_the_tokens(folds, tokens, options):
    # No pass of two rows has them, and the three passes of a step have with rows of seven.
    assert 3 * 2 * 2 < least_tokens(32, 32, 9) < 3 * 2 * 7 < least_tokens(32, 32, 5)
    assert least_tokens(32, 32, 9) > 2 * 7
    trajectory(llama(), adapters_for(llama()), text_batches(tokens=tokens), steps=1, **options)
    # q and v of all blocks but the last, and but the first, where a task is absent, in one step and at both ends of the
    # comparison; and the q of the last block once, before it is known that v takes the same input.
    assert len(folds) == (3 * 4 + 1 if tokens == 7 else 0)


def test_a_linear_is_folded_only_if_it_is_called(layer):
    linear, bank, lam = layer
    folded = Folded(linear, bank, always=True)
    folded.begin(lam)
    assert folded.pays(torch.empty(0, 12))
    folded.begin(2 * lam)
    z = torch.randn(3, 12, dtype=torch.float64)
    assert folded.pays(z)
    torch.testing.assert_close(folded(z, 2 * lam), merged_lora(z, bank, 2 * lam, linear(z)), rtol=1e-12, atol=1e-12)


def test_steps_of_few_and_of_many_tokens_take_the_course_of_the_fused_operator(folds):
    few, many = text_batches(1, tokens=2), text_batches(1)
    batches = {task: [*few[task], *many[task]] for task in TASKS}
    mixed = trajectory(llama(), adapters_for(llama()), batches)
    # Two of four steps, and one of the comparison's two batches at either end.
    assert len(folds) == 4 * (2 + 2)
    same_course(mixed, trajectory(llama(), adapters_for(llama()), batches, fold=False))


def test_biases_stay(tmp_path):
    model = build("vit")
    folders = {
        task: write_adapter(model, tmp_path / task, seed, target_modules=["q_proj", "o_proj"], lora_bias=True)
        for seed, task in enumerate(TASKS)
    }
    generator = torch.Generator().manual_seed(1)
    batches = {task: [{"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}] for task in TASKS}
    runs = [
        nsc_merge.merge(model, folders, batches, steps=4, lr=1e-2, progress=False, fold=fold) for fold in (True, False)
    ]
    same_course(*runs)


def test_a_linear_with_hooks_is_called_as_ever():
    model = llama()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    adapters, batches = adapters_for(model), text_batches()
    trajectory(model, adapters, batches, fold=True)
    # Four steps and two batches of three tasks; the batches again at either end of the comparison.
    assert len(seen) == 12 + 2 * 6


def test_what_cannot_hold_the_sum_is_not_folded():
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert should_fold(None, [half]) is False
    with pytest.raises(ValueError, match=r"fold: expected weights in float32 or float64.*found torch\.bfloat16"):
        should_fold(True, [half])
    single = half.float()
    assert should_fold(None, [single]) is None
    assert should_fold(False, [single]) is False
    with torch.autocast("cpu"):
        assert should_fold(None, [single]) is False
        with pytest.raises(ValueError, match=r"found torch\.float32 under autocast"):
            should_fold(True, [single])
    # Two of these are more than a GiB; no memory is taken for them.
    large = torch.empty(1, dtype=torch.float32).expand(2**14, 2**14)
    assert should_fold(None, [large, large]) is False
    assert should_fold(True, [large, large])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("qwen2", {"checkpointing": True, "fold": False}), ("vit", {"batch_tasks": True})],
)
def test_compiled_blocks_take_the_same_course(folds, kind, options):
    model = build(kind)
    adapters = adapters_for(model)
    generator = torch.Generator().manual_seed(1)
    batches = text_batches()
    if kind == "vit":
        batches = {task: [{"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}] for task in TASKS}
    plain = trajectory(model, adapters, batches, **options)
    eager = len(folds)
    assert bool(eager) is (options.get("fold") is None)
    compiled = trajectory(model, adapters, batches, compile="aot_eager", **options)
    assert len(folds) == 2 * eager
    same_course(compiled, plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_compile_wants_a_backend_that_there_is():
    with pytest.raises(ValueError, match=r"compile: expected True, False or one of .*inductor.*found 'fast'"):
        trajectory(llama(), adapters_for(llama()), text_batches(), compile="fast")


def test_coefficients_other_than_those_folded_are_noticed(layer):
    linear, bank, lam = layer
    folded = Folded(linear, bank)
    folded.refresh(lam)
    y = folded(torch.randn(4, 12, dtype=torch.float64, requires_grad=True), lam.requires_grad_())
    folded.refresh(2 * lam)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

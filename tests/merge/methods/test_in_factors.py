"""Merges of A and B apart, pruning by magnitude, and DARE with weights: against what they are in a few lines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.task_vectors import dare, pruning, tiles
from nsc_merge.methods.task_vectors.elementwise import dense_update
from nsc_merge.methods.task_vectors.in_factors import merged_in_factors

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 0.0}


def adapters(ranks=(3, 3, 3)):
    generator = torch.Generator().manual_seed(0)

    def factor(rank):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, 9), (7, rank)))
        return Factor(A, B, 1.5)

    return {task: Adapter(task, {"x": factor(rank)}) for task, rank in zip("abc", ranks, strict=True)}


def merged(method, held, **options):
    chosen = METHODS[method]
    ((_, factor),) = chosen.updates(held, ["x"], chosen.options(**options))
    return factor


def largest(tensor, density):
    kept = torch.zeros(tensor.numel())
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view(tensor.shape)


@pytest.mark.parametrize("on_factors", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_pruning_keeps_each_tasks_largest_entries_and_adds(density, on_factors, monkeypatch):
    if not on_factors:
        monkeypatch.setattr(tiles, "serves", lambda adapters, paths: False)
    held = adapters()
    updates = {task: dense_update(adapter.factors["x"]) for task, adapter in held.items()}
    expected = 0.5 * sum(WEIGHTS[task] * largest(update, density) for task, update in updates.items())
    found = merged("magnitude_prune", held, density=density, weights=WEIGHTS, scale=0.5)
    torch.testing.assert_close(found.dense, expected, rtol=1e-5, atol=1e-6)
    # Over all modules is over the one that there is; the authors' of TIES keep one more.
    whole = merged("magnitude_prune", held, density=density, weights=WEIGHTS, scale=0.5, trim_scope="global")
    torch.testing.assert_close(whole.dense, expected, rtol=1e-5, atol=1e-6)


def test_merged_factors_are_the_product_of_two_merges():
    held = adapters()
    found = merged("magnitude_prune", held, density=0.5, weights=WEIGHTS, trim_scope="factors")
    shares = {task: 1.5 * weight for task, weight in WEIGHTS.items()}
    A = sum(
        abs(share) ** 0.5 * (1 if share >= 0 else -1) * largest(held[task].factors["x"].A, 0.5)
        for task, share in shares.items()
    )
    B = sum(abs(share) ** 0.5 * largest(held[task].factors["x"].B, 0.5) for task, share in shares.items())
    torch.testing.assert_close(found.A, A)
    torch.testing.assert_close(found.B, B)


@pytest.mark.parametrize(
    ("method", "whole", "options"),
    [("dare", "linear", {"drop_scope": "factors"}), ("dare_ties", "ties", {"preset": "peft", "trim_scope": "factors"})],
)
def test_dropping_in_factors_draws_for_each_task_and_factor(method, whole, options):
    held = adapters()
    nothing = merged(method, held, drop=0.0, weights=WEIGHTS, **options)
    own = {} if whole == "linear" else {"preset": "peft", "trim_scope": "factors", "density": 1.0}
    wanted = merged(whole, held, weights=WEIGHTS, **own)
    torch.testing.assert_close(nothing.delta(), wanted.delta(), rtol=1e-5, atol=1e-6)
    same = {task: Adapter(task, held["a"].factors) for task in held}
    masks = [(merged(method, {task: same[task]}, drop=0.5, **options).A != 0) for task in same]
    assert not any(torch.equal(masks[0], other) for other in masks[1:])
    again = merged(method, held, drop=0.5, **options)
    assert torch.equal(again.A, merged(method, held, drop=0.5, **options).A)
    assert not torch.equal(again.A, merged(method, held, drop=0.5, seed=1, **options).A)


@pytest.mark.parametrize("rescale", dare.RESCALES)
def test_weights_of_dare_scale_what_each_task_adds(rescale):
    held = adapters()
    alone = {
        task: merged("dare", {task: adapter}, drop=0.5, rescale=rescale).dense for task, adapter in held.items()
    }
    found = merged("dare", held, drop=0.5, rescale=rescale, weights=WEIGHTS).dense
    expected = sum(weight * alone[task] for task, weight in WEIGHTS.items())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # One each, as before there were weights, to the bit.
    ones = merged("dare", held, drop=0.5, rescale=rescale, weights=dict.fromkeys(held, 1.0)).dense
    assert torch.equal(ones, merged("dare", held, drop=0.5, rescale=rescale).dense)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude_prune", {"trim_scope": "factors"}),
        ("dare", {"drop_scope": "factors"}),
        ("dare_ties", {"trim_scope": "factors"}),
    ],
)
def test_unequal_ranks_have_no_common_factors(method, options):
    with pytest.raises(ValueError, match=r"adapters: (trim|drop)_scope='factors' adds factors and needs equal ranks"):
        merged(method, adapters((3, 2, 3)), **options)
    assert METHODS[method].gives_with(options) == "low rank"
    assert METHODS[method].gives_with({}) == "full rank"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"trim_scope": "x"}, "trim_scope"),
        ({"keep": "x"}, "keep"),
        ({"weights": {"a": float("nan")}}, "weights"),
        ({"scale": "1"}, "scale"),
    ],
)
def test_options_of_pruning_are_checked(options, message):
    with pytest.raises(ValueError, match=f"{message}.*expected"):
        pruning.MagnitudePruneOptions(**options)


def test_factors_of_an_embedding_are_called_and_signed_as_peft_has_them():
    held = adapters()
    called = {}

    def record(name, values, weights):
        called[name] = {task: (value.shape, weights[task]) for task, value in values.items()}
        return sum(weights[task] * value for task, value in values.items())

    embedding = {
        task: Adapter(task, {"x": replace(adapter.factors["x"], transposed=True)}) for task, adapter in held.items()
    }
    ((_, found),) = merged_in_factors("it", embedding, ["x"], WEIGHTS, 1.0, record)
    root = (1.5 * 0.4) ** 0.5
    assert called["x.lora_A"]["b"] == (torch.Size([7, 3]), pytest.approx(-root))
    assert called["x.lora_B"]["b"] == (torch.Size([3, 9]), pytest.approx(root))
    shares = {task: abs(1.5 * weight) ** 0.5 for task, weight in WEIGHTS.items()}
    A = sum(shares[task] * adapter.factors["x"].A for task, adapter in held.items())
    B = sum(shares[task] * (1 if WEIGHTS[task] >= 0 else -1) * held[task].factors["x"].B for task in held)
    torch.testing.assert_close(found.delta(), B.double() @ A.double(), rtol=1e-5, atol=1e-6)

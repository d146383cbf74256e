"""TIES, DARE and EMR on factors and on dense updates are one method: every option, to the bit; and what DARE draws."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from nsc_kernels import entries
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.task_vectors import dare, draws, emr, ties, tiles
from nsc_merge.methods.task_vectors import elementwise as ew

built = pytest.mark.skipif(entries.unavailable() is not None, reason=str(entries.unavailable()))


def whole_adapters(pick):
    """Adapters of small whole numbers, whose products are exact in any order, and equal ones frequent; some absent, of
    rank 0, or in other dtypes.
    """
    generator = torch.Generator().manual_seed(pick.getrandbits(32))
    shapes = {path: (pick.choice((1, 9, 66)), pick.choice((1, 64, 130, 515))) for path in "xy"}
    adapters = {}
    for k in range(pick.choice((1, 2, 3, 5))):
        factors = {}
        for path, (rows, columns) in shapes.items():
            if k and pick.random() < 0.2:
                continue
            rank = pick.choice((0, 1, 4, 17))
            A, B = (torch.randint(-3, 4, shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
            dtype = pick.choice((torch.float32, torch.float64, torch.bfloat16))
            factors[path] = Factor(A.to(dtype), B.to(dtype), pick.choice((1.0, 2.0, -0.5)))
        adapters[str(k)] = Adapter(str(k), factors)
    return adapters


def both_ways(monkeypatch, function):
    """What a function returns on factors, and on dense updates."""
    found = []
    for serves in (True, False):
        monkeypatch.setattr(tiles, "serves", lambda adapters, paths, serves=serves: serves)
        found.append(function())
    return found


def merged(function, adapters, options):
    return dict(function(adapters, list("xy"), options))


def steps_at_random(pick, adapters):
    return {
        "density": pick.choice((0.05, 0.2, 0.5, 0.9, 1.0)),
        "trim_scope": pick.choice(ew.TRIM_SCOPES),
        "keep": pick.choice(ew.KEEPS),
        "sign": pick.choice(ew.SIGNS),
        "zero": pick.choice(ew.ZEROS),
        "aggregate": pick.choice(ew.AGGREGATES),
        # Of weights such as 0.3, PyTorch rounds products together with the sum or apart from it, as its build has it.
        "weights": pick.choice((None, {task: pick.choice((1.0, -1.0, 2.0, 0.0)) for task in adapters})),
        "scale": pick.choice((1.0, 0.3)),
    }


@built
@pytest.mark.parametrize("seed", range(80))
def test_factors_and_dense_updates_merge_alike(seed, monkeypatch):
    pick = random.Random(seed)
    adapters = whole_adapters(pick)
    steps = steps_at_random(pick, adapters)
    dropping = {"drop": pick.choice((0.0, 0.1, 0.5, 0.9)), "rescale": pick.choice(("inverse", "none")), "seed": seed}
    for function, options in (
        (ties.ties, ties.TiesOptions(**steps)),
        (dare.dare, dare.DareOptions(**dropping)),
        (dare.dare_ties, dare.DareTiesOptions(order=pick.choice(dare.ORDERS), **steps, **dropping)),
        (emr.emr_unified, emr.UnifiedOptions()),
    ):
        found, expected = both_ways(monkeypatch, partial(merged, function, adapters, options))
        for path in "xy":
            assert torch.equal(found[path].dense, expected[path].dense), (function.__name__, path, options)


PRESETS = [("ties", name) for name in ties.PRESETS] + [("dare_ties", name) for name in dare.PRESETS]


@built
@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_presets_merge_alike(method, preset, monkeypatch):
    """mergekit's rescale="l1" divides sums, which are formed in another order: to float32's rounding."""
    adapters = whole_adapters(random.Random(7))
    function, kind = (ties.ties, ties.TiesOptions) if method == "ties" else (dare.dare_ties, dare.DareTiesOptions)
    found, expected = both_ways(monkeypatch, partial(merged, function, adapters, kind(preset=preset)))
    for path in "xy":
        torch.testing.assert_close(found[path].dense, expected[path].dense, rtol=1e-6, atol=0)


@built
@pytest.mark.parametrize("seed", range(10))
def test_every_task_of_emr_alike(seed, monkeypatch):
    adapters = whole_adapters(random.Random(seed))

    def updates():
        rescale, shared = emr.rescaling(adapters, list("xy")), emr.UnifiedUpdates(adapters)
        each = {task: emr.Modulated(task, shared, one.factors, rescale[task]) for task, one in adapters.items()}
        return {(task, path): each[task][path].dense for path in "xy" for task in each if path in each[task]}

    found, expected = both_ways(monkeypatch, updates)
    for key, update in found.items():
        torch.testing.assert_close(update, expected[key], rtol=1e-6, atol=0)


@built
def test_emr_forms_a_unified_update_once_for_all_tasks(monkeypatch):
    adapters = whole_adapters(random.Random(3))
    asked, unified = [], emr.unified_update

    def counted(adapters, path):
        asked.append(path)
        return unified(adapters, path)

    monkeypatch.setattr(emr, "unified_update", counted)
    shared = emr.UnifiedUpdates(adapters)
    for path in "xy":
        for task, one in adapters.items():
            if path in one.factors:
                modulated = emr.Modulated(task, shared, one.factors, 1.0)
                assert modulated[path].dense is modulated[path].dense
    assert asked == list("xy")


def test_random_numbers_are_philox():
    """The known answers of its authors' Random123 for ten rounds."""
    for counter, key, words in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        found = draws.philox([torch.tensor(word) for word in counter], key)
        assert tuple(int(word) for word in found) == words


@built
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 65), (5, 300)])
def test_the_library_draws_what_pytorch_draws(shape):
    for key in (draws.key_of(0, "a", "x"), draws.key_of(1, "b", "x")):
        for drop in (0.0, 0.3, 0.9, 1 - 1e-12):
            threshold = draws.threshold_of(drop)
            found = entries.drawn(*shape, key, threshold)
            assert torch.equal(found, draws.drawn_in_pytorch(*shape, key, threshold))


def test_a_draw_belongs_to_its_entry():
    """Not to the shape around it, whichever leading dimensions count as rows; and is as likely as it should be."""
    key, threshold = draws.key_of(0, "a"), draws.threshold_of(0.7)
    whole = draws.kept((400, 500), key, threshold)
    assert torch.equal(whole[:30, :77], draws.kept((30, 77), key, threshold))
    assert torch.equal(whole.view(20, 20, 500), draws.kept((20, 20, 500), key, threshold))
    assert torch.equal(whole[0], draws.kept((500,), key, threshold))
    # Of means of 500 and 400 draws, by rows and by columns: five standard deviations.
    for dimension, count in ((0, 400), (1, 500)):
        shares = whole.double().mean(dimension)
        assert float((shares - 0.3).abs().max()) < 5 * (0.21 / count) ** 0.5
    # Neighbours, rows and tasks do not go together: the share of both kept is that of independent draws.
    other = draws.kept((400, 500), draws.key_of(0, "b"), threshold)
    for first, second in ((whole[:, 1:], whole[:, :-1]), (whole[1:], whole[:-1]), (whole, other)):
        assert float((first & second).double().mean()) == pytest.approx(0.09, abs=0.004)

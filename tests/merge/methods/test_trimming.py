"""How many entries trimming keeps: counted by hand, as each codebase counts, in one tensor and over many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_based_pruning

import nsc_merge
from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods import METHODS
from nsc_merge.methods.low_rank.robustmerge import robustmerge_alg1
from nsc_merge.methods.task_vectors import dare, ties
from nsc_merge.methods.task_vectors import elementwise as ew

SIZES = (1, 2, 3, 10, 97)
# keep -> density -> how many of 1, 2, 3, 10 and 97 entries stay.
BY_HAND = {
    "next": {
        0.1: (1, 1, 1, 2, 10),
        0.2: (1, 1, 1, 3, 20),
        0.5: (1, 2, 2, 6, 49),
        0.8: (1, 2, 3, 9, 78),
        0.99: (1, 2, 3, 10, 97),
        1.0: SIZES,
    },
    "floor": {
        0.1: (0, 0, 0, 1, 9),
        0.2: (0, 0, 0, 2, 19),
        0.5: (0, 1, 1, 5, 48),
        0.8: (0, 1, 2, 8, 77),
        0.99: (0, 1, 2, 9, 96),
        1.0: SIZES,
    },
    "round": {
        0.1: (1, 1, 1, 1, 10),
        0.2: (1, 1, 1, 2, 19),
        0.5: (1, 1, 2, 5, 48),
        0.8: (1, 2, 2, 8, 78),
        0.99: (1, 2, 3, 10, 96),
        1.0: SIZES,
    },
    "complement": {
        0.1: (1, 2, 2, 2, 11),
        0.2: (1, 2, 2, 3, 21),
        0.5: (1, 2, 3, 6, 50),
        # 1 - 0.8 is a little less than 0.2: of ten entries the threshold is the smallest and not the second smallest.
        0.8: (1, 2, 3, 10, 79),
        0.99: (1, 2, 3, 10, 97),
        1.0: SIZES,
    },
}
COUNTS = [
    (keep, density, size, count)
    for keep, row in BY_HAND.items()
    for density, counts in row.items()
    for size, count in zip(SIZES, counts, strict=True)
]


def steps(density, keep, trim_scope="tensor"):
    return ew.Ties(density, trim_scope, keep, "sum", "majority", "mean")


def shuffled(size):
    """1 to ``size`` in any order, of any sign."""
    generator = torch.Generator().manual_seed(size)
    values = 1.0 + torch.randperm(size, generator=generator)
    return values * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("keep", "density", "size", "count"), COUNTS)
def test_as_many_stay_as_counted_by_hand(keep, density, size, count, split):
    values = shuffled(size)
    parts = {"": values} if not split else {str(n): part for n, part in enumerate(values.split(3))}
    source = ew.trimmed(
        lambda path, task: parts[path], {path: ["a"] for path in parts}, steps(density, keep, "global")
    )
    found = torch.cat([source(path, "a") for path in parts])
    assert torch.equal(found, torch.where(values.abs() > size - count, values, 0.0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", BY_HAND["next"])
def test_counts_are_those_of_peft_and_of_the_authors(density, size):
    values = shuffled(size)
    peft = int((magnitude_based_pruning(values, density) != 0).sum())
    assert ew.kept_entries(size, density, "floor") == peft
    if int(size * density) < size:
        least = values.abs().kthvalue(size - int(size * density)).values
        assert ew.kept_entries(size, density, "next") == int((values.abs() >= least).sum())


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # Of five, a density of 0.4 means two; the second to fourth are equally large.
        ("floor", [3.0, 0.0, -2.0, 0.0, 0.0]),
        ("round", [3.0, 0.0, -2.0, 0.0, 0.0]),
        ("next", [3.0, 0.0, -2.0, 2.0, 2.0]),
        ("complement", [3.0, 0.0, -2.0, 2.0, 2.0]),
    ],
)
@pytest.mark.parametrize("split", [1, 2, 5])
def test_equally_large_entries(keep, expected, split):
    values = torch.tensor([3.0, 1.0, -2.0, 2.0, 2.0])
    parts = {str(n): part for n, part in enumerate(values.split(split))}
    tasks = {path: ["a", "b"] for path in parts}
    source = ew.trimmed(lambda path, task: parts[path], tasks, steps(0.4, keep, "global"))
    for task in "ab":
        assert torch.cat([source(path, task) for path in parts]).tolist() == expected
    assert ew.trim(values, ew.bound(values, 0.4, keep)).tolist() == expected


@pytest.mark.parametrize(("keep", "count"), [("floor", 2), ("round", 2), ("next", 10), ("complement", 10)])
def test_entries_that_are_all_equal(keep, count):
    assert int(ew.trim(torch.ones(10), ew.bound(torch.ones(10), 0.2, keep)).sum()) == count
    assert not ew.trim(torch.zeros(10), ew.bound(torch.zeros(10), 0.2, keep)).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.2, 1 / 3, 0.5, 0.99, 1.0]),
    st.sampled_from(ew.KEEPS),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    st.integers(0, 1000),
)
def test_streamed_bounds_are_exact(shapes, density, keep, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(i): magnitude * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    found = ew.bounds(lambda path, task: tensors[path], {path: ["a"] for path in tensors}, density, keep)
    entries = torch.cat([t.flatten() for t in tensors.values()]).abs().sort(descending=True).values
    wanted = ew.kept_entries(len(entries), density, keep)
    assert {one.least for one in found.values()} == {float(entries[wanted - 1]) if wanted else math.inf}
    if keep in ("floor", "round"):
        exact = sum(one.first if one.first is not None else 0 for one in found.values())
        assert exact in (0, wanted - int((entries > entries[wanted - 1]).sum()) if wanted else 0)


@pytest.mark.parametrize(
    ("method", "preset", "keep"),
    [
        *[("ties", name, keep) for name, keep in (
            ("canonical", "next"), ("peft", "floor"), ("mergekit", "floor"), ("knots", "next"), ("adamerging", "next"),
            ("nsc", "round"),
        )],
        *[("dare_ties", name, keep) for name, keep in (
            ("canonical", "next"), ("peft", "floor"), ("mergekit", "floor"), ("knots", "next"),
            ("fusion_bench", "next"), ("nsc", "round"),
        )],
        ("knots_ties", "knots", "next"),
        ("knots_ties", "nsc", "round"),
        ("knots_dare_ties", "knots", "next"),
    ],
)  # fmt: skip
def test_presets_count_as_their_codebases(method, preset, keep):
    assert METHODS[method].options(preset=preset).keep == keep
    for name in (ties.PRESETS, dare.PRESETS):
        assert all(set(steps_) == set(name["canonical"]) for steps_ in name.values())


def test_presets_have_the_numbers_of_their_codebases():
    """Share that is kept and scale, of DARE also the share that is dropped."""
    assert {name: (one["density"], one["scale"]) for name, one in ties.PRESETS.items()} == {
        "canonical": (0.2, 1.0),
        "peft": (0.2, 1.0),
        "mergekit": (1.0, 1.0),
        "knots": (0.3, 0.3),
        "adamerging": (0.2, 0.3),
        "nsc": (0.2, 0.3),
    }
    assert {name: (one["drop"], one["density"], one["scale"]) for name, one in dare.PRESETS.items()} == {
        "canonical": (0.9, 0.2, 1.0),
        "peft": (0.9, 1.0, 1.0),
        "mergekit": (0.9, 1.0, 1.0),
        "fusion_bench": (0.5, 0.2, 0.5),
        "knots": (0.2, 1.0, 0.6),
        "nsc": (0.9, 0.2, 0.3),
    }


def test_knots_has_settings_for_plain_and_for_aligned_updates():
    """Those of its files vitB_r16_ties, _knots_ties, _dare_ties and _knots_dare_ties."""
    settings_of = {name: METHODS[name].options(preset="knots") for name in ("ties", "knots_ties")}
    assert {name: (one.density, one.scale) for name, one in settings_of.items()} == {
        "ties": (0.3, 0.3),
        "knots_ties": (0.2, 0.6),
    }
    settings_of = {name: METHODS[name].options(preset="knots") for name in ("dare_ties", "knots_dare_ties")}
    assert {name: (one.drop, one.density, one.scale) for name, one in settings_of.items()} == {
        "dare_ties": (0.2, 1.0, 0.6),
        "knots_dare_ties": (0.1, 1.0, 0.7),
    }


@pytest.mark.parametrize(("density", "rows"), [(0.2, (3, 21)), (0.8, (10, 79))])
def test_robustmerge_trims_as_its_code(density, rows):
    for size, count in zip((10, 97), rows, strict=True):
        factor = Factor(shuffled(size)[None].double(), torch.ones(1, 1).double(), 1.0)
        adapters = {"a": Adapter("a", {"x": factor})}
        chosen = METHODS["robustmerge_alg1"].options(density=density)
        update = dict(robustmerge_alg1(adapters, ["x"], chosen))["x"].delta()
        assert int((update != 0).sum()) == count


@pytest.mark.parametrize("weights", [(0.7, -0.1, -0.6), (0.3, -0.1, -0.2), (0.8, 0.1, -0.9)])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_weights_that_cancel_but_for_rounding_divide_no_entry(method, weights):
    """What float32 leaves of 0.3 - 0.1 - 0.2 made entries of 1e8."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        task: (torch.randn(2, 50, generator=generator), torch.randn(40, 2, generator=generator), 1.0) for task in "abc"
    }
    shares = dict(zip("abc", weights, strict=True))
    options = {"drop": 0.0, "aggregate": "weight"} if method == "dare_ties" else {}
    tasks = {task: {"x": one} for task, one in factors.items()}
    found = dict(nsc_merge.merge_factors(tasks, method, preset="mergekit", weights=shares, **options))["x"].delta()
    votes = torch.stack([shares[task] * B.double() @ A.double() for task, (A, B, _) in factors.items()])
    agrees = votes.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    divisor = (agrees * torch.tensor(weights, dtype=torch.float64)[:, None, None]).sum(0)
    expected = (votes * agrees).sum(0) / torch.where(divisor.abs() < 1e-9, 1.0, divisor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

"""What ``nsc-merge inspect`` says of adapters, counted by hand."""

from __future__ import annotations

import pytest
import torch

from nsc_merge.adapters import Adapter, Factor, load_adapter
from nsc_merge.analysis.adapter_overlap import describe, null_space_ratios, overlaps, render

# Updates with two entries of 2 and 3, one of 4, and none in common but the first entry of q.
A, B = torch.eye(2, 4), torch.zeros(3, 2)
B[0, 0], B[1, 1] = 1.0, 1.5
ONE = Adapter(
    "one",
    {
        "layers.0.q": Factor(A, B, 2.0),
        "layers.1.q": Factor(A[:1], 4 * torch.eye(3, 1), 1.0, bias=torch.ones(3)),
        "layers.0.v": Factor(A[:1], 0 * B[:, :1], 1 / 3),
        "norm": Factor.of_matrix(torch.ones(1, 4)),
    },
    "owner/base",
    {"score.weight": torch.ones(2, 4), "score.bias": torch.ones(2)},
    notes=("of its own kind",),
)
TWO = Adapter("two", {"layers.0.q": Factor(A[:1], torch.eye(3, 1), 1.0), "layers.9.q": Factor(A, B[:2], 1.0)})
OTHER = Adapter("other", {"layers.9.q": Factor(A, B, 1.0, magnitude=torch.ones(3))})


def test_an_adapter_is_described_by_what_it_holds():
    assert describe(ONE) == {
        "base_model": "owner/base",
        "modules": {"q": 2, "v": 1},
        "ranks": [1, 2],
        "scaling": [0.333333, 1.0, 2.0],
        "bias": True,
        "dora": False,
        "trained": ["score.bias", "score.weight"],
        "shared": ["norm"],
        "parameters": 2 * 4 + 3 * 2 + 2 * (4 + 3),
        "norm": pytest.approx((2**2 + 3**2 + 4**2) ** 0.5),
        "notes": ["of its own kind"],
    }
    plain = describe(TWO)
    assert (plain["bias"], plain["dora"], plain["shared"], plain["base_model"]) == (False, False, [], None)
    assert describe(OTHER)["dora"]


def test_two_adapters_overlap_where_both_touch_the_same_module():
    """In one of five modules; the sizes of another differ, so that it is not the same."""
    pairs = overlaps({"one": ONE, "two": TWO, "other": OTHER})
    assert [pair["tasks"] for pair in pairs] == [["one", "two"], ["one", "other"], ["two", "other"]]
    first = pairs[0]
    assert (first["modules"], first["union"], first["inputs"]) == (1, 5, pytest.approx(1))
    assert first["cosine"] == pytest.approx(2 / 13**0.5)
    for pair, union in zip(pairs[1:], (5, 2), strict=True):
        assert pair == {"tasks": pair["tasks"], "modules": 0, "union": union, "inputs": None, "cosine": None}


def test_what_is_shown_of_adapters():
    adapters = {"one": ONE, "two": TWO}
    document = {"adapters": {name: describe(one) for name, one in adapters.items()}, "overlaps": overlaps(adapters)}
    lines = render({**document, "null_space_ratio": {"two": {"measured": 0.5, "random": 0.75}}}).splitlines()
    assert lines == [
        "one",
        "  modules   q x2, v x1",
        "  ranks     1, 2   scaling 0.333333, 1, 2   parameters 28   norm of the update 5.385",
        "  base      owner/base",
        "  with      bias",
        "  shared    norm",
        "  in full   score.bias, score.weight",
        "  note      of its own kind",
        "two",
        "  modules   q x2",
        "  ranks     1, 2   scaling 1   parameters 19   norm of the update 2.062",
        "  ratio     0.5000 on the given inputs (a random A: 0.7500)",
        "",
        "overlap    modules  row spaces of A  cosine of updates",
        "one + two    1/5              1.000              0.555",
    ]
    apart = render({"adapters": {}, "overlaps": overlaps({"two": TWO, "other": OTHER})})
    assert apart.endswith("two + other    0/2                  -                  -")
    assert "overlap" not in render({**document, "overlaps": []})


def test_adapters_that_no_input_reaches_are_named(llama):
    model, folders, _ = llama
    adapters = {task: load_adapter(folder, task) for task, folder in folders.items()}
    with pytest.raises(RuntimeError, match=r"inputs: the forward reaches no module of \['a'"):
        null_space_ratios(model, adapters, [])

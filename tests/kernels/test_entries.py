"""Single entries of low-rank updates: against dense updates, at any number of threads, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import entry_cases
from nsc_kernels import entries
from nsc_kernels.entries import ALL, Dropping, Entries, Trimming

pytestmark = pytest.mark.skipif(entries.unavailable() is not None, reason=str(entries.unavailable()))


@pytest.mark.parametrize("seed", range(40))
def test_entries_are_those_of_the_dense_updates(seed: int) -> None:
    entry_cases.check(seed)


def normal(rows: int = 200, columns: int = 700, ranks: tuple[int, ...] = (16, 3, 8)) -> Entries:
    generator = torch.Generator().manual_seed(0)
    A = [torch.randn(rank, columns, generator=generator) for rank in ranks]
    B = [torch.randn(rows, rank, generator=generator) for rank in ranks]
    return Entries.of(A, B, [0.5] * len(ranks))


def test_products_are_those_of_matrices() -> None:
    one = normal()
    torch.testing.assert_close(entries.added(one).double(), one.B.double() @ one.A.double(), rtol=0, atol=1e-5)


def test_neither_threads_nor_tiles_change_a_bit() -> None:
    one = replace(
        normal(),
        dropping=Dropping((1, -2, 3), 1 << 31, (2.0,) * 3),
        trimming=Trimming((0.5, 1.0, 2.0), (ALL, 700 * 100 + 3, -1)),
    )

    def everything() -> list[torch.Tensor]:
        merged = entries.elected(one, [1.0, 0.3, -2.0], "weighted", "weight", 1.0).merged
        assert merged is not None
        return [
            entries.added(one),
            entries.sums(one),
            entries.upper_counts(one),
            merged,
            entries.unified(one),
            entries.unified_sums(one),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(found, expected) for found, expected in zip(everything(), first, strict=True))
    finally:
        torch.set_num_threads(threads)
    total = entries.added(one)
    for row in (0, 100, 199):
        assert torch.equal(sum(entries.added(one.only(k, row)) for k in range(3))[0], total[row])


def test_what_is_not_finite_stays_so() -> None:
    """As in PyTorch, where it times zero is not a number; other rows are not touched."""
    one = normal()
    one.B[3, 0] = float("inf")
    one.B[5, 17] = float("nan")
    merged = entries.elected(one, [1.0] * 3, "sum", "mean", 1.0).merged
    for found in (merged, entries.unified(one), entries.added(one)):
        assert found is not None
        rows = torch.isfinite(found).all(1)
        assert [row for row in range(200) if not rows[row]] == [3, 5]
    trimmed = replace(one, trimming=Trimming((0.5,) * 3, (ALL,) * 3))
    assert torch.isfinite(entries.added(trimmed)[5]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(27, 700).double()}, "A: expected a contiguous float32 .*, found torch.float64"),
        ({"A": torch.ones(700, 27).t()}, "A: expected a contiguous"),
        ({"B": torch.ones(200, 9)}, r"B: expected \[d_out, 27\] for A of \[27, 700\], found \[200, 9\]"),
        ({"offsets": (0, 16, 12, 27)}, "offsets: expected numbers that rise from 0 to 27"),
        ({"A": torch.ones(27)}, r"B: expected \[d_out, 27\] for A of \[27\]"),
        ({"B": torch.ones(27)}, r"B: expected \[d_out, 27\] .*, found \[27\]"),
        ({"offsets": (0, 16)}, "offsets: expected"),
        ({"offsets": (1, 16, 27)}, "offsets: expected"),
        ({"offsets": ()}, "offsets: expected"),
        ({"dropping": Dropping((1, 2), 5, (1.0,) * 3)}, "dropping.keys: expected 3 numbers, found 2"),
        ({"dropping": Dropping((1, 2, 3), 1 << 32, (1.0,) * 3)}, r"dropping.threshold: expected 0 to 2\^32 - 1"),
        ({"trimming": Trimming((1.0,) * 3, (ALL,))}, "trimming.last: expected 3 numbers, found 1"),
    ],
)
def test_updates_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(normal(), **change)


def test_arguments_that_do_not_belong_are_refused() -> None:
    one = normal()
    with pytest.raises(ValueError, match="weights: expected 3 numbers, one for each task, found 1"):
        entries.elected(one, [1.0], "sum", "mean", 1.0)
    with pytest.raises(ValueError, match="sought: expected 3 numbers"):
        entries.lower_counts(one, [1])
    with pytest.raises(ValueError, match="entries: expected one task, found 3"):
        entries.masked(one, torch.ones(200, 700), 1.0)
    with pytest.raises(ValueError, match=r"unified: expected a contiguous float32 \[200, 700\], found .* \[200, 1\]"):
        entries.masked(one.only(0), torch.ones(200, 1), 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_default_dtype_or_device_matters(dtype: torch.dtype) -> None:
    dropping = Dropping((1, 2, 3), 1 << 30, (1.5,) * 3)
    one = replace(normal(), trimming=Trimming((0.5,) * 3, (ALL,) * 3), dropping=dropping)

    def all_of_it() -> list[torch.Tensor]:
        unified = entries.unified(one)
        elected = entries.elected(one, [1.0, 2.0, 0.5], "sum", "mean", 1.0).merged
        assert elected is not None
        return [
            entries.added(one),
            entries.upper_counts(one),
            entries.lower_counts(one, [0x3F00, -1, 0x3E00]),
            entries.equals(one, [0.5] * 3),
            entries.sums(one),
            elected,
            unified,
            entries.unified_sums(one),
            entries.masked(one.only(1), unified, 0.5),
            entries.drawn(20, 30, 5, 1 << 31),
        ]

    expected = all_of_it()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = all_of_it()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)

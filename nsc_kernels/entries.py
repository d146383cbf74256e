"""Single entries of low-rank updates, for methods that trim, drop or elect entries, without the updates themselves.

The updates ``B_k A_k`` of one layer by K tasks are formed a tile at a time, in all of PyTorch's threads, by the C++
library (csrc/cpu/entries.inl); their size in memory does not matter, only the time to go over them. Every function
forms them anew, to the same bits: an entry is the float32 sum over the ranks in their order. Sums are formed in float64
in an order that does not depend on the number of threads.

There is no definition of these functions in PyTorch here: nsc_merge/methods/task_vectors/elementwise.py and emr.py are
that, and serve where the library was not built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native

# Of the histograms of bit patterns; csrc/cpu/entries.h has the same.
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
ALL = (1 << 63) - 1

_WORKS = ("upper_counts", "lower_counts", "equals", "sums", "add", "elect", "unify", "mask")
# Whatever torch's default device is, which may be another; nor is any dtype the default one.
_empty, _zeros, _tensor = (partial(make, device="cpu") for make in (torch.empty, torch.zeros, torch.tensor))
VOTES = ("sum", "weighted", "count")
DIVISORS = ("mean", "sum", "weight")


def unavailable() -> str | None:
    """Why nothing here can be called, None if it can."""
    return native.load("nsc_cpu")


@dataclass(frozen=True)
class Dropping:
    """Entries dropped at random: one is kept where the random number of its row and column, from a Philox-4x32-10
    generator (Salmon, Moraes, Dror and Shaw, SC 2011) of the task, is not below the threshold.

    Attributes:
        keys: of the tasks' generators, 64 bits each, as signed numbers.
        threshold: the share that is dropped, times 2^32.
        multipliers: of what is kept, for each task.
    """

    keys: tuple[int, ...]
    threshold: int
    multipliers: tuple[float, ...]


@dataclass(frozen=True)
class Trimming:
    """Entries of small magnitude set to zero.

    Attributes:
        least: the least magnitude that stays, for each task.
        last: number (row-major, from 0) of the last entry of exactly that magnitude that stays; :data:`ALL` keeps all.
        first: whether entries are trimmed before they are dropped, and not after.
    """

    least: tuple[float, ...]
    last: tuple[int, ...]
    first: bool = False


@dataclass(frozen=True)
class Entries:
    """Updates of one layer, and what is done to their entries.

    Attributes:
        A: down-projections of all tasks on top of one another, ``[R, d_in]`` float32, contiguous.
        B: up-projections side by side, with the scalings, ``[d_out, R]`` float32, contiguous.
        offsets: task k owns rows ``offsets[k]`` to ``offsets[k + 1]`` of A; K + 1 numbers.
        dropping: None drops nothing.
        trimming: None keeps all.
        first_row: number of the first row, where these are some rows of a layer.
    """

    A: Tensor
    B: Tensor
    offsets: tuple[int, ...]
    dropping: Dropping | None = None
    trimming: Trimming | None = None
    first_row: int = 0

    def __post_init__(self) -> None:
        for name, value in (("A", self.A), ("B", self.B)):
            if value.dtype != torch.float32 or value.device.type != "cpu" or not value.is_contiguous():
                raise ValueError(
                    f"{name}: expected a contiguous float32 tensor on the CPU, found {value.dtype} on {value.device} "
                    f"with strides {value.stride()}"
                )
        R = self.A.shape[0]
        if self.A.dim() != 2 or self.B.dim() != 2 or self.B.shape[1] != R:
            raise ValueError(f"B: expected [d_out, {R}] for A of {list(self.A.shape)}, found {list(self.B.shape)}")
        rising = list(self.offsets) == sorted(self.offsets)
        if len(self.offsets) < 2 or self.offsets[0] or self.offsets[-1] != R or not rising:
            raise ValueError(f"offsets: expected numbers that rise from 0 to {R}, found {self.offsets}")
        for name, rule, rows in (
            ("dropping", self.dropping, ("keys", "multipliers")),
            ("trimming", self.trimming, ("least", "last")),
        ):
            for row in rows if rule is not None else ():
                if len(getattr(rule, row)) != self.tasks:
                    raise ValueError(f"{name}.{row}: expected {self.tasks} numbers, found {len(getattr(rule, row))}")
        if self.dropping is not None and not 0 <= self.dropping.threshold < 1 << 32:
            raise ValueError(f"dropping.threshold: expected 0 to 2^32 - 1, found {self.dropping.threshold}")

    @classmethod
    def of(cls, A: Sequence[Tensor], B: Sequence[Tensor], scalings: Sequence[float]) -> Entries:
        """The updates ``s_k B_k A_k`` of K tasks.

        Args:
            A: for each task ``[r_k, d_in]``.
            B: for each task ``[d_out, r_k]``.
            scalings: for each task.
        """
        offsets = [0]
        for part in A:
            offsets.append(offsets[-1] + part.shape[0])
        above = torch.cat([part.float() for part in A])
        beside = torch.cat([scaling * part.float() for scaling, part in zip(scalings, B, strict=True)], 1)
        return cls(above.contiguous(), beside.contiguous(), tuple(offsets))

    @property
    def tasks(self) -> int:
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def only(self, task: int, row: int | None = None) -> Entries:
        """The update of one task, or one row of it."""
        begin, end = self.offsets[task : task + 2]
        rows = slice(None) if row is None else slice(row, row + 1)
        one = slice(task, task + 1)
        dropping, trimming = self.dropping, self.trimming
        if dropping is not None:
            dropping = replace(dropping, keys=dropping.keys[one], multipliers=dropping.multipliers[one])
        if trimming is not None:
            trimming = replace(trimming, least=trimming.least[one], last=trimming.last[one])
        return Entries(
            self.A[begin:end],
            self.B[rows, begin:end].contiguous(),
            (0, end - begin),
            dropping,
            trimming,
            self.first_row + (row or 0),
        )


class _Call(ctypes.Structure):
    """``nsc::Entries`` of csrc/cpu/entries.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("tasks", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("first_row", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("threshold", ctypes.c_int64),
        ("multipliers", ctypes.c_void_p),
        ("least", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("trim_first", ctypes.c_int32),
        ("work", ctypes.c_int32),
        ("vote", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("tie", ctypes.c_float),
        ("weights", ctypes.c_void_p),
        ("sought", ctypes.c_void_p),
        ("unified", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("counts", ctypes.c_void_p),
        ("equal", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


def upper_counts(entries: Entries) -> Tensor:
    """How many magnitudes of each task have which upper 16 bits: ``[K, UPPER_BINS + 1]`` int64; entries that are zero
    are in the last column and not in the first.
    """
    counts = _zeros(entries.tasks, UPPER_BINS + 1, dtype=torch.int64)
    _run(entries, "upper_counts", counts=counts)
    return counts


def lower_counts(entries: Entries, sought: Sequence[int]) -> Tensor:
    """Of the magnitudes whose upper 16 bits are those ``sought`` for the task (none where that is negative), how many
    have which lower 16 bits: ``[K, LOWER_BINS]`` int64.
    """
    _check_one_each(entries, "sought", sought)
    counts = _zeros(entries.tasks, LOWER_BINS, dtype=torch.int64)
    _run(entries, "lower_counts", counts=counts, sought=_tensor(sought, dtype=torch.int32))
    return counts


def equals(entries: Entries, magnitudes: Sequence[float]) -> Tensor:
    """How many entries of each row have the task's one of ``magnitudes``: ``[K, d_out]`` int64. Nothing is trimmed."""
    _check_one_each(entries, "magnitudes", magnitudes)
    found = _zeros(entries.tasks, entries.shape[0], dtype=torch.int64)
    asked = replace(entries, trimming=Trimming(tuple(magnitudes), (ALL,) * entries.tasks))
    _run(asked, "equals", equal=found)
    return found


def sums(entries: Entries) -> Tensor:
    """The sums of each task's magnitudes before and after dropping (and trimming, where that comes first, or last):
    ``[K, 2]`` float64.
    """
    found = _zeros(entries.tasks, 2, dtype=torch.float64)
    _run(entries, "sums", sums=found)
    return found


def added(entries: Entries) -> Tensor:
    """The sum over tasks, in their order, ``[d_out, d_in]`` float32."""
    out = _empty(entries.shape, dtype=torch.float32)
    _run(entries, "add", out=out)
    return out


@dataclass(frozen=True)
class Election:
    """What :func:`elected` found.

    Attributes:
        merged: ``[d_out, d_in]`` float32; None if only asked for the votes.
        cancelled: whether votes other than zero add up to zero anywhere.
        balance: how many more entries have positive votes than negative ones.
    """

    merged: Tensor | None
    cancelled: bool
    balance: int


def elected(
    entries: Entries, weights: Sequence[float], sign: str, aggregate: str, tie: float, *, votes_only: bool = False
) -> Election:
    """The merged update of TIES after trimming; options as in nsc_merge's ``TiesOptions``.

    Args:
        entries: of the tasks.
        weights: of their values.
        sign: one of :data:`VOTES`.
        aggregate: one of :data:`DIVISORS`.
        tie: above 0 if entries whose votes add up to zero are positive.
        votes_only: form no update.
    """
    _check_one_each(entries, "weights", weights)
    out = None if votes_only else _empty(entries.shape, dtype=torch.float32)
    found = _zeros(2, dtype=torch.float64)
    _run(
        entries,
        "elect",
        vote=VOTES.index(sign),
        divide=DIVISORS.index(aggregate),
        tie=tie,
        weights=_tensor(weights, dtype=torch.float32),
        sums=found,
        out=out,
    )
    return Election(out, bool(found[0]), int(found[1]))


def unified(entries: Entries) -> Tensor:
    """EMR's unified update, ``[d_out, d_in]`` float32."""
    out = _empty(entries.shape, dtype=torch.float32)
    _run(entries, "unify", out=out, sums=_zeros(entries.tasks, 2, dtype=torch.float64))
    return out


def unified_sums(entries: Entries) -> Tensor:
    """The sums of magnitudes of each task's own update, and of the unified one where their signs agree: ``[K, 2]``
    float64.
    """
    found = _zeros(entries.tasks, 2, dtype=torch.float64)
    _run(entries, "unify", sums=found)
    return found


def masked(entries: Entries, unified: Tensor, scale: float) -> Tensor:
    """``scale * unified`` where the one task of ``entries`` has its sign, else zero; ``[d_out, d_in]`` float32."""
    if entries.tasks != 1:
        raise ValueError(f"entries: expected one task, found {entries.tasks}")
    if unified.shape != entries.shape or unified.dtype != torch.float32 or not unified.is_contiguous():
        raise ValueError(
            f"unified: expected a contiguous float32 {list(entries.shape)}, found {unified.dtype} {list(unified.shape)}"
        )
    out = _empty(entries.shape, dtype=torch.float32)
    _run(entries, "mask", unified=unified, scale=scale, out=out)
    return out


def drawn(rows: int, columns: int, key: int, threshold: int) -> Tensor:
    """Which entries a generator keeps, ``[rows, columns]`` bool; see :class:`Dropping`."""
    kept = _empty(rows, columns, dtype=torch.bool)
    _checked(_library().nsc_cpu_draw(key, threshold, rows, columns, kept.data_ptr()))
    return kept


def _check_one_each(entries: Entries, name: str, values: Sequence[Any]) -> None:
    if len(values) != entries.tasks:
        raise ValueError(f"{name}: expected {entries.tasks} numbers, one for each task, found {len(values)}")


def _library() -> ctypes.CDLL:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    return native.cpu_entries()


def _run(entries: Entries, work: str, **given: Any) -> None:
    held: dict[str, Any] = {"offsets": _tensor(entries.offsets, dtype=torch.int64), "A": entries.A, "B": entries.B}
    if entries.dropping is not None:
        held["keys"] = _tensor(entries.dropping.keys, dtype=torch.int64)
        held["threshold"] = entries.dropping.threshold
        held["multipliers"] = _tensor(entries.dropping.multipliers, dtype=torch.float32)
    if entries.trimming is not None:
        held["least"] = _tensor(entries.trimming.least, dtype=torch.float32)
        held["last"] = _tensor(entries.trimming.last, dtype=torch.int64)
        held["trim_first"] = entries.trimming.first
    held |= given
    rows, columns = entries.shape
    call = _Call(rows=rows, columns=columns, tasks=entries.tasks, first_row=entries.first_row, work=_WORKS.index(work))
    for name, value in held.items():
        setattr(call, name, value.data_ptr() if isinstance(value, Tensor) else value)
    _checked(_library().nsc_cpu_entries(ctypes.byref(call)))


def _checked(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())

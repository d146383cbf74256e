"""Rows of a report as lines that are read, and how far to trust them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .ceilings import of_rows
from .costs import Ceilings, roofline

Row = dict[str, Any]
NOISY = 0.1  # of the median, between the 20th and the 80th percentile


class Key(NamedTuple):
    """What a measurement is of; two reports are compared by it."""

    set: str
    dtype: str
    threads: int
    how: str
    cache: str
    name: str
    d_in: int
    d_out: int
    K: int
    r: int
    T: int
    direction: str
    contender: str


def key_of(row: Row) -> Key:
    return Key(*(row[field] for field in Key._fields))


def is_timed(row: Row) -> bool:
    return "us_p50" in row


def spread(row: Row) -> float:
    return (row["us_p80"] - row["us_p20"]) / row["us_p50"]


def is_noisy(row: Row) -> bool:
    return spread(row) > NOISY


def share(row: Row, ceilings: Ceilings | None) -> float | None:
    """Of the roofline: the least time that bytes and operations take on this machine, over the time taken; None where
    one of them is not known, as of a merge's step.
    """
    if ceilings is None or "least_bytes" not in row:
        return None
    return 1e6 * roofline(row["least_bytes"], row["operations"], ceilings) / row["us_p50"]


def duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def heading(row: Row, rows: Sequence[Row]) -> str:
    """Of the rows that share set, dtype and way of measuring; with the ceilings that were measured."""
    ceilings = of_rows(rows, row["dtype"], row["threads"])
    where = next((one["device"] for one in rows if one.get("what") == "environment"), "")
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)} of" if row["threads"] else " on"
    backend = f" by {row['backend']}" if of_several(rows) and row.get("backend") else ""
    text = f"{row['set']}{backend}, {row['dtype']}{threads} {where}: {row['how']} calls, {row['cache']} cache"
    if ceilings:
        text += f"; it moves {ceilings.memory / 1e9:.0f} GB/s and multiplies {ceilings.products / 1e9:.0f} GFLOP/s"
    return text


def of_several(rows: Iterable[Row]) -> bool:
    """Whether figures of several backends of ours are among the rows; those of a merge's step are of none."""
    return len({row["backend"] for row in rows if is_timed(row) and row.get("backend")}) > 1


def configurations(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The timed rows of one table each: of one set, dtype, number of threads and way of measuring, and of trials whose
    ratios are to the same contender. A row has its backend from the file that it was written to.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    firsts: dict[str | None, str] = {}  # of a trial's own; what works in place is beside others that do
    for row in filter(is_timed, rows):
        first = firsts.setdefault(row.get("trial"), row["over"])
        shared = (*(row[name] for name in ("set", "dtype", "threads", "how", "cache")), row.get("backend"), first)
        groups.setdefault(shared, []).append(row)
    yield from groups.values()


def without_statistics(name: str, rows: Iterable[Row]) -> str:
    """The contender's name; with a word on it where it does less than the others."""
    return name if all(row["stats"] for row in rows if row["contender"] == name) else f"{name} (no statistics)"


def title(row: Row) -> str:
    return f"{row['name']} {row['d_in']}->{row['d_out']} {row['K']}x{row['r']} T={row['T']}"


def table(rows: Sequence[Row], about: Sequence[Row]) -> Iterator[str]:
    """Lines of the timed rows: the first contender's time, its spread and share of the roofline, the others' ratios.

    ``about``: rows with the environment and the ceilings.
    """
    for here in configurations(rows):
        yield heading(here[0], [*rows, *about])
        ceilings = of_rows([*rows, *about], here[0]["dtype"], here[0]["threads"])
        names = list(dict.fromkeys(row["contender"] for row in here))
        first = here[0]["over"] if here[0]["over"] in names else names[0]  # of a step that is the floor, which is last
        others = [(name, max(len(name) + 1, 7) + 2) for name in names if name != first]
        columns = "".join(f"{name:>{width}}" for name, width in others)
        yield f"{'':<50}{first:>12} spread roofline{columns}"
        for shape in dict.fromkeys((title(row), row["direction"]) for row in here):
            mine = {row["contender"]: row for row in here if (title(row), row["direction"]) == shape}
            yield line(shape, mine, first, others, ceilings)
        yield ""


def line(
    shape: tuple[str, str], rows: dict[str, Row], first: str, others: Sequence[tuple[str, int]], on: Ceilings | None
) -> str:
    what, direction = shape
    text = f"{what:<41} {direction:<8}"
    if first in rows:
        row = rows[first]
        part = share(row, on)
        text += f"{duration(row['us_p50']):>12} {100 * spread(row):5.0f}% {f'{100 * part:7.0f}%' if part else '':>8}"
    else:
        text += f"{'-':>12} {'':>6} {'':>8}"
    for name, width in others:
        text += f" {ratio(rows.get(name)):>{width - 1}}"
    return text


def ratio(row: Row | None) -> str:
    """``*``: without the statistics; ``~``: noisy."""
    if row is None or not row["over_ours"]:
        return "-"
    return f"{row['over_ours']:.2f}x{'' if row['stats'] else '*'}{'~' if is_noisy(row) else ''}"


def closing(rows: Iterable[Row]) -> Iterator[str]:
    """What a reader must know of the figures above: who was wrong, who was left out, how noisy it was."""
    rows = list(rows)
    found = [row for row in rows if is_timed(row)]
    wrong: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "error" in row:
            wrong.setdefault((row.get("contender", ""), row["error"].split(" is off by")[0]), []).append(row)
    for (name, _), several in wrong.items():
        more = f", and at {len(several) - 1} more" if len(several) > 1 else ""
        yield f"not timed: {name} at {title(several[0])} {several[0]['dtype']}: {several[0]['error']}{more}"
    left_out = dict.fromkeys((row["contender"], row["left_out"]) for row in rows if "left_out" in row)
    for name, why in left_out:
        yield f"left out: {name}: {why}"
    if not found:
        return
    for products in {row["float32_products"] for row in rows if "float32_products" in row} - {"ieee"}:
        yield f"products of float32 were computed in {products}, eager PyTorch's, which errors are held to, as well"
    if any(row.get("served_by") == "reference" for row in rows):
        yield "fused is the reference here, PyTorch's operators: see python -m nsc_kernels.info"
    firsts = " or ".join(sorted({one["over"] for one in found}))
    yield f"x: times the time of {firsts} in the same round, median (above 1: slower)"
    if any(not row["stats"] for row in found):
        yield "*: computes no statistics, which is less work"
    noisy = sum(map(is_noisy, found))
    if noisy:
        yield f"~: noisy: in {noisy} of {len(found)} figures the middle 60 % of samples spread over {NOISY:.0%} or more"
    loads = [row["load"] for row in found if row.get("load") is not None]
    cores = next((row["cores"] for row in rows if "cores" in row), None)
    if cores and loads and max(loads) > cores:
        yield f"the machine was busy: a load of up to {max(loads):.1f} on {cores} cores; measure again on a quiet one"

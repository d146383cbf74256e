"""What a GPU run measured, as tables, and what was to be reached beside what was.

A ratio is the time of a contender over ours, in place for in place: the median over samples taken side by side, so that
above 1 ours is faster. ``base`` given: the share is of the copy bandwidth, on the least bytes a call must move. Whole
layer: TFLOP/s. "cold", "graph" and the rest are those of nsc_kernels/bench/rounds.py, the sets operator_speed.py's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsc_kernels.bench.measuring import read_rows
from nsc_kernels.bench.shapes import Shape
from nsc_kernels.bench.trials import results

from .layers import FAMILIES

Row = dict[str, Any]
DIRECTIONS = ("forward", "backward")
COMPILED = ("compiled", "autotuned")
OVER_COMPILED, OVER_LOOP, OVER_LATENCY = 1.3, 0.8, 1.5
SHARE = {"triton": 0.8, "cuda": 0.9}


def print_ceilings(folder: Path) -> float | None:
    """Prints the environment; returns the copy bandwidth in TB/s."""
    rows = environment(folder)
    facts = rows.pop("environment", {})
    names = ("device", "arch", "torch", "triton", "nvidia_smi")
    print("  ".join(f"{name} {facts[name]}" for name in names if facts.get(name)))
    for what, row in rows.items():
        print(f"  {what:<14} {row['p50']:10.3f} {row['unit']}")
    clocks = [row["sm_mhz"] for row in read_rows(folder / "clocks.jsonl")]
    if clocks:
        print(f"  clocks of the processors: {min(clocks):.0f} to {max(clocks):.0f} MHz in {len(clocks)} samples")
    return rows["copy"]["p50"] if "copy" in rows else None


def environment(folder: Path) -> dict[str, Row]:
    return {row["what"]: row for row in read_rows(folder / "environment.jsonl")}


def say_if_dry(rows: list[Row]) -> None:
    if any(row["dry_run"] for row in rows):
        print("a dry run: no figure is a measurement")


def print_failures(rows: list[Row]) -> None:
    """Contenders that could not be measured, and trials that did not end well."""
    for row in rows:
        if "error" in row or "why" in row:
            print(f"{row['trial']} {row.get('contender', '')}: {row.get('error', row.get('why'))}")


class Key(NamedTuple):
    """Of a measurement."""

    backend: str
    shape: Shape
    of: str
    contender: str
    how: str
    cache: str
    direction: str


def label(shape: Shape) -> str:
    return f"{shape.name}, T={shape.T} {shape.d_in}->{shape.d_out} K={shape.K} R={shape.R}"


def shape_of(row: Row) -> Shape:
    return Shape(*(row[name] for name in Shape._fields))


def print_speed(folder: Path, copy: float | None) -> None:
    rows = results(folder / "bench.jsonl")
    say_if_dry(rows)
    found: dict[Key, Row] = {}
    for row in rows:
        if "us_p50" in row:
            how = (row["how"], row["cache"], row["direction"])
            found[Key(row["backend"], shape_of(row), row["set"], row["contender"], *how)] = row
    for table in dict.fromkeys((key.backend, key.of, key.shape) for key in found):
        print_table(table, found, copy)
    latency = environment(folder).get("graph_node", {}).get("p50")
    for backend, shape in dict.fromkeys((key.backend, key.shape) for key in found):
        print(f"\n{backend}, {label(shape)}: graph, cold")
        mine = {key: row for key, row in found.items() if key[:2] == (backend, shape) and key[4:6] == ("graph", "cold")}
        for direction in DIRECTIONS:
            here = {key: row for key, row in mine.items() if key.direction == direction}
            for line in [*best(here), *verdicts(backend, shape, here, copy, latency)]:
                print(f"  {direction:<8} {line}")
    print_failures(rows)


def print_table(table: tuple[str, str, Shape], found: dict[Key, Row], copy: float | None) -> None:
    backend, of, shape = table
    rows = {key: row for key, row in found.items() if (key.backend, key.of, key.shape) == table}
    hows = list(dict.fromkeys((key.how, key.cache, key.direction) for key in rows))
    clock = statistics.median([row["sm_mhz"] for row in rows.values() if row["sm_mhz"]] or [0])
    print(f"\n{backend}, {of}: {label(shape)}" + (f", {clock:.0f} MHz" if clock else ""))
    print(f"{'microseconds, rate, times ours':<30}" + "".join(f"{' '.join(how):>26}" for how in hows))
    for contender in dict.fromkeys(key.contender for key in rows):
        cells = []
        for how in hows:
            row = rows.get(Key(backend, shape, of, contender, *how))
            cells.append("-" if row is None else cell(row, of, copy))
        print(f"  {contender:<28}" + "".join(f"{text:>26}" for text in cells))


def cell(row: Row, of: str, copy: float | None) -> str:
    if of.startswith("whole"):
        rate = f"{row['tflop_per_s']:.0f} T"
    else:
        rate = f"{100 * row['tb_per_s'] / copy:.0f} %" if copy else ""
    over = f"{row['over_ours']:.2f}x" if row["over_ours"] else ""
    return f"{row['us_p50']:.1f} {rate:>6} {over:>7}"


def best(here: dict[Key, Row]) -> Iterator[str]:
    """Ours against the strongest that computes the same: given base, the same in place, and the whole layer."""
    same = {key: row for key, row in here.items() if row["stats"] and row["over_ours"] and "fused" not in key.contender}
    groups: dict[str, dict[Key, Row]] = {"base given": {}, "base given, in place": {}, "whole layer": {}}
    for key, row in same.items():
        inplace = "base given, in place" if key.contender.endswith("_inplace") else "base given"
        groups["whole layer" if key.of.startswith("whole") else inplace][key] = row
    for what, group in groups.items():
        if group:
            key = min(group, key=lambda key: group[key]["over_ours"])
            yield f"{what}: {group[key]['over_ours']:.2f}x against the best other, {key.contender}"
    for row in here.values():
        if not row["adapters"] and row["over_ours"]:
            yield f"whole layer: {1 / row['over_ours']:.2f} times the bare layer"


def verdicts(
    backend: str, shape: Shape, here: dict[Key, Row], copy: float | None, latency: float | None
) -> Iterator[str]:
    """What was to be reached with base given."""
    over = {key.contender: row["over_ours"] for key, row in here.items() if not key.of.startswith("whole")}
    ours = next((row for key, row in here.items() if (key.of, key.contender) == ("operator", "fused")), None)
    if shape in FAMILIES:
        compiled = [over[name] for name in COMPILED if over.get(name)]
        yield verdict("times faster than compiled", compiled and min(compiled), OVER_COMPILED)
    yield verdict("times faster than PEFT's loop", over.get("loop"), OVER_LOOP * shape.K)
    if shape.T >= 8192 and min(shape.d_in, shape.d_out) >= 4096 and shape.R <= 128:
        yield verdict("of the copy bandwidth", ours and copy and ours["tb_per_s"] / copy, SHARE[backend])
    if shape.T <= 1536:
        floor = ours and copy and latency and latency + ours["least_bytes"] / copy / 1e6
        times = floor and ours and ours["us_p50"] / floor
        yield verdict("times a launch and the least bytes", times, OVER_LATENCY, at_most=True)


def verdict(what: str, value: Any, bar: float, at_most: bool = False) -> str:
    bound = f"to be {'at most' if at_most else 'at least'} {bar:.2f}"
    if not value:
        return f"{what}: {bound}: not measured"
    reached = value <= bar if at_most else value >= bar
    return f"{what}: {value:.2f}, {bound}: {'reached' if reached else 'missed'}"

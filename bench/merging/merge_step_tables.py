"""What merge_step_gpu.py measured, as a table, and what was to be reached beside what was."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nsc_kernels.bench.trials import results

from ..hardware.speed_tables import print_failures, say_if_dry, verdict

Row = dict[str, Any]


class Aim(NamedTuple):
    """Of a merge: seconds for 500 steps, and how many times faster than PEFT's loop."""

    seconds: float
    over_peft: float | None


AIMS = {"LLaMA-3-8B": Aim(90, 3.0), "LLaVA-1.5-7B": Aim(120, None)}
MOST_TO_FLOOR, MOST_GB = 1.15, 6.0


def print_merge_step(path: Path) -> None:
    """Medians over rounds; a ratio is the median over rounds of the ratio within one."""
    rows = results(path)
    say_if_dry(rows)
    print_failures(rows)
    for trial in dict.fromkeys(row["trial"] for row in rows if "ms" in row):
        by_name: dict[str, dict[int, Row]] = {}
        for row in rows:
            if row["trial"] == trial and "ms" in row:
                by_name.setdefault(row["contender"], {})[row["round"]] = row
        print(f"\n{trial}: milliseconds a step, GB over the weights, first objective")
        medians = {name: statistics.median(row["ms"] for row in rounds.values()) for name, rounds in by_name.items()}
        for name, ms in sorted(medians.items(), key=lambda item: item[1]):
            rounds = by_name[name]
            peak = max(row["peak_bytes"] for row in rounds.values()) / 1e9
            print(f"  {name:<28}{ms:9.2f} {peak:7.2f} {next(iter(rounds.values()))['objective']:9.5f}")
            if "/" in name:
                for line in merge_verdicts(by_name, name, ms, peak):
                    print(f"      {line}")


def merge_verdicts(by_name: dict[str, dict[int, Row]], name: str, ms: float, peak: float) -> Iterable[str]:
    first = next(iter(by_name[name].values()))
    aim = AIMS[first["model"]]

    def over(other: str) -> float | None:
        rounds = by_name[name].keys() & by_name.get(other, {}).keys()
        return statistics.median(by_name[name][r]["ms"] / by_name[other][r]["ms"] for r in rounds) if rounds else None

    yield verdict("seconds for 500 steps", 0.5 * ms, aim.seconds, at_most=True)
    yield verdict("GB over the weights", peak, MOST_GB, at_most=True)
    floor = "floor_together" if first["name"].endswith("_together") else "floor"
    yield verdict("times the floor", over(floor), MOST_TO_FLOOR, at_most=True)
    peft = over("peft")
    if aim.over_peft is not None:
        yield verdict("times faster than peft", peft and 1 / peft, aim.over_peft)
    concatenated = over("concatenated")
    if concatenated:
        yield f"times faster than concatenated: {1 / concatenated:.2f}"

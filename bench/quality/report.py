"""Tables and acceptance checks from what run.py and ratios.py measured.

    python -m bench.quality.report                          Markdown of everything in bench/results/quality
    python -m bench.quality.report --suite vit --json       the same as JSON

Tables give the normalised score per task and its average, mean over the seeds, ± the standard deviation over the seeds
(n - 1). A check outside its range is a finding, not an error: the exit code is 0 either way, 1 if there is nothing to
report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .acceptance_ranges import CHECKED, vit_checks
from .records import RESULTS, SUITES, read_records
from .rows import GROUPS, ROWS


def sets_of_tasks(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The sets of tasks that were merged, largest first."""
    return sorted({tuple(record["tasks"]) for record in records}, key=len, reverse=True)


def table(records: Sequence[dict[str, Any]], tasks: tuple[str, ...]) -> list[str]:
    """Markdown lines: one row per method, in the order of :data:`rows.ROWS`."""
    lines = [f"| method | {' | '.join(tasks)} | average | scale | n |", "|---" * (len(tasks) + 4) + "|"]
    for group in GROUPS:
        body = []
        for row in (row for row in ROWS if row.group == group):
            runs = [r for r in records if r["row"] == row.name and tuple(r["tasks"]) == tasks]
            if not runs:
                continue
            cells = [f"{statistics.mean(run['normalised'][task] for run in runs):.1f}" for task in tasks]
            scales = sorted({run["tuned"]["value"] for run in runs if run["tuned"]})
            shown = " ".join(f"{scale:g}" for scale in scales)
            average = mean_and_spread([run["average"] for run in runs])
            body.append(f"| {row.name} | {' | '.join(cells)} | **{average}** | {shown} | {len(runs)} |")
        if body:
            lines += [f"| *{group}* |{' |' * (len(tasks) + 3)}", *body]
    return lines


def finetuned_line(records: Sequence[dict[str, Any]], tasks: tuple[str, ...]) -> str:
    """What 100 % is, in each task's own unit."""
    runs = [r for r in records if r["row"] == "finetuned" and tuple(r["tasks"]) == tasks]
    means = {task: statistics.mean(run["metrics"][task] for run in runs) for task in tasks} if runs else {}
    return "100 % is " + ", ".join(f"{task} {value:.4g}" for task, value in means.items()) + "."


def training_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Ratio before and after training, and its rank correlation with the validation loss, per task."""
    lines = [
        "| task | labels | rho, all modules | rho, target | ratio, all modules | ratio, target | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for labels in ("true", "permuted"):
        for task in dict.fromkeys(record["task"] for record in records):
            runs = [r for r in records if r["task"] == task and r["labels"] == labels]
            if not runs:
                continue
            rho = {name: " ".join(_number(run["rho"][name], 2) for run in runs) for name in ("all", "target")}
            path = {
                name: " -> ".join(f"{statistics.mean(run['steps'][end][name] for run in runs):.3f}" for end in (0, -1))
                for name in ("all", "target")
            }
            cells = (rho["all"], rho["target"], path["all"], path["target"])
            lines.append(f"| {task} | {labels} | {' | '.join(cells)} | {len(runs)} |")
    return lines


def sample_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Rank correlation of ratio and quality over samples, per task and model."""
    lines = ["| task | model | rho, all modules | rho, target | n |", "|---|---|---|---|---|"]
    for task in dict.fromkeys(record["task"] for record in records):
        for model in dict.fromkeys(record["model"] for record in records):
            runs = [r for r in records if r["task"] == task and r["model"] == model]
            cells = [" ".join(_number(run["rho"][name], 2) for run in runs) for name in ("all", "target")]
            lines.append(f"| {task} | {model} | {' | '.join(cells)} | {len(runs)} |")
    return lines


def gains_table(records: Sequence[dict[str, Any]], tasks: tuple[str, ...]) -> list[str]:
    """What each learnt row adds to the row that it starts from, per seed, in points of the average."""
    by_seed: dict[int, dict[str, float]] = {}
    starts: dict[str, Any] = {}
    for record in records:
        if tuple(record["tasks"]) == tasks:
            by_seed.setdefault(record["seed"], {})[record["row"]] = record["average"]
            starts[record["row"]] = record.get("init") or record["options"].get("init")
    lines = ["| row | start | gain per seed | mean |", "|---|---|---|---|"]
    names: dict[Any, str] = {0.4: "TA@0.4", 1 / len(tasks): "TA@1/K"}
    for row in ROWS:
        start = names.get(starts.get(row.name))
        gains = [
            found[row.name] - found[start]
            for _, found in sorted(by_seed.items())
            if start in found and row.name in found
        ]
        if start and gains:
            shown = " ".join(f"{gain:+.2f}" for gain in gains)
            lines.append(f"| {row.name} | {start} | {shown} | {statistics.mean(gains):+.2f} |")
    return lines


def checks_table(checks: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| | check | found | expected | |", "|---|---|---|---|---|"]
    for check in checks:
        verdict = "inside" if check["inside"] else "**outside**"
        lines.append(f"| {check['group']} | {check['what']} | {check['found']} | {check['expected']} | {verdict} |")
    return lines


def report(folder: Path, suite: str) -> dict[str, Any] | None:
    """Everything known about a suite; None if nothing was measured."""
    records = read_records(folder / f"{suite}.jsonl")
    if not records:
        return None
    training, samples = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        for path in (folder / f"{suite}-training.jsonl", folder / f"{suite}-samples.jsonl")
    )
    found: dict[str, Any] = {"suite": suite, "sections": []}
    for tasks in sets_of_tasks(records):
        found["sections"] += [
            {
                "title": f"{suite}, K = {len(tasks)}",
                "lines": [*table(records, tasks), "", finetuned_line(records, tasks)],
            },
            {
                "title": f"{suite}, K = {len(tasks)}: gain over the start",
                "lines": gains_table(records, tasks),
            },
        ]
    if training:
        found["sections"].append({"title": f"{suite}: ratio along training", "lines": training_table(training)})
    if samples:
        found["sections"].append({"title": f"{suite}: ratio against quality", "lines": sample_table(samples)})
    if suite in CHECKED:
        found["checks"] = vit_checks(records, training, samples)
        found["sections"].append({"title": f"{suite}: acceptance checks", "lines": checks_table(found["checks"])})
    return found


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--suite", choices=SUITES, help="one suite; all that were measured by default")
    parsed.add_argument("--results", type=Path, default=RESULTS)
    parsed.add_argument("--json", action="store_true", help="print JSON")
    given = parsed.parse_args(arguments)
    suites = [given.suite] if given.suite else SUITES
    reports = [found for suite in suites if (found := report(given.results, suite))]
    if not reports:
        print(f"{given.results} holds no results; run.py makes them", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(reports))
        return 0
    for found in reports:
        for section in found["sections"]:
            print(f"\n## {section['title']}\n")
            print("\n".join(section["lines"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of an evaluation for a terminal, for Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_REFERENCE = "finetuned"


def as_text(document: Mapping[str, Any]) -> str:
    """For a terminal: scores of the fine-tuned models, then every row in percent of them."""
    head, absolute, rows = _cells(document)
    metrics = ["", *_metrics(document), *[""] * (len(head) - 1 - len(document["tasks"]))]
    lines = [head, metrics, *absolute, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def laid_out(cells: Sequence[str]) -> str:
        first, rest = (
            cells[0].ljust(widths[0]),
            [cell.rjust(widths[i]) for i, cell in enumerate(cells[1:], 1)],
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    shown = [laid_out(head), laid_out(metrics), rule, *map(laid_out, absolute), rule, *map(laid_out, rows)]
    return "\n".join([*shown, "", *_notes(document)])


def as_markdown(document: Mapping[str, Any]) -> str:
    """As :func:`as_text`, with a second table of every row's own scores."""
    head, absolute, rows = _cells(document)
    tasks = [f"{task} ({metric})" for task, metric in zip(document["tasks"], _metrics(document), strict=True)]
    head = [head[0], *tasks, *head[1 + len(tasks) :]]
    best = _best(document)
    marked = [
        [f"**{cell}**" if (line, column) in best else cell for column, cell in enumerate(row)]
        for line, row in enumerate(rows)
    ]
    own = [
        [
            named(row, document),
            *(_spread([run["metrics"][task] for run in _different(row)], 4) for task in document["tasks"]),
        ]
        for row in document["rows"]
    ]
    parts = [
        "## Percent of the fine-tuned models",
        _markdown(head, [*absolute, *marked]),
        "## Scores",
        _markdown(["method", *tasks], own),
        "\n".join(f"- {note}" for note in _notes(document)),
    ]
    return "\n\n".join(parts) + "\n"


def as_csv(document: Mapping[str, Any]) -> str:
    """One line per row, seed and task: ``row, method, seed, task, metric, value, normalised, loss, stderr``: the
    standard error of the value over the test samples.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("row", "method", "seed", "task", "metric", "value", "normalised", "loss", "stderr"))
    for row in document["rows"]:
        for run in row["runs"]:
            for task, value in run["metrics"].items():
                percent, loss = run["normalised"][task], run["losses"].get(task)
                error = run.get("lm_eval", {}).get(task, {}).get("stderr", run.get("stderr", {}).get(task))
                lines.writerow(
                    (
                        row["row"],
                        run["method"] or run["folder"],
                        run["seed"],
                        task,
                        document["tasks"][task]["metric"],
                        value,
                        percent,
                        loss,
                        error,
                    )
                )
    return text.getvalue()


def label(run: Mapping[str, Any]) -> str:
    """What a run adds to the name of its row: the scale that was chosen for it."""
    return f"{run['tuned']['value']:g}, by {run['tuned']['by']}" if run["tuned"] else ""


def _cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Head, the fine-tuned models' own scores, and the rows."""
    counts = _hit_counts(document)
    hits = [f"Hits@{count}" for count in counts]
    head = ["method", *document["tasks"], "average %", *hits]
    absolute, rows = [], []
    for row in document["rows"]:
        runs = _different(row)
        if any(run["method"] == _REFERENCE for run in runs):
            values = [_spread([run["metrics"][task] for run in runs], 4) for task in document["tasks"]]
            absolute.append([f"{named(row, document)} (score)", *values, "100", *["-"] * len(hits)])
            continue
        values = [_spread([run["normalised"][task] for run in runs], 1) for task in document["tasks"]]
        joint = [
            _spread([100 * run["hits"]["all"][count] for run in runs if run["hits"]], 1) for count in counts
        ]
        rows.append([_with_scale(row, document), *values, _average(runs, document), *joint])
    return head, absolute, rows


def _different(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of a row that were measured: what depends on no seed was once, and has no deviation."""
    return list({run.get("fingerprint", number): run for number, run in enumerate(row["runs"])}.values())


def _average(runs: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> str:
    """With the standard error over the test samples where there is no deviation over seeds."""
    shown = _spread([run["average"] for run in runs], 2)
    error = runs[0].get("average_stderr") if len(document["seeds"]) == 1 else None
    return shown if error is None or shown == "-" else f"{shown} ± {error:.2f}"


def named(row: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """What a row is called; with how many seeds it is of where it failed in some."""
    there, asked = len(row["runs"]), len(document["seeds"])
    return str(row["row"]) if there == asked else f"{row['row']} ({there} of {asked} seeds)"


def _with_scale(row: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    chosen = list(dict.fromkeys(label(run) for run in row["runs"]))
    if chosen == [""]:
        return named(row, document)
    if len(chosen) > 1:
        scales = [run["tuned"]["value"] for run in row["runs"]]
        chosen = [f"{min(scales):g} to {max(scales):g}, by {row['runs'][0]['tuned']['by']}"]
    return f"{named(row, document)} (scale {chosen[0]})"


def _hit_counts(document: Mapping[str, Any]) -> list[str]:
    runs = [run for row in document["rows"] for run in row["runs"]]
    return next((list(run["hits"]["all"]) for run in runs if run["hits"]), [])


def _metrics(document: Mapping[str, Any]) -> list[str]:
    return [
        f"{task['metric']} {'↓' if task['lower_is_better'] else '↑'}" for task in document["tasks"].values()
    ]


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and sample standard deviation over runs."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _best(document: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Numbers of row and column of the best of every column of percentages, and of those that are as good; rows of
    fewer seeds than others stand aside.
    """
    found = set()
    rows = [row for row in document["rows"] if all(run["method"] != _REFERENCE for run in row["runs"])]
    for column, task in enumerate([*document["tasks"], None], 1):
        means = {}
        for number, row in enumerate(rows):
            values = [run["average"] if task is None else run["normalised"][task] for run in row["runs"]]
            if len(values) == len(document["seeds"]) and None not in values:
                means[number] = statistics.fmean(values)
        found |= {(number, column) for number, mean in means.items() if mean == max(means.values())}
    return found


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [
        "percent of the task's own fine-tuned model: score / fine-tuned, or fine-tuned / score where lower is better; "
        "average over tasks"
    ]
    count = len(document["seeds"])
    if count > 1:
        notes.append(f"mean ± standard deviation over {count} seeds; what has none depends on no seed")
    elif any(run.get("average_stderr") is not None for row in document["rows"] for run in row["runs"]):
        notes.append(
            "average ± standard error over test samples, of a row by itself; all rows are of the same samples, so that "
            "a gap between two may be surer"
        )
    if _hit_counts(document):
        notes.append(f"Hits@k in %: over the classes of all tasks together, by {document['joint']}")
    return notes


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

"""Time and memory of writing a merged model or adapter, from files to files, as the base grows and as adapters do.

    python -m bench.merging.export_costs --out bench/results/cpu       a table, export.jsonl and export.png
    python -m bench.merging.export_costs --quick                       minutes less: small bases, once each

Random bfloat16 Llamas of 0.13, 0.85 and 3 billion parameters in files of at most 500 MB, made in a temporary folder,
and random rank-16 adapters of q and v or of all linears but the head. Six of them where nothing else is said. Every
contender sums the adapters with coefficients of 1, runs in a process of its own, begins with files and ends with files;
its time runs from after its imports. All run once in each round, one after another. "peak" is the most memory of the
process that no file backs (RssAnon), looked at every 10 ms, with 0.3 GB for torch and transformers in it: pages of a
mapped file can be dropped at any time.

Contenders:
    export    the base's weights left in their files: nsc_merge.load_result(..., numbers=False).save(...), as
              `nsc-merge export` does. It reads the base once more, for its SHA-256
    loaded    the base loaded by transformers; nsc_merge.merge(...).save(...)
    peft      the base loaded by transformers, the adapters by PEFT; merge_and_unload of all of them, save_pretrained
    mergekit  its method task_arithmetic on "base+adapter", which writes a whole model for each adapter first. Where it
              is not installed it is left out; --mergekit names the Python that has it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bench.merging.cost_rows import environment, write_rows
from bench.merging.export_contenders import RANK, WORK, make_adapters, make_base, measure, quiet
from nsc_merge.utils.plot_style import COLOURS, pyplot_in_style

TASKS = 6
# Layers, width, width of the MLP, words.
SIZES = {"0.13": (12, 768, 2048, 32000), "0.85": (16, 2048, 5632, 32000), "3": (28, 3072, 8192, 32000)}
QUICK_SIZES = {"0.003": (2, 256, 512, 4000), "0.01": (4, 384, 1024, 4000)}
# mergekit writes a model for each adapter.
MERGEKIT_MOST = 1e9


@dataclass(frozen=True)
class Case:
    """What is exported.

    Attributes:
        size: a key of the sizes, billions of parameters.
        tasks: how many adapters.
        modules: which linears these touch: ``"all"`` or ``"qv"``.
        format: ``"model"`` or ``"lora"``.
    """

    size: str
    tasks: int = TASKS
    modules: str = "all"
    format: str = "model"


def cases(sizes: Sequence[str]) -> list[Case]:
    middle = sizes[min(1, len(sizes) - 1)]
    grown = [Case(size, format=form) for size in sizes for form in ("model", "lora")]
    return [*grown, *(Case(middle, tasks=tasks) for tasks in (2, 12)), Case(middle, modules="qv")]


def child(python: str, arguments: Sequence[str]) -> dict[str, float] | None:
    """A process of this file and the most memory that it took; None if the contender is not installed."""
    command = [python, "-m", "bench.merging.export_costs", *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors)
        status, most = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            # Of a process that has just ended it says nothing.
            anonymous = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            most = max([most, *(1024 * int(line.split()[1]) for line in anonymous)])
            time.sleep(0.01)
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            text = errors.read()
            if "No module named 'mergekit'" in text:
                return None
            raise RuntimeError(f"{' '.join(command)}: {text[-2000:]}")
        return {**json.loads(said.read().splitlines()[-1]), "peak_bytes": most}


def rounds(base: Path, place: Path, case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every contender and round of one case."""
    adapters = place / "adapters"
    make_adapters(base, adapters, case.tasks, case.modules)
    contenders = [name for name in options.contenders if name != "mergekit" or case.format == "model"]
    if float(case.size) * 1e9 > MERGEKIT_MOST or case.tasks != TASKS or case.modules != "all":
        contenders = [name for name in contenders if name != "mergekit"]
    for number in range(options.rounds):
        for name in contenders:
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                python = options.mergekit if name == "mergekit" else sys.executable
                what = [name, str(base), str(adapters), str(Path(scratch) / "out"), case.format]
                found = child(python, ["--threads", str(options.threads), "--measure", *what])
            if found is not None:
                yield {
                    "op": "export",
                    "contender": name,
                    "billions": float(case.size),
                    "tasks": case.tasks,
                    "modules": case.modules,
                    "format": case.format,
                    "round": number,
                    **found,
                    "load": os.getloadavg()[0],
                }
    shutil.rmtree(adapters)


def medians(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for all rounds of a case and a contender."""
    keys = ("billions", "tasks", "modules", "format", "contender")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, group, strict=True)),
            **{
                key: statistics.median(row[key] for row in held)
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            },
        }
        for group, held in groups.items()
    ]


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['billions']:>6} B {row['tasks']:>3} {row['modules']:>4} {row['format']:>6} {row['contender']:>9} "
        f"{row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} s {row['peak_bytes'] / 1e9:7.2f} GB"
    )


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Growth with the base and with the number of adapters."""
    middle = next((row["billions"] for row in rows if row["tasks"] != TASKS), None)
    with pyplot_in_style() as pyplot:
        figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
        panels = (
            (axes[0], "billions", "parameters (billions)", "seconds", "time (s)", 1.0),
            (axes[1], "billions", "parameters (billions)", "peak_bytes", "peak memory (GB)", 1e9),
            (axes[2], "tasks", f"adapters ({middle} B)", "seconds", "time (s)", 1.0),
        )
        for axis, x, x_label, y, y_label, unit in panels:
            for colour, name in zip(COLOURS, WORK, strict=False):
                for form, style in (("model", "o-"), ("lora", "s:")):
                    fixed = ("tasks", TASKS) if x == "billions" else ("billions", middle)
                    wanted = {"contender": name, "format": form, "modules": "all", fixed[0]: fixed[1]}
                    held = [row for row in rows if wanted.items() <= row.items()]
                    held.sort(key=lambda row: row[x])
                    if len(held) > (x == "tasks"):
                        values = [row[y] / unit for row in held]
                        axis.plot([row[x] for row in held], values, style, color=colour, label=f"{name}, {form}")
            axis.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes[0].legend(fontsize=8, frameon=False)
        figure.suptitle("Writing a merge of rank-16 adapters of all linears", fontsize=11)
        figure.savefig(file)
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for export.jsonl and export.png")
    parser.add_argument("--quick", action="store_true", help="small bases, one round")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="B", help="of the bases")
    parser.add_argument("--contenders", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--mergekit", default=sys.executable, metavar="PYTHON", help="that has mergekit installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", type=Path, help="where the bases are made; 25 GB (default: the temporary folder)")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        contender, base, adapters, out, form = arguments.measure
        print(json.dumps(measure(contender, Path(base), Path(adapters), Path(out), form)))
        return 0
    quiet()
    sizes = QUICK_SIZES if arguments.quick else {name: SIZES[name] for name in arguments.sizes}
    arguments.rounds = 1 if arguments.quick else arguments.rounds
    conditions = environment(threads=arguments.threads, rank=RANK, dtype="bfloat16")
    rows: list[dict[str, Any]] = []
    print(f"{'base':>8} {'K':>3} {'of':>4} {'':>6} {'':>9} {'wall':>10} {'cpu':>10} {'peak':>10}")
    for size, shape in sizes.items():
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as place:
            base = Path(place) / "base"
            make_base(base, *shape)
            for case in (case for case in cases(list(sizes)) if case.size == size):
                found = list(rounds(base, Path(place), case, arguments))
                rows += found
                print(*map(line, medians(found)), sep="\n", flush=True)
                if arguments.out:
                    write_rows(arguments.out / "export.jsonl", [conditions, *rows])
    if arguments.out:
        draw(medians(rows), arguments.out / "export.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

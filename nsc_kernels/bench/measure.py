"""Measures contenders on layers: the commands ``operator`` and ``linear``.

    python -m nsc_kernels.bench --quick --plot                   under a minute, a table and a picture
    python -m nsc_kernels.bench --shapes llama3-8b.q,llama3-8b.mlp,vit-b --adapters 6x16 --tokens 256,1536 --dtype bf16
    python -m nsc_kernels.bench --contender my_kernel.py --contenders fused,mine --shapes 4096x14336
    python -m nsc_kernels.bench linear --shapes llava-7b --device cuda --out report.jsonl
    python -m nsc_kernels.bench list                             who and what there is

``operator``: the adapters, the layer's own output being given; ``linear``: the frozen layer and its adapters. Everyone
is first held to float64 at the very size: one that is wrong is named and not timed. Each shape is measured in a process
of its own, which a crash costs and nothing else. Run again with the same --out it goes on where it stopped, and
measures again what a changed contender, or other samples, would make other rows.
docs/benchmarking.md has the rules.

Exits with 0 if all was measured, with 1 if a contender was wrong or a shape failed, with 2 for arguments that cannot
be, with 3 if shapes are left to another run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import dispatch
from . import ceilings, environment, report, tables
from .measuring import check_device, device, read_rows, slug, synchronize
from .problem import DTYPES
from .registry import LINEAR, OPERATOR, chosen, load, registered
from .rounds import EAGER, GRAPH, WARM, Cell, run_cell, served_by
from .shapes import grid
from .timing import keep_freed_memory
from .trials import Trial, supervise

QUICK_SHAPES, SHAPES = "vit-b.q,llama3-8b.kv", "vit-b,llama3-8b"
TRIAL_LIMIT = 900.0  # seconds: a contender may compile
MACHINE = "machine"


def comma(text: str) -> list[str]:
    return [part for part in (piece.strip() for piece in text.split(",")) if part]


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in comma(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, such as 32,512, found {text!r}") from None


def parser_of(of: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python -m nsc_kernels.bench {of}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what, who, how, out = (parser.add_argument_group(name) for name in ("what", "who", "how", "output"))
    what.add_argument("--shapes", type=comma, metavar="NAMES", help=f"layers (default {SHAPES}); list says which")
    what.add_argument("--adapters", type=comma, metavar="KxR", help="how many of which rank (default 6x16)")
    what.add_argument("--tokens", type=numbers, metavar="T", help="(default 256,1536 on a GPU, 32,512 on a CPU)")
    what.add_argument("--dtype", type=comma, metavar="D", help="fp32, bf16, fp16 (default bf16 on a GPU, else fp32)")
    who.add_argument("--contenders", type=comma, default=["default"], metavar="NAMES", help="or groups (see list)")
    who.add_argument("--contender", action="append", default=[], metavar="FILE.py|MODULE[:NAME]", help="load your own")
    how.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    how.add_argument("--threads", type=numbers, metavar="N", help="of a CPU, several are all measured (default 1)")
    how.add_argument("--cache", type=comma, default=["cold"], metavar="C", help="cold, warm (default cold)")
    how.add_argument("--calls", type=comma, metavar="C", help="of a GPU: graph, eager (default both)")
    how.add_argument("--samples", type=int, default=15, help="rounds that all take part in (default %(default)s)")
    how.add_argument("--sample-ms", type=float, default=20.0, help="least time of a CPU's sample (default %(default)s)")
    how.add_argument("--quick", action="store_true", help="two layers, few samples, nothing that compiles for long")
    how.add_argument("--seconds", type=float, default=36000, help="start no new shape after this long")
    how.add_argument("--limit", type=float, help="seconds that one shape may take (default 900)")
    how.add_argument("--again", action="store_true", help="repeat shapes that failed before")
    out.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the report; goes on with one that is there")
    out.add_argument("--json", action="store_true", help="the report's rows on standard output in place of tables")
    plots = Path("bench-plots")
    out.add_argument("--plot", type=Path, nargs="?", const=plots, metavar="FOLDER", help=f"pictures (default {plots})")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(of=of, dry_run=False, workers=1)
    return parser


def completed(arguments: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on the device.

    Raises:
        ValueError: for what cannot be.
    """
    a = arguments
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(a.device)
    gpu = a.device == "cuda"
    a.shapes = a.shapes or comma(QUICK_SHAPES if a.quick else SHAPES)
    a.tokens = a.tokens or ([256, 1536] if gpu else [32, 256] if a.quick else [32, 512])
    a.adapters = a.adapters or ["6x16"]
    a.dtype = a.dtype or (["bf16"] if gpu else ["fp32"])
    a.threads = [0] if gpu else a.threads or [1]
    a.calls = a.calls or (["graph", "eager"] if gpu else ["eager"])
    if a.quick:
        a.samples, a.sample_ms = min(a.samples, 7), min(a.sample_ms, 8.0)
    for name, allowed in (("dtype", [*DTYPES]), ("cache", ["cold", "warm"]), ("calls", ["graph", "eager"])):
        for value in getattr(a, name):
            if value not in allowed:
                raise ValueError(f"{name}: expected some of {', '.join(allowed)}, found {value!r}")
    if not gpu and "graph" in a.calls:
        raise ValueError("calls: a CPU has no graphs; leave --calls out")
    if not hows(a):
        raise ValueError("cache: on a GPU warm is of graphs; give --calls graph, or --cache cold")
    for name, number in ("threads", 1 if gpu else min(a.threads)), ("samples", a.samples):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, found {number}")
    if not 0 < a.sample_ms < math.inf:
        raise ValueError(f"sample-ms: expected milliseconds above 0, found {a.sample_ms:g}")
    if not a.seconds >= 0:
        raise ValueError(f"seconds: expected seconds of at least 0, found {a.seconds:g}")
    if a.limit is not None and not 0 < a.limit < math.inf:
        raise ValueError(f"limit: expected seconds above 0, found {a.limit:g}")
    grid(a.shapes, a.tokens, a.adapters)
    before = registered(a.of)
    for text in a.contender:
        load(text)
    if a.contender and registered(a.of) == before:
        other = LINEAR if a.of == OPERATOR else OPERATOR
        raise ValueError(f"contender: {', '.join(a.contender)} registers none of {a.of}; see the command {other}")
    if not chosen(a.of, a.contenders, a.device, a.quick):
        raise ValueError(f"contenders: none of {a.of} is in {', '.join(a.contenders)}")
    report.check_places(a.out, a.plot)
    check_machine(a.out, torch.device(a.device))
    return a


def check_machine(out: Path | None, on: torch.device) -> None:
    """Refuse to go on with a report of another machine or torch, under whose name this one's figures would stand."""
    rows = read_rows(out) if out is not None else []
    if out is not None and not rows and out.stat().st_size:
        raise ValueError(f"out: {out} is no report, and would be written to; give another file")
    found = [row for row in rows if row.get("what") == "environment"]
    here = environment.facts(on) if found else {}
    for row in found:
        for name in report.ONE_MACHINE:
            if row.get(name, here[name]) != here[name]:
                raise ValueError(
                    f"out: {out} was measured with {name} {row.get(name)}, here it is {here[name]}; give another file, "
                    "and compare the two by python -m nsc_kernels.bench compare"
                )


def hows(arguments: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """On a GPU warm is of graphs alone: from Python a call waits for its launch, whatever the cache."""
    found = []
    for calls in arguments.calls:
        for cache in arguments.cache:
            if cache == "cold":
                found.append(GRAPH if calls == "graph" else EAGER)
            elif calls == "graph" or arguments.device == "cpu":
                found.append(WARM if calls == "graph" else ("eager", "warm"))
    return tuple(found)


def trials(arguments: argparse.Namespace) -> dict[str, Trial]:
    """The machine first, then every shape."""
    a = arguments
    group = "gpu" if a.device == "cuda" else "cpu"
    # By what it measures: a report may be gone on with in other dtypes.
    machine = f"{MACHINE} {','.join(a.dtype)} {','.join(map(str, a.threads))} threads"
    found = {machine: Trial(group, None, TRIAL_LIMIT)}
    for dtype in a.dtype:
        for threads in a.threads:
            for shape in grid(a.shapes, a.tokens, a.adapters):
                names, ms = tuple(a.contenders), 1e-3 * a.sample_ms
                cell = Cell(a.of, shape, dtype, names, hows(a), a.samples, ms, threads, quick=a.quick)
                clocks = a.out.with_suffix(".clocks.jsonl") if group == "gpu" else None
                key = f"{a.of} {shape} {dtype}" + (f" {threads} threads" if threads else "")
                key += f" {','.join(names)} {','.join('-'.join(how) for how in cell.hows)}"
                found[key] = Trial(group, cell._replace(clocks=clocks), TRIAL_LIMIT, settings(a, cell))
    return found


def settings(arguments: argparse.Namespace, cell: Cell) -> str:
    """What a shape's rows depend on besides its name: how it is sampled, which backend serves it, contenders given."""
    a = arguments
    text = f"{a.samples} samples of {a.sample_ms:g} ms{', quick' * a.quick}"
    if dispatch.chosen() != dispatch.AUTO:
        text += f", NSC_BACKEND={dispatch.chosen()}"
    else:  # by what is built, and shown correct, by now
        text += f", served by {served_by(torch.device(a.device), DTYPES[cell.dtype], cell.shape)}"
    for given in a.contender:
        where = given.partition(":")[0]
        source = Path(where if where.endswith(".py") else str(sys.modules[where].__file__))
        text += f", {given} {hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source.is_file() else ''}"
    return text


class Runner:
    """What a worker does with a trial."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    def meet(self, dry_run: bool) -> torch.device:
        keep_freed_memory()
        return device(dry_run=self.arguments.device == "cpu")

    def run(self, cell: Cell | None, on: torch.device) -> Iterator[dict[str, Any]]:
        if cell is not None:
            yield from run_cell(cell, on)
            return
        yield environment.facts(on)
        for threads in self.arguments.threads:
            dtypes = dict.fromkeys([*self.arguments.dtype, *(["fp32"] if on.type == "cpu" else [])])
            yield from ceilings.measured(on, list(dtypes), threads)
        if on.type == "cpu" and (row := ceilings.multiply_add()):
            yield row
        synchronize(on)


class Talker:
    """Says what a trial found when it ends: on a terminal also how far it all is."""

    def __init__(self, count: int, as_json: bool):
        self.count, self.as_json = count, as_json
        self.told: set[str] = set()
        self.machine: list[dict[str, Any]] = []
        self.headed: list[str] = []

    def say(self, key: str, last: dict[str, Any], seconds: float, rows: list[dict[str, Any]]) -> None:
        self.told.add(key)
        if key.startswith(MACHINE):
            self.machine = rows
        if last["ended"] != "done":
            print(f"{key}: {last['ended']}: {last.get('why', '')}", file=sys.stderr, flush=True)
        self.show(rows)
        if sys.stderr.isatty():
            print(f"\r\033[K{len(self.told)}/{self.count} measured", end="\r", file=sys.stderr, flush=True)

    def show(self, rows: list[dict[str, Any]]) -> None:
        if self.as_json:
            print("".join(json.dumps(row) + "\n" for row in rows), end="", flush=True)
        else:
            self._print(list(tables.table(rows, self.machine)))

    def _print(self, lines: list[str]) -> None:
        """A heading is not said again while it stays the same."""
        start = 0
        for i, line in enumerate(lines):
            if line == "":
                block = lines[start:i]
                again = block[:2] == self.headed
                print("\n".join(block[2:] if again else ["", *block]), flush=True)
                self.headed, start = block[:2], i + 1


def run(arguments: argparse.Namespace) -> int:
    found = trials(arguments)
    runner, talker = Runner(arguments), Talker(len(found), arguments.json)
    talker.machine = [row for row in read_rows(arguments.out) if row.get("trial", "").startswith(MACHINE)]
    outcome = supervise(arguments, found, runner.run, runner.meet, talker.say, ["--out", str(arguments.out)])
    # What the report had already is as much of what was asked for, unless it was to be measured again and there was no
    # time for that.
    rows = [row for row in report.read(arguments.out) if row.get("trial") in found and found[row["trial"]].wrote(row)]
    talker.show([row for row in rows if row["trial"] not in talker.told])
    where = sys.stderr if arguments.json else sys.stdout
    print("\n".join(["", *tables.closing(rows)]), file=where)
    if outcome.code:
        print(outcome, file=sys.stderr)
    if arguments.plot:
        from .plots import draw  # matplotlib takes a second to import

        for path in draw(rows, arguments.plot):
            print(f"wrote {path}", file=sys.stderr)
    wrong = any("error" in row for row in rows)
    return outcome.code or int(wrong)


def main(of: str, argv: Sequence[str]) -> int:
    parser = parser_of(of)
    arguments = parser.parse_args(argv)
    try:
        completed(arguments)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if arguments.out is not None:
        return run(arguments)
    with tempfile.TemporaryDirectory(prefix=f"nsc-bench-{slug()}-") as folder:
        arguments.out = Path(folder) / "report.jsonl"
        return run(arguments)


def operator(argv: Sequence[str]) -> int:
    return main(OPERATOR, argv)


def linear(argv: Sequence[str]) -> int:
    return main(LINEAR, argv)

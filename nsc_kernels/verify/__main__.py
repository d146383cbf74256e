"""Shows the GPU kernels correct on this machine, so that the automatic choice takes them here.

    python -m nsc_kernels.verify                     some minutes; most of them Triton compiles
    python -m nsc_kernels.verify --backends triton   one backend
    python -m nsc_kernels.verify --out rows          where the rows go; run again it goes on where it stopped
    python -m nsc_kernels.verify --forget            nothing counts any more that was shown, nor the rows of it

Some hundred trials for each backend, in processes of their own: every kind of shape against float64, the same bits in
every way of calling, one launch in each direction. CUDA_VISIBLE_DEVICES says on which GPU. What passes is entered in a
file of yours (NSC_VERIFIED, or nsc_kernels/verified.json in the cache folder), by architecture, source of the kernels
and version of Triton. Exits with 0 if every backend was shown correct, with 1 if one was not, with 2 if there is none,
with 3 if trials are left to another run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import available_backends, verified_hardware
from ..bench import environment
from ..bench.measuring import Rows, device, slug
from ..bench.trials import Outcome, Trial, add_backends, supervise
from ..bench.workers import Meet, RunOne
from ..printing import exit_status
from . import check, launches, verdict

MEMORY = 6 << 30  # bytes that a process takes, about


class Stage(NamedTuple):
    file: str
    trials: Callable[[list[str], bool], dict[str, Trial]]
    run_one: RunOne
    most: int | None  # processes at a time


STAGES = {
    "correctness": Stage(verdict.CORRECTNESS, check.trials, check.run_one, None),
    "launches": Stage(verdict.LAUNCHES, launches.trials, launches.run_one, 1),  # the profiler would see the others
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m nsc_kernels.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_backends(found)
    found.add_argument("--out", type=Path, help="folder of the rows (default: beside the ledger, by GPU and versions)")
    found.add_argument("--workers", type=int, help="processes at a time (default: by cores and by the GPU's memory)")
    found.add_argument("--seconds", type=float, default=3600, help="start no new trial after this long")
    found.add_argument("--again", action="store_true", help="repeat trials that failed, hung or died before")
    found.add_argument("--stage", choices=STAGES, help="only these trials, and no verdict")
    found.add_argument("--forget", action="store_true", help="delete the ledger of what was shown, and its rows")
    found.add_argument("--json", action="store_true", help="print one JSON object")
    # Two small problems in Triton's interpreter, which has to be taught bfloat16 first (bench/hardware/check.py).
    found.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    found.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return found


class Talker:
    """Says how far a stage is, on a terminal, and what did not pass as it comes."""

    def __init__(self, stage: str, count: int):
        self.stage, self.count, self.ended = stage, count, 0

    def say(self, key: str, last: dict[str, Any], seconds: float, rows: list[dict[str, Any]]) -> None:
        self.ended += 1
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        if last["ended"] != "done":
            print(f"{clear}{key}: {last['ended']}: {last.get('why', '')}", file=sys.stderr, flush=True)
        if clear:
            print(f"{clear}{self.stage} {self.ended}/{self.count}", end="\r", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, name: str, names: list[str], meet: Meet, settings: str | None = None) -> Outcome:
    """One stage; in a worker, its trials as they are handed over."""
    stage = STAGES[name]
    trials = {key: one._replace(settings=settings) for key, one in stage.trials(names, args.dry_run).items()}
    workers = args.workers if stage.most is None else stage.most
    how = argparse.Namespace(**vars(args) | {"out": args.out / stage.file, "workers": workers, "limit": None})
    return supervise(how, trials, stage.run_one, meet, Talker(name, len(trials)).say, ["--stage", name])


def workers(on: torch.device) -> int:
    """Triton compiles a kernel in one thread of one process: as many processes as cores and memory allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = torch.cuda.get_device_properties(on).total_memory if on.type == "cuda" else MEMORY
    return max(min(cores, memory // MEMORY), 1)


def left_out(backends: Sequence[str], meet: Meet, dry_run: bool) -> dict[str, str]:
    """The backends that do not serve this GPU at all, and why."""
    found = {}
    for name in backends:
        why = available_backends()[name]
        if why is True and not (dry_run or torch.cuda.is_available()):
            why = "no CUDA device"
        if why is True:
            why = check.refused(name, meet(dry_run)) or True
        if why is not True:
            found[name] = str(why)
    return found


def beside(ledger: Path) -> Path:
    """Where rows go without ``--out``: a folder for each GPU and versions."""
    return ledger.parent / "verify"


def forget(ledger: Path) -> str:
    """With rows left beside it, the next run would enter at once what they show."""
    ledger.unlink(missing_ok=True)
    for name in (verdict.CORRECTNESS, verdict.LAUNCHES):
        for path in beside(ledger).glob(f"*/{name}"):
            path.unlink()
    return f"{ledger} is not there any more"


def unwritable(ledger: Path) -> str | None:
    """Why nothing could be entered in a ledger; asked before anything is tried."""
    try:
        if str(ledger).startswith("~"):
            raise OSError("there is no home folder")
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), tempfile.TemporaryFile(dir=ledger.parent):
            warnings.simplefilter("error")
            verified_hardware.read(ledger)
    except (OSError, RuntimeWarning) as error:
        return f"nothing can be entered in {ledger}: {error}. NSC_VERIFIED names another file"
    return None


def gpu_and_versions(on: torch.device) -> str:
    """What rows depend on besides the kernels' source: those of another GPU or other versions show nothing here."""
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else on.type
    return f"{name}, torch {torch.__version__}, triton {verified_hardware.triton_version()}"


def entered(folder: Path, backend: str, ledger: Path, settings: str) -> dict[str, Any]:
    """What became of a backend, as ``--json`` has it; what was shown is in the ledger then."""
    why = verdict.shortcomings(folder, backend, settings)
    if why:
        return {"shown_correct": False, "why": why}
    earned = verdict.entry(folder, backend) | {"triton": verified_hardware.triton_version()}
    verdict.accept(earned, ledger, ("backend", "arch", "source", "triton"))
    return {"shown_correct": True, "entry": earned}


def said(found: dict[str, dict[str, Any]], folder: Path, ledger: Path) -> str:
    lines = []
    for backend, one in found.items():
        if one["shown_correct"]:
            earned = one["entry"]
            lines.append(f"{backend}: shown correct on {earned['device']} ({earned['arch']}), {earned['cases']} trials")
        else:
            lines.append(f"{backend}: not shown correct: {'; '.join(one['why'])}")
    shown = [one["shown_correct"] for one in found.values()]
    if any(shown):
        lines.append(f"entered in {ledger}")
    if not all(shown):
        lines.append("run again, it tries what is missing; --again also what did not pass, another --out everything")
    return "\n".join([*lines, f"rows: {folder}"])


def main(argv: Sequence[str] | None = None, meet: Meet = device) -> int:
    command = parser()
    args = command.parse_args(argv)
    ledger = verified_hardware.own_ledger()
    if args.forget:
        print(forget(ledger))
        return 0
    reasons = left_out(args.backends, meet, args.dry_run)
    names = [name for name in args.backends if name not in reasons]
    if not args.worker:
        for name, why in reasons.items():
            print(f"{name}: left out: {why}", file=sys.stderr)
    if not names:
        if args.json:
            print(json.dumps({"backends": {}, "left_out": reasons}))
        return 2
    enters = not (args.worker or args.stage or args.dry_run)
    if enters and (fault := unwritable(ledger)):
        command.error(fault)
    if args.out is None:
        versions = f"torch-{torch.__version__}-triton-{verified_hardware.triton_version()}"
        args.out = beside(ledger) / f"{slug()}-{versions}"
    if args.worker:
        run(args, args.stage, names, meet)
    on = meet(args.dry_run)
    args.workers = args.workers or workers(on)
    Rows(args.out / verdict.ENVIRONMENT, keep=True).write(environment.facts(on) | {"dry_run": args.dry_run})
    here = gpu_and_versions(on)
    outcomes = [run(args, name, names, meet, here) for name in ([args.stage] if args.stage else STAGES)]
    code = max((outcome.code for outcome in outcomes), key=(0, 3, 1).index)
    if not enters:
        print("\n".join(f"{', '.join(names)}: {outcome}" for outcome in outcomes))
        return code
    found = {backend: entered(args.out, backend, ledger, here) for backend in names}
    as_json = {"backends": found, "left_out": reasons, "rows": str(args.out)}
    print(json.dumps(as_json) if args.json else said(found, args.out, ledger))
    shown = all(one["shown_correct"] for one in found.values())
    return 0 if shown else code or 1


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

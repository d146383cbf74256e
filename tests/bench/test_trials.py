"""What a trial that hangs, crashes or is cut off costs: itself. With stand-ins for the kernels, and no GPU."""

from __future__ import annotations

import functools
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import forked_workers
import pytest

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

SCRIPT = """
import fcntl, os, signal, sys, time

if "--worker" in sys.argv and "NO_START" in os.environ:
    sys.exit(1)

from nsc_kernels.bench import workers
from nsc_kernels.bench.measuring import device
from nsc_kernels.bench.trials import Trial, supervise, trial_arguments
from nsc_kernels.printing import exit_status

held = os.path.join(os.path.dirname(sys.argv[0]), "held")

def run_one(what, on):
    sys.stdout.write("noise on standard output\\n")  # a line at once, beside another worker's
    yield {"half": what}
    if what == "hang":
        time.sleep(1000)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise ValueError("no")
    if what == "break":
        workers._cleaned = lambda on: False
    while what == "held" and os.path.exists(held):
        time.sleep(0.05)
    yield {"whole": what, "passed": what != "wrong", "process": os.getpid()}

def meet(dry_run):
    if "ALONE" in os.environ:
        global alone
        alone = open(os.environ["ALONE"], "w")
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError:
            if os.path.exists(held):
                os.remove(held)
            raise
    return device(dry_run)

def main():
    parser = trial_arguments(None)
    parser.add_argument("names")
    args = parser.parse_args()
    trials = {f"{i} {n}": Trial(n.partition("@")[2] or "triton", n.partition("@")[0], 2 if n == "hang" else 60)
              for i, n in enumerate(args.names.split(","))}
    print(supervise(args, trials, run_one, meet))
    return 0

if __name__ == "__main__":
    sys.exit(exit_status(main))
"""


class Harness:
    """The script above, run on a list of trials."""

    def __init__(self, folder: Path):
        self.script, self.held, self.out = folder / "script.py", folder / "held", folder / "rows.jsonl"
        self.script.write_text(SCRIPT)
        self.errors = (folder / "errors").open("w+")

    def arguments(self, *names: str, flags: tuple[str, ...] = ()) -> list[str]:
        return [str(self.script), ",".join(names), "--dry-run", "--out", str(self.out), *flags]

    def start(self, *names: str, flags: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """In a process that can be ended."""
        command = [sys.executable, *self.arguments(*names, flags=flags)]
        # Of tests that run in the background a shell may have Ctrl-C ignored, as would be what they start.
        heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        given = {"stdout": subprocess.DEVNULL, "stderr": self.errors, "start_new_session": True}
        return subprocess.Popen(command, preexec_fn=heeding, **given)

    def run(self, *names: str, flags: tuple[str, ...] = (), started_as: list[str] | None = None) -> str:
        """To its end, in this process: only workers are started, ``started_as`` what else is given after python."""
        arguments = self.arguments(*names, flags=flags)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", arguments)
            patch.setattr(sys, "orig_argv", [sys.executable, *(started_as or arguments)])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(self.script), run_name="__main__")
        assert ended.value.code == 0
        return printed.getvalue().splitlines()[-1]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def ends(self) -> dict[str, str]:
        return {row["trial"]: row["ended"] for row in self.rows() if "ended" in row}

    def whole(self) -> Counter[str]:
        return Counter(row["whole"] for row in self.rows() if "whole" in row)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Harness(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with forked_workers.server():
        yield


@pytest.fixture
def quick(harness: Harness, server: None, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """With workers that are there at once where it runs in this process."""
    forked_workers.forked(monkeypatch)
    return harness


def test_a_hang_a_crash_and_an_error_cost_only_themselves(harness: Harness) -> None:
    names = ["a", "hang", "b", "crash", "c", "raise", "wrong", "d"]
    assert harness.run(*names) == "4 trials done, 4 failed, 0 left"
    assert [harness.ends()[f"{i} {n}"] for i, n in enumerate(names)] == [
        "done", "hung", "done", "died", "done", "failed", "failed", "done",
    ]  # fmt: skip
    rows = harness.rows()
    why = {row["trial"]: row["why"] for row in rows if row.get("why")}
    assert why == {
        "1 hang": "killed after 2 s",
        "3 crash": "its process ended with code -11",
        "5 raise": "ValueError: no",
    }
    # What a trial yielded before it came to grief is there, too.
    assert Counter(row["half"] for row in rows if "half" in row) == dict.fromkeys(names, 1)
    assert harness.whole() == dict.fromkeys(["a", "b", "c", "d", "wrong"], 1)
    # An error is no reason for another process, a hang and a crash are.
    process = {row["whole"]: row["process"] for row in rows if "whole" in row}
    assert process["c"] == process["wrong"] == process["d"]
    assert len({process["a"], process["b"], process["c"]}) == 3


def test_a_device_that_a_trial_leaves_broken_is_that_trials_failure(quick: Harness) -> None:
    """What a kernel does to its device may show only after its results were right."""
    assert quick.run("a", "break", "b") == "2 trials done, 1 failed, 0 left"
    assert quick.ends() == {"0 a": "done", "1 break": "failed", "2 b": "done"}
    process = {row["whole"]: row["process"] for row in quick.rows() if "whole" in row}
    assert process["a"] == process["break"] != process["b"]


def test_a_process_that_starts_itself_again_ends(harness: Harness, capfd: pytest.CaptureFixture[str]) -> None:
    """Called with arguments from a notebook, or as here by -c: what is started again is no worker, but the whole."""
    code = f"import sys; sys.argv = {harness.arguments('a', 'b')!r}\n"
    assert harness.run("a", "b", started_as=["-c", code + SCRIPT]) == "0 trials done, 2 failed, 0 left"
    assert "as a command" in capfd.readouterr().err


def test_what_found_no_process_is_tried_by_the_next_run(quick: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another program had all of the GPU."""
    monkeypatch.setenv("NO_START", "1")
    assert quick.run("a", "b") == "0 trials done, 2 failed, 0 left"
    assert {row["why"] for row in quick.rows() if "ended" in row} == {"its process did not start"}
    monkeypatch.delenv("NO_START")
    assert quick.run("a", "b") == "2 trials done, 0 failed, 0 left"


def test_a_process_too_many_costs_no_trial(quick: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that serves one process at a time."""
    monkeypatch.setenv("ALONE", str(quick.out.with_name("taken")))
    # Whichever process is first waits until the other has found no place, be that late.
    quick.held.touch()
    names = ["held"] * 4
    assert quick.run(*names, flags=("--workers", "2")).startswith("4 trials done, 0 failed")
    assert not quick.held.exists()


def test_run_again_it_goes_on_and_what_was_under_way_comes_last(quick: Harness) -> None:
    quick.held.touch()
    process = quick.start("a", "held", "b", "c")
    while not (quick.out.is_file() and '"1 held"' in quick.out.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)  # as when the machine goes away
    process.wait()
    quick.held.unlink()
    assert quick.ends() == {"0 a": "done"}
    assert quick.run("a", "held", "b", "c") == "4 trials done, 0 failed, 0 left"
    assert quick.whole() == dict.fromkeys(["a", "held", "b", "c"], 1)
    assert list(quick.ends()) == ["0 a", "2 b", "3 c", "1 held"]
    before = quick.out.read_text()
    assert quick.run("a", "held", "b", "c") == "4 trials done, 0 failed, 0 left"
    assert quick.out.read_text() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_it_at_once_and_fails_no_trial(quick: Harness, workers: int) -> None:
    names = ("a", "held", "held", "held", "b", "held", "held")
    quick.held.touch()
    process = quick.start(*names, flags=("--workers", str(workers)))
    while not (quick.out.is_file() and '"1 held"' in quick.out.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to this process and whatever it has started
    assert process.wait(timeout=30) == 130
    quick.errors.seek(0)
    assert [line for line in quick.errors if not line.startswith("noise")] == ["interrupted\n"]
    ends = quick.ends()
    assert set(ends.values()) <= {"done", "stopped"}
    assert ends["1 held"] == "stopped", "a trial under way was waited for"
    assert len(ends) <= 2 * workers
    quick.held.unlink()
    assert quick.run(*names) == "7 trials done, 0 failed, 0 left"


def test_neither_time_that_is_up_nor_a_line_that_was_cut_off_costs_a_trial(quick: Harness) -> None:
    assert quick.run("a", "b", flags=("--seconds", "-1")) == "0 trials done, 0 failed, 2 left"
    with quick.out.open("a") as file:
        file.write('{"trial": "1 b", "started": 17')
    assert quick.run("a", "b") == "2 trials done, 0 failed, 0 left"
    lines = quick.out.read_text().splitlines()
    assert sum(line.endswith("}") for line in lines) == len(lines) - 1


def test_what_failed_is_repeated_only_when_asked(quick: Harness) -> None:
    names = ("a", "wrong", "crash")
    assert quick.run(*names) == "1 trials done, 2 failed, 0 left"
    assert quick.run(*names) == "1 trials done, 2 failed, 0 left"
    assert quick.whole() == {"wrong": 1, "a": 1}
    quick.run(*names, flags=("--again",))
    assert quick.whole() == {"wrong": 2, "a": 1}


def test_rows_are_of_one_process_at_a_time(harness: Harness) -> None:
    """As of two machines that share a home folder: the second may find of a trial what the first does not."""
    harness.held.touch()
    first = harness.start("a", "held")
    while not (harness.out.is_file() and '"half": "held"' in harness.out.read_text()):
        time.sleep(0.05)
    before = harness.out.read_text()
    assert harness.start("a", "held").wait(timeout=60) == 3
    assert harness.out.read_text() == before
    harness.errors.seek(0)
    told = f"{harness.out}: another process adds rows to it: let it end, or give another --out\n"
    assert [line for line in harness.errors if not line.startswith("noise")] == [told]
    harness.held.unlink()
    assert first.wait(timeout=60) == 0
    assert harness.whole() == {"a": 1, "held": 1}


def test_backends_do_not_share_a_process(quick: Harness) -> None:
    quick.run("a", "b@reference", "c", "d@reference", flags=("--workers", "2"))
    process = {row["trial"]: row["process"] for row in quick.rows() if "whole" in row}
    assert len(process) == 4
    assert not {process["0 a"], process["2 c"]} & {process["1 b@reference"], process["3 d@reference"]}


def test_rows_are_of_the_last_run_of_a_trial(tmp_path: Path) -> None:
    from nsc_kernels.bench.trials import results, under_way

    path = tmp_path / "rows.jsonl"
    rows = [
        {"trial": "a", "started": 1}, {"trial": "a", "us": 1}, {"trial": "a", "ended": "died", "why": "x"},
        {"trial": "a", "started": 2}, {"trial": "a", "us": 2}, {"trial": "a", "ended": "done"},
        {"trial": "b", "started": 3}, {"trial": "b", "ended": "hung", "why": "y"},
        {"trial": "c", "started": 4}, {"trial": "c", "us": 4},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.get("us", row.get("why")) for row in results(path)] == [2, "y", 4]
    assert under_way(path) == ["c"]

"""What rows show kernels correct, and what an entry of a ledger does, on rows made up for it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsc_kernels as nk
from nsc_kernels import dispatch, info, verified_hardware
from nsc_kernels.bench.measuring import Rows
from nsc_kernels.contract import Call
from nsc_kernels.verify import __main__ as command
from nsc_kernels.verify import check, launches, repeats, verdict
from nsc_kernels.verify.cases import TRIED
from nsc_kernels.verify.problems import problem
from verify_rows import Row, passing, write


@pytest.mark.parametrize("backend", verified_hardware.BACKENDS)
def test_everything_passed_earns_an_entry_without_a_gpu(tmp_path: Path, backend: str) -> None:
    write(tmp_path, passing(backend))
    assert verdict.shortcomings(tmp_path, backend) == []
    earned = verdict.entry(tmp_path, backend)
    assert earned["source"] == verified_hardware.checkout_source(backend)
    assert (earned["arch"], earned["torch"]) == ("sm_90", "2.11.0")
    assert earned["cases"] > 60


def test_every_trial_is_tried_on_what_its_name_says() -> None:
    """What is taken away is not given; and as many trials as the README says, on Hopper of clusters as well."""
    backend = SimpleNamespace(__name__="nsc_kernels.backends.one")
    for given, gradients, statistics in (
        ("all", (True, True, True), True),
        ("y", (True, False, False), False),
        ("statistics", (False, True, True), True),
    ):
        run = check.Run(backend, TRIED[0]._replace(given=given, base=given == "y"), torch.device("cpu"))
        forward, backward = run._forward_call(), run._backward_call(run.p.z @ run.p.A.t())
        assert (forward.stats, forward.base is not None) == (statistics, given == "y")
        assert tuple(value is not None for value in backward[:3]) == gradients
    p = problem(64, 96, 80, (8, 8), torch.float32, torch.device("cpu"))
    u = p.z @ p.A.t()
    # None drowns the others, whose errors would be lost in its own.
    assert [float(t.std()) for t in (p.z, u, u @ p.Bt, p.base, p.dy)] == pytest.approx([1] * 5, abs=0.2)
    kinds = Counter(trial.payload.what for trial in check.trials(["triton"], dry_run=False).values())
    assert sum(kinds.values()) == 178
    assert (kinds["accuracy"], kinds["repeats"], kinds["replays"], kinds["captures"]) == (92, 19, 19, 19)
    assert len(check.trials(["cuda"], dry_run=False)) == 178 + 17 + 1


class OneOther:
    """A run, or the operator, of which one call gives another last bit."""

    name = "reference"

    def __init__(self, wrong: int):
        self.p = problem(5, 24, 40, (4, 4), torch.float32, torch.device("cpu"))
        self.wrong, self.count = wrong, 0

    def _counted(self, y: torch.Tensor) -> torch.Tensor:
        self.count += 1
        with torch.no_grad():
            y[-1, -1] = y[-1, -1].nextafter(torch.tensor(9.0)) if self.count == self.wrong else y[-1, -1]
        return y

    def __call__(self) -> dict[str, torch.Tensor]:
        return {"quad": self.p.dquad.clone(), "y": self._counted(self.p.base.clone())}

    def operator(self, z: torch.Tensor, bank: nk.AdapterBank, lam: torch.Tensor, base: torch.Tensor) -> Any:
        y, *statistics = nk.functional.merged_lora_nsc(z, bank, lam, base)
        return self._counted(y.clone()), *statistics


@pytest.mark.parametrize("what", ["repeats", "thousand", "replays", "captures", "streams", "two_graphs", "compiled"])
def test_one_other_bit_in_one_of_all_calls_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(wrong: int) -> tuple[bool, int]:
        run = OneOther(wrong)
        monkeypatch.setattr(nk, "merged_lora_nsc", run.operator)
        return repeats.BITWISE[what](run, torch.device("cpu")), run.count

    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    one_after_another = lambda calls, rounds: [[call() for _ in range(rounds)] for call in calls]  # noqa: E731
    monkeypatch.setattr(repeats, "_overlapping", one_after_another)
    steady, count = found(wrong=0)
    assert steady
    assert count > 3
    assert not found(wrong=1)[0]
    assert not found(wrong=count)[0]
    nan = {"y": torch.tensor(math.nan)}
    assert not repeats.same(nan, nan)  # which memory that nobody has written reads as
    one = torch.ones(3)
    assert not repeats._replayed({"y": one}, {"y": one.clone()}, lambda: None, torch.device("cpu"))  # it writes nothing


def test_a_trial_waits_for_memory_that_others_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free, waited = torch.device("cuda"), [19 << 30, 19 << 30, 20 << 30], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (free[len(waited)], 80 << 30))
    monkeypatch.setattr(repeats.time, "sleep", waited.append)
    repeats.wait_for_memory(gpu, 20)
    assert len(waited) == 2
    waited.clear()
    with pytest.raises(repeats.Skipped, match="less than 20 GB of memory free"):
        repeats.wait_for_memory(gpu, 20, seconds=-1)


def change(index: int, **values: Any) -> Callable[[list[Row]], list[Row]]:
    """The row of the ``index``-th trial with other values; the rows of a trial are three."""
    return lambda rows: [row | values if i == 3 * index + 1 else row for i, row in enumerate(rows)]


def drop(rows: list[Row]) -> list[Row]:
    return rows[3:]


def cut_off(rows: list[Row]) -> list[Row]:
    return rows[:-2]


def died(rows: list[Row]) -> list[Row]:
    """Within the third trial, before it said anything."""
    return [*rows[:7], rows[8] | {"ended": "died", "why": "its process ended with code -11"}, *rows[9:]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (change(4, passed=False, why="y: error 1, bound 0"), "1 trials did not pass.*y: error 1"),
        (change(4, passed=None, why="no"), "1 trials did not pass"),
        (change(4, source="another"), "of another source"),
        (change(4, dry_run=True), "of a dry run"),
        (change(4, arch="sm_100"), "several architectures"),
        (change(4, settings="another GPU"), "several GPUs, or of other versions"),
        (drop, "1 trials are missing, as triton accuracy T=130"),
        (cut_off, "1 trials are missing, as triton beyond_int32"),
        (died, "1 trials did not pass.*code -11"),
    ],
)
def test_less_than_everything_does_not(tmp_path: Path, spoil: Any, says: str) -> None:
    write(tmp_path, spoil(passing("triton")))
    assert any(re.search(says, line) for line in verdict.shortcomings(tmp_path, "triton"))


def test_the_digest_is_over_every_source_under_its_label() -> None:
    """Another label, order or way of writing them would withdraw all entries."""
    package = Path(verified_hardware.__file__).parent
    files = {f"triton/{name}": name for name in ("kernels", "steps", "columns", "configs", "launch")}
    files |= {"counters": "counters", "contract": "records"}
    labels = {"kernels": "kernel", "configs": "configurations"}
    sources = [(labels.get(name, name), package / f"{path}.py") for path, name in files.items()]
    sources += [(f"table {path.name}", path) for path in sorted((package / "triton" / "tables").glob("*.json"))]
    hashed = b"".join(b"%s %d\n%s" % (name.encode(), path.stat().st_size, path.read_bytes()) for name, path in sources)
    assert verified_hardware.triton_source() == hashlib.sha256(hashed).hexdigest()


def test_rows_of_another_build_than_the_one_in_use_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the sources, a library that was built from others."""
    write(tmp_path, passing("cuda"))
    monkeypatch.setattr(verified_hardware, "source", lambda backend: "another")
    assert verdict.shortcomings(tmp_path, "cuda") == ["rows of a dry run or of another source"]


@pytest.mark.parametrize(("backend", "dtype"), [("cuda", "bfloat16"), ("triton", "float32")])
def test_a_backend_is_not_excused_from_what_it_serves(tmp_path: Path, backend: str, dtype: str) -> None:
    rows = passing(backend)
    first = next(row for row in rows if row.get("passed") and row["case"] and row["case"]["dtype"] == dtype)
    first |= {"passed": None, "why": "not served"}
    write(tmp_path, rows)
    assert verdict.shortcomings(tmp_path, backend) == [
        f"1 trials did not pass, the first: {first['trial']}: not served"
    ]


def test_where_nothing_could_be_tried_nothing_is_shown(tmp_path: Path) -> None:
    """On a GPU too small for every case that is served."""
    write(tmp_path, [row | {"passed": None, "memory": 1} if "passed" in row else row for row in passing("cuda")])
    assert verdict.shortcomings(tmp_path, "cuda") == ["no trial passed"]


def test_a_row_is_of_the_source_that_its_process_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are edited while trials run: later processes run other kernels than the first one knows of."""
    monkeypatch.setattr(verified_hardware, "triton_source", lambda: "edited")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)  # for all tests to come
    payload = command.check.Payload("triton", "accuracy", command.check.SMALLEST)
    row = command.check.attempt(payload, torch.device("cpu"))
    monkeypatch.undo()
    assert Rows(tmp_path / "rows.jsonl").write(row)["source"] == "edited"


@pytest.mark.parametrize("what", ["beyond_int32", "external_streams"])
def test_what_a_machine_cannot_try_costs_nothing(tmp_path: Path, what: str) -> None:
    rows = passing("triton")
    index = next(i for i, row in enumerate(rows) if row.get("what") == what)
    rows[index] |= {"passed": None, "why": "too little memory"}
    write(tmp_path, rows)
    assert verdict.shortcomings(tmp_path, "triton") == []
    rows[index] |= {"passed": False}
    write(tmp_path, rows)
    assert verdict.shortcomings(tmp_path, "triton")


def test_a_launch_that_was_not_counted_is_missing(tmp_path: Path) -> None:
    """The time was up within the last stage."""
    write(tmp_path, passing("triton"))
    first, *_ = (tmp_path / "launches.jsonl").read_text().splitlines()
    (tmp_path / "launches.jsonl").write_text(first + "\n")
    assert verdict.shortcomings(tmp_path, "triton")[0].startswith("13 trials are missing, as triton backward")


def test_two_launches_are_one_too_many(tmp_path: Path) -> None:
    write(tmp_path, passing("triton"))
    rows = [json.loads(line) | {"launches": 2} for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "launches per call: [2]" in verdict.shortcomings(tmp_path, "triton")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_launches_that_could_not_be_counted_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the profiler may not look, as in some containers: the kernels are not at fault."""
    monkeypatch.setattr(launches, "synchronize", lambda on: None)
    with pytest.raises(RuntimeError, match="the profiler saw nothing on this GPU"):
        launches.launched(lambda: torch.ones(2), torch.device("cuda"))
    write(tmp_path, passing("triton"))
    rows = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    uncounted = [row | {"ended": "failed", "why": "the profiler saw nothing"} for row in rows]
    for row in uncounted:
        del row["launches"]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uncounted))
    assert verdict.shortcomings(tmp_path, "triton") == [
        "14 launches could not be counted, the first: triton forward ViT-B T=6304 R=320: the profiler saw nothing"
    ]


def test_a_case_larger_than_the_gpu_costs_nothing(tmp_path: Path) -> None:
    rows = passing("triton")
    index = next(i for i, row in enumerate(rows) if (row.get("case") or {}).get("T") == 16384)
    rows[index] |= {"passed": None, "why": "needs 1.8 GB of memory", "memory": 1_000_000_000}
    write(tmp_path, rows)
    assert verdict.shortcomings(tmp_path, "triton") == []
    rows[index] |= {"memory": 80_000_000_000}
    write(tmp_path, rows)
    assert "1 trials did not pass" in verdict.shortcomings(tmp_path, "triton")[0]


def test_an_accepted_entry_replaces_the_backends_own(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "folder" / "verified.json"
    old = {"backend": "cuda", "arch": "sm_90", "source": "old"}
    other = {"backend": "triton", "arch": "sm_90", "source": "t"}
    verdict.accept(old, path)
    verdict.accept(other, path)
    verdict.accept({"backend": "cuda", "arch": "sm_90", "source": "new"}, path)
    assert json.loads(path.read_text()) == [other, {"backend": "cuda", "arch": "sm_90", "source": "new"}]
    verdict.accept(old, path, ("backend", "arch", "source"))
    assert len(json.loads(path.read_text())) == 3
    assert [p.name for p in path.parent.iterdir()] == ["verified.json"]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's own file, which is not there yet; the release's names no architecture."""
    path = tmp_path / "cache" / "verified.json"
    monkeypatch.setenv("NSC_VERIFIED", str(path))
    monkeypatch.setattr(verified_hardware, "VERIFIED", tmp_path / "none.json")
    verified_hardware.entries.cache_clear()
    yield path
    verified_hardware.entries.cache_clear()


def own(arch: str = "sm_80", **values: Any) -> Row:
    versions = {"source": verified_hardware.triton_source(), "triton": verified_hardware.triton_version()}
    return {"backend": "triton", "arch": arch, **versions, **values}


@pytest.mark.parametrize(
    ("entry", "counts"),
    [
        (own(), True),
        (own("sm_86"), False),
        (own(source="0"), False),
        (own(triton="0.1"), False),
        (own(backend="cuda"), False),
    ],
)
def test_what_was_shown_on_this_machine_counts_here(ledger: Path, entry: Row, counts: bool) -> None:
    assert "python -m nsc_kernels.verify" in str(verified_hardware.unproven("sm_80", "triton"))
    verdict.accept(entry, ledger)
    assert (verified_hardware.unproven("sm_80", "triton") is None) == counts


def test_what_was_shown_of_cuda_is_of_no_version_of_triton(ledger: Path) -> None:
    verdict.accept(own(backend="cuda", triton="0.1"), ledger)
    assert verified_hardware.entries() == (own(backend="cuda", triton="0.1"),)


@pytest.mark.parametrize("text", ["", "{}", '["sm_80"]', '[{"arch": "sm_80"}]', "\udcff"])
def test_what_is_no_ledger_counts_for_nothing_and_is_told(ledger: Path, text: str) -> None:
    ledger.parent.mkdir()
    ledger.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match="verified.json counts for nothing, delete it"):
        assert verified_hardware.entries() == ()


@pytest.mark.filterwarnings("error")
def test_a_ledger_that_this_user_cannot_reach_is_not_there(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache of a container's home, in which another user works."""
    ledger.parent.mkdir(mode=0)
    root = os.geteuid() == 0
    try:
        if root:  # whom nothing is closed to
            os.seteuid(65534)
        found = verified_hardware.entries(), info._own_ledger()
    finally:
        if root:
            os.seteuid(0)
        ledger.parent.chmod(0o700)
    assert found == ((), f"{ledger} is not there; python -m nsc_kernels.verify writes it")
    ledger.parent.rmdir()
    ledger.parent.touch()
    verified_hardware.entries.cache_clear()
    assert verified_hardware.entries() == ()


def test_the_ledger_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NSC_VERIFIED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verified_hardware.own_ledger() == tmp_path / "nsc_kernels" / "verified.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verified_hardware.own_ledger() == tmp_path / ".cache" / "nsc_kernels" / "verified.json"


def test_a_gpu_without_kernels_shown_correct_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators are right there, and slower: not without a word."""
    call = Call(torch.device("cuda", 0), torch.bfloat16, 5, 64, 64, (0, 4))

    class Unproven:
        rejects = staticmethod(lambda call: None)
        unproven = staticmethod(lambda call: "not yet shown correct on sm_80: verify it")

    reference = dispatch.load("reference")
    found = {"cuda": (None, "no library"), "triton": (Unproven, None), "reference": reference}
    monkeypatch.setattr(dispatch, "load", lambda name: found[name])
    monkeypatch.setattr(dispatch, "select", dispatch.select.__wrapped__)
    dispatch._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="not triton, not yet shown correct on sm_80: verify it") as told:
            assert [dispatch.select("auto", call) for _ in range(3)] == [reference[0]] * 3
        assert len(told) == 1
        # Without a word where other kernels of ours serve, whether the first are unproven or not there.
        proven = SimpleNamespace(rejects=lambda call: None, unproven=lambda call: None)
        for before in ((Unproven, None), (SimpleNamespace(**vars(proven)), "no library")):
            found |= {"cuda": before, "triton": (proven, None)}
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert dispatch.select("auto", call) is proven
    finally:
        dispatch._warn_once.cache_clear()


def test_without_a_gpu_there_is_nothing_to_verify(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert [line.partition(": left out: ")[0] for line in said.splitlines()] == ["triton", "cuda"]
    assert "True" not in said


def test_a_backend_for_other_gpus_is_left_out(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails nothing: kernels for Hopper beside an A100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "available_backends", lambda: {"triton": True, "cuda": True, "cpu": True})
    monkeypatch.setattr(command.check, "refused", lambda name, on: "needs 9.0, this is 8.0" if name == "cuda" else None)
    monkeypatch.setattr(command, "workers", lambda on: 1)
    stages = []

    def run(args: Any, name: str, names: list[str], *others: Any) -> command.Outcome:
        stages.append((name, names))
        return command.Outcome(1, 0, 0)

    monkeypatch.setattr(command, "run", run)
    assert command.main(["--out", str(tmp_path)], meet=lambda dry_run: torch.device("cpu")) == 1
    assert stages == [("correctness", ["triton"]), ("launches", ["triton"])]
    said = capsys.readouterr()
    assert said.err == "cuda: left out: needs 9.0, this is 8.0\n"
    assert said.out.startswith("triton: not shown correct: ")
    assert "--again" in said.out


@pytest.mark.parametrize("as_json", [False, True])
def test_what_passes_is_entered_and_what_does_not_is_said(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """The stages having been run: Triton's passed, of CUDA's one trial did not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "left_out", lambda *args: {})
    monkeypatch.setattr(command, "run", lambda *args: command.Outcome(1, 0, 0))
    monkeypatch.setattr(command, "workers", lambda on: 1)
    rows = passing("triton") + passing("cuda")
    wrong = next(i for i, row in enumerate(rows) if row["backend"] == "cuda" and row.get("passed"))
    rows[wrong] |= {"passed": False, "why": "y: error 1, bound 0"}
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder, rows, settings=command.gpu_and_versions(torch.device("cpu")))
    arguments = ["--out", str(folder), *(["--json"] if as_json else [])]
    assert command.main(arguments, meet=lambda dry_run: torch.device("cpu")) == 1
    said = capsys.readouterr().out
    if as_json:
        found = json.loads(said)["backends"]
        assert (found["triton"]["shown_correct"], found["cuda"]["shown_correct"]) == (True, False)
        assert "y: error 1, bound 0" in found["cuda"]["why"][0]
    else:
        assert "triton: shown correct on a GPU (sm_90)" in said
        assert "cuda: not shown correct: 1 trials did not pass" in said
        assert str(ledger) in said
    assert verified_hardware.unproven("sm_90", "triton") is None
    assert [e["backend"] for e in json.loads(ledger.read_text())] == ["triton"]
    folder.rename(ledger.parent / "verify")
    others = [ledger.parent / "verify" / name for name in ("a-gpu", "of-somebody")]
    for other, name in zip(others, ("correctness.jsonl", "other.jsonl"), strict=True):
        other.mkdir()
        (other / name).write_text("")
    assert command.main(["--forget"]) == 0
    assert not ledger.exists()
    assert [[path.name for path in other.iterdir()] for other in others] == [[], ["other.jsonl"]]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("file/verified.json", "Not a directory|File exists"),
        ("folder", "Is a directory"),
        ("another.json", "expected a list of entries"),
        ("~", "no home folder"),
    ],
)
def test_a_ledger_that_cannot_be_written_is_told_before_anything_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, says: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "another.json").write_text('{"mine": 1}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSC_VERIFIED", where if where == "~" else str(tmp_path / where))
    monkeypatch.setattr(command, "left_out", lambda *args: {})
    with pytest.raises(SystemExit, match="2"):
        command.main([], meet=lambda dry_run: torch.device("cpu"))
    told = capsys.readouterr().err
    assert re.search(says, told)
    assert "NSC_VERIFIED names another file" in told
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "another.json"}
    assert (tmp_path / "another.json").read_text() == '{"mine": 1}'


def test_rows_of_another_version_of_triton_show_nothing(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that was given with --out, before an upgrade and after it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "left_out", lambda *args: {})
    monkeypatch.setattr(command, "run", lambda *args: command.Outcome(1, 0, 0))
    write(tmp_path, passing("triton"), settings=command.gpu_and_versions(torch.device("cpu")))
    arguments = ["--backends", "triton", "--out", str(tmp_path)]
    assert command.main(arguments, meet=lambda dry_run: torch.device("cpu")) == 0
    ledger.unlink()
    monkeypatch.setattr(verified_hardware, "triton_version", lambda: "9.9")
    assert command.main(arguments, meet=lambda dry_run: torch.device("cpu")) == 1
    assert "not shown correct: rows of several GPUs, or of other versions" in capsys.readouterr().out
    assert not ledger.exists()


def test_both_stages_run_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun in this one, as python -m bench.hardware.check begins them."""
    pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "hardware" / "check.py").is_file():
        pytest.skip("needs the source tree")
    words = ["--dry-run", "--backends", "triton", "--out", str(tmp_path), "--workers", "1"]
    monkeypatch.setattr(command, "left_out", lambda *args: {})  # only they interpret it
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "bench.hardware.check", *words])
    monkeypatch.chdir(root)
    monkeypatch.setenv("NSC_VERIFIED", str(tmp_path / "none.json"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(words, meet=lambda dry_run: torch.device("cpu")) == 0
    ended = [f"triton: {count} trials done, 0 failed, 0 left" for count in (9, 2)]
    assert capsys.readouterr().out.splitlines() == ended
    assert not (tmp_path / "none.json").exists()  # a dry run shows nothing
    rows = [json.loads(line) for line in (tmp_path / "correctness.jsonl").read_text().splitlines()]
    assert {row["passed"] for row in rows if "passed" in row} == {True}
    assert {row["what"] for row in rows if "what" in row} == {"accuracy", "repeats", "replays", "captures", "thousand"}

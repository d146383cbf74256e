"""python -m nsc_kernels.info."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import nsc_kernels as nk
from nsc_kernels import info, native
from nsc_kernels.bench import __main__ as bench
from nsc_kernels.printing import exit_status


def test_json_says_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nsc_kernels"] == nk.__version__
    assert facts["backends"] == nk.available_backends()
    assert facts["versions"]["torch"]
    assert facts["cuda"]["devices"] == [] or facts["cuda"]["devices"][0]["name"]


def test_text_names_every_backend_and_its_reason() -> None:
    result = subprocess.run([sys.executable, "-m", "nsc_kernels.info"], capture_output=True, text=True, check=True)
    for name, reason in nk.available_backends().items():
        words = "yes" if reason is True else reason
        found = [line for line in result.stdout.splitlines() if line.split()[:1] == [name] and words in line]
        assert found, f"{name}: {words}\n{result.stdout}"
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize("source", [None, "0" * 64])
def test_a_library_that_is_not_loaded_is_not_said_to_be_shown_correct_nowhere(
    source: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cuda_source", lambda: source)
    unknown = "not loaded, and with it unknown on what it was shown correct"
    expected = {"source": "0" * 16, "shown_correct_on": []} if source else unknown
    assert info.collect()["cuda_kernel"] == expected


@pytest.mark.parametrize("command", ["nsc_kernels.info", "nsc_kernels.bench list"])
def test_a_reader_that_has_left_is_no_error(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", *command.split()]
    try:
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_is_for_a_closed_standard_error_is_not_among_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", "missing.json"]
    command = [sys.executable, "-m", "nsc_kernels.bench", *words]
    closed = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, check=False)
    status, said = bench.main(words), capsys.readouterr()
    assert said.err
    assert (closed.returncode, closed.stdout) == (status, said.out)


def test_what_a_locale_has_no_form_of_is_shown_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", told)
    assert exit_status(lambda: print("768 → 768, 1.2×") or 0) == 0
    assert told.buffer.getvalue() == b"768 \\u2192 768, 1.2\xd7\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without a full disk at hand")
@pytest.mark.parametrize("command", ["nsc_kernels.info", "nsc_kernels.info --help", "nsc_kernels.bench list"])
def test_a_full_disk_is_one_line(command: str) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", *command.split()]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_forced_instruction_set_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.cpu_instruction_sets():
        pytest.skip("the CPU library is not built")
    monkeypatch.setenv("NSC_CPU_ISA", "sse9")
    assert "NSC_CPU_ISA=sse9: expected one of" in info.collect()["backends"]["cpu"]
    for name in ("", native.cpu_instruction_sets()[-1]):
        monkeypatch.setenv("NSC_CPU_ISA", name)
        assert info.collect()["backends"] == nk.available_backends()

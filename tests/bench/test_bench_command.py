"""``python -m nsc_kernels.bench``: what it measures on which machine, and what the package needs for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nsc_kernels as nk
from nsc_kernels.bench import __main__ as command
from nsc_kernels.bench import operator_cpu


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_measures_the_cpu(tmp_path):
    if torch.cuda.is_available() or nk.available_backends()["cpu"] is not True:
        pytest.skip("needs the CPU library, and no GPU")
    done = run("-m", "nsc_kernels.bench", "--quick", "--out", "rows", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "rows").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["op"] for row in rows[:2]] == ["environment", "overhead"]
    measured = [row for row in rows if row["op"] == "merged_lora_nsc"]
    assert len(measured) == 2 * len(operator_cpu.DTYPES) * len(operator_cpu.QUICK)
    assert {"fused", "eager"} <= measured[0]["seconds"].keys()
    assert done.stdout.count("GFLOP/s") == len(measured)


def test_with_a_gpu_it_measures_that(tmp_path, monkeypatch, capsys):
    asked = []

    def started(process: list[str], check: bool) -> SimpleNamespace:
        asked.append(process)
        row = {"trial": "triton operator", "backend": "triton", "dry_run": False, "contender": "loop", "error": "no"}
        Path(process[process.index("--out") + 1]).write_text(json.dumps(row) + "\n")
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nk, "available_backends", lambda: {"triton": True, "cuda": "not built"})
    monkeypatch.setattr(command.subprocess, "run", started)
    assert command.main(["--quick", "--out", str(tmp_path)]) == 3
    assert "triton operator loop: no" in capsys.readouterr().out
    assert command.main([]) == 3
    assert ["nsc_kernels.bench.operator_gpu" in process for process in asked] == [True, True]
    assert ["--quick" in process for process in asked] == [True, False]


def test_without_a_backend_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nk, "available_backends", lambda: {"cpu": "libnsc_cpu was not built"})
    assert command.main([]) == 1
    assert capsys.readouterr().err == "nothing to measure: cpu: libnsc_cpu was not built\n"


ALONE = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("bench", "tests", "pytest"))
import nsc_kernels
assert not [name for name in sys.modules if name.startswith("nsc_kernels.bench")]
import nsc_kernels.bench
for module in pkgutil.iter_modules(nsc_kernels.bench.__path__, "nsc_kernels.bench."):
    importlib.import_module(module.name)
print(*[path for module in sys.modules.values() if "/tests/" in (path := getattr(module, "__file__", None) or "")])
"""


def test_the_package_measures_by_itself(tmp_path):
    """Without what only a checkout has and without pytest; and using the operator loads nothing of it."""
    pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    done = run("-c", ALONE, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr

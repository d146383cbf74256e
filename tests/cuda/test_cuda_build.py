"""The library as it was built: machine code, symbols; and what the build asks of its environment."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from nsc_kernels import info, native, verified_hardware
from nsc_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = native.LIBRARY_DIR / "libnsc_cuda.so"

built = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"libnsc_cuda: {info.collect()['build']}")


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    command = [sys.executable, "-m", "bench.hardware.sass_report", str(LIBRARY), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@built
def test_every_kernel_has_matrix_and_cluster_instructions_and_no_spills(report: list[dict[str, Any]]) -> None:
    for family, variants in (("mma", cuda.VARIANTS), ("wgmma", cuda.WARPGROUP_VARIANTS)):
        expected = set(itertools.product(("bf16", "f16"), ("forward", "backward"), variants))
        rows = [row for row in report if row["family"] == family]
        assert {(row["element"], row["kernel"], (row["ranks"], row["tokens"])) for row in rows} == expected
    for row in report:
        assert not row["faults"], row
        assert (row["local"], row["stack"]) == (0, 0), row
        assert row["cluster"] > 0, row
        assert (row["mma"] and row["cp_async"]) if row["family"] == "mma" else (row["wgmma"] and row["tma"]), row


@built
def test_one_library_for_every_python_and_every_torch() -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
    assert not [s for s in undefined if s.startswith(("Py", "_Py", "cu", "cuda")) or "c10" in s or "2at" in s]
    assert not [line for line in symbols.splitlines() if " T " in line and "nsc_cuda" not in line]


@built
def test_a_result_for_it_can_be_entered_where_it_cannot_be_loaded() -> None:
    if any(path.stat().st_mtime > LIBRARY.stat().st_mtime for path in verified_hardware.CUDA.glob("*")):
        pytest.skip("the sources are newer than the library")
    digest = verified_hardware.checkout_source("cuda")
    if digest is None:
        pytest.skip("needs the source tree")
    assert digest.encode() in LIBRARY.read_bytes()


@built
def test_beside_a_torch_without_cuda_it_is_not_loaded() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert native.cuda_source() is None
    with pytest.raises(OSError):
        torch.ops.load_library(LIBRARY)


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs the source tree")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, "90a-real"),
        ("", "90a-real"),
        ("8.0;9.0a", "90a-real"),
        ("9.0a 10.0+PTX", "90a-real;100-real;100-virtual"),
        ("9.0;9.0", "90-real"),
        ("12.0a", "120a-real"),
    ],
)
def test_architectures_as_pytorch_extensions_name_them(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: str | None, given: str
) -> None:
    if asked is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_py["cuda_architectures"]() == given


@pytest.mark.parametrize(("asked", "words"), [("8.0;8.6", "need 9.0 or newer"), ("Hopper", "found 'Hopper'")])
def test_architectures_that_cannot_be_built_for(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: str, words: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(RuntimeError, match=words):
        setup_py["cuda_architectures"]()


def test_a_missing_nvcc_is_named(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        setup_py["nvcc"]()


def test_it_is_built_beside_a_torch_that_can_load_it(setup_py: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="had no CUDA: install it again beside one that has, or NSC_BUILD_CUDA=1"):
        setup_py["demand_cuda_of"](tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    setup_py["demand_cuda_of"](tmp_path)

"""What a build produces, with a compiler, without one, and when one was demanded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources without anything built: a build here must not touch the tree under test."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    copy = tmp_path / "source"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(source: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import setuptools.build_meta as backend; print('built', backend.build_{command}('out'))"
    (source / "out").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def contents(source: Path, pattern: str) -> tuple[str, set[str]]:
    (archive,) = (source / "out").glob(pattern)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return archive.name, set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return archive.name, {name.partition("/")[2] for name in sdist.getnames()}


def test_one_wheel_for_every_python(source: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    result = build(source, "wheel", NSC_BUILD_CPU="1", NSC_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    name, files = contents(source, "*.whl")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert {"nsc_kernels/lib/libnsc_cpu.so", "nsc_kernels/py.typed", "nsc_merge/py.typed"} <= files
    assert "nsc_kernels/_build.json" in files
    assert any(name.startswith("nsc_merge/assets/") for name in files)
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in files)
    library = source / "libnsc_cpu.so"
    with zipfile.ZipFile(source / "out" / name) as wheel:
        library.write_bytes(wheel.read("nsc_kernels/lib/libnsc_cpu.so"))
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
        undefined = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
        assert not [s for s in undefined if s.startswith(("Py", "_Py"))], "the library depends on one Python"
        assert not [s for s in undefined if "c10" in s or "2at" in s], "the library depends on one torch"


def test_without_a_compiler_the_install_succeeds_and_says_so(source: Path) -> None:
    result = build(source, "wheel", CXX="/bin/false", NSC_BUILD_CPU="auto", NSC_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "the cpu library was not built" in result.stderr
    name, files = contents(source, "*.whl")
    assert name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in files)


@pytest.mark.parametrize(("variable", "value"), [("NSC_BUILD_CPU", "1"), ("NSC_BUILD_CPU", "maybe")])
def test_a_demand_that_cannot_be_met_fails_loudly(source: Path, variable: str, value: str) -> None:
    result = build(source, "wheel", CXX="/bin/false", **{"NSC_BUILD_CUDA": "0", variable: value})
    assert result.returncode != 0
    assert not list((source / "out").glob("*.whl"))


def test_the_sdist_holds_what_a_build_needs(source: Path) -> None:
    result = build(source, "sdist")
    assert result.returncode == 0, result.stderr
    _, files = contents(source, "*.tar.gz")
    assert {"CMakeLists.txt", "csrc/cpu/kernels.inl", "csrc/cpu/binding.cpp", "constraints.txt", "LICENSE"} <= files
    assert {"nsc_kernels/reference.py", "python/nsc_merge/__init__.py", "tests/test_operator.py"} <= files
    assert not any(name.endswith((".so", "_build.json", ".pyc")) for name in files)

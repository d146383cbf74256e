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
import torch

from nsc_kernels import info, native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")

# What the libraries take from torch: the wheel serves torch 2.11 and newer, so nothing may be added here that the
# libraries of torch 2.11.0 do not export (nm -D of libtorch_cpu.so and libtorch_cuda.so). Of the functions in torch's
# headers only those of torch/csrc/stable say since when they are there, and not all of these come from it.
TORCH_2_11 = set(
    """
    aoti_torch_abi_version aoti_torch_create_device_guard aoti_torch_delete_device_guard
    aoti_torch_delete_library_object aoti_torch_delete_tensor_object aoti_torch_device_type_cpu
    aoti_torch_device_type_cuda aoti_torch_dtype_bfloat16 aoti_torch_dtype_bool aoti_torch_dtype_complex128
    aoti_torch_dtype_complex32 aoti_torch_dtype_complex64 aoti_torch_dtype_float16 aoti_torch_dtype_float32
    aoti_torch_dtype_float64 aoti_torch_dtype_float8_e4m3fn aoti_torch_dtype_float8_e4m3fnuz
    aoti_torch_dtype_float8_e5m2 aoti_torch_dtype_float8_e5m2fnuz aoti_torch_dtype_int16 aoti_torch_dtype_int32
    aoti_torch_dtype_int64 aoti_torch_dtype_int8 aoti_torch_dtype_uint16 aoti_torch_dtype_uint32
    aoti_torch_dtype_uint64 aoti_torch_dtype_uint8 aoti_torch_empty_strided aoti_torch_get_current_cuda_stream
    aoti_torch_get_data_ptr aoti_torch_get_device_index aoti_torch_get_device_type aoti_torch_get_dim
    aoti_torch_get_dtype aoti_torch_get_numel aoti_torch_get_size aoti_torch_get_stride aoti_torch_is_contiguous
    aoti_torch_library_init_impl aoti_torch_new_tensor_handle torch_delete_list torch_dtype_float4_e2m1fn_x2
    torch_dtype_float8_e8m0fnu torch_get_num_threads torch_library_impl torch_list_get_item torch_list_size
    torch_parallel_for
    """.split()  # noqa: SIM905
)


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


def depends_on_no_version(library: Path) -> None:
    """That a library asks for nothing of one Python or of a torch newer than 2.11."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
    assert not [s for s in undefined if s.startswith(("Py", "_Py"))], "the library depends on one Python"
    assert not [s for s in undefined if "c10" in s or "2at" in s], "the library depends on one torch"
    assert {s for s in undefined if s.startswith(("aoti_", "torch_"))} <= TORCH_2_11, "does torch 2.11 export these?"


def test_one_wheel_for_every_python(source: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    # What is in the wheel is asked here, not how fast it is. Without -O1 the binding would ask for what it never calls.
    compiler = source / "quick_compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *binding.cpp*) o=-O1 ;; *) o=-O0 ;; esac\nexec c++ "$@" $o\n')
    compiler.chmod(0o755)
    result = build(source, "wheel", CXX=str(compiler), NSC_BUILD_CPU="1", NSC_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    name, files = contents(source, "*.whl")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert {"nsc_kernels/lib/libnsc_cpu.so", "nsc_kernels/py.typed", "nsc_merge/py.typed"} <= files
    assert "nsc_merge/methods/listing.json" in files
    assert "nsc_kernels/_build.json" in files
    assert {"nsc_kernels/bench/__main__.py", "nsc_kernels/bench/fma_peak.cpp"} <= files
    assert any(name.startswith("nsc_merge/assets/") for name in files)
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in files)
    library = source / "libnsc_cpu.so"
    with zipfile.ZipFile(source / "out" / name) as wheel:
        library.write_bytes(wheel.read("nsc_kernels/lib/libnsc_cpu.so"))
    for place in (source, Path(torch.__file__).parent):
        assert str(place).encode() not in library.read_bytes(), "messages name where the library was built"
    depends_on_no_version(library)


@pytest.mark.parametrize("name", ["nsc_cpu", "nsc_cuda"])
def test_the_built_libraries_serve_every_torch_since_2_11(name: str) -> None:
    library = native.LIBRARY_DIR / f"lib{name}.so"
    if not library.is_file():
        pytest.skip(f"lib{name} is not built: {info.collect()['build']}")
    depends_on_no_version(library)
    if torch.version.cuda is not None or name == "nsc_cpu":
        # Without a GPU too: what is missing then is a device.
        assert native.load(name) is None


def test_the_report_says_which_build_of_torch_it_is() -> None:
    """2.11.0+cu130 where the installed distribution calls itself 2.11.0."""
    assert info.collect()["versions"]["torch"] == torch.__version__


def test_without_a_compiler_the_install_succeeds_and_says_so(source: Path) -> None:
    result = build(source, "wheel", CXX="/bin/false", NSC_BUILD_CPU="auto", NSC_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "the cpu library was not built" in result.stderr
    name, files = contents(source, "*.whl")
    assert name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in files)


def test_an_isolated_build_finds_the_torch_of_the_environment(source: Path) -> None:
    """pip's hides the packages of the environment: then only where they lie tells."""
    code = "import setup; print(setup.torch_dir())"
    # setup.py, without what it does when it is run.
    module = source / "isolated" / "setup.py"
    module.parent.mkdir()
    text = (source / "setup.py").read_text(encoding="utf-8")
    module.write_text(text[: text.index("\nsetup(")])
    hidden = "import importlib.util; importlib.util.find_spec = lambda name: None; "
    for start in ("", hidden):
        done = subprocess.run(
            [sys.executable, "-c", start + code], cwd=module.parent, capture_output=True, text=True, check=False
        )
        assert Path(done.stdout.strip()) == Path(torch.__file__).parent, done.stderr
    elsewhere = f"{hidden}import sysconfig; sysconfig.get_path = lambda scheme: '/nowhere'; "
    done = subprocess.run(
        [sys.executable, "-c", elsewhere + code], cwd=module.parent, capture_output=True, text=True, check=False
    )
    assert "torch is not there: install it first (pip install torch)" in done.stderr


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
    assert {"nsc_kernels/reference.py", "python/nsc_merge/__init__.py", "tests/kernels/test_operator.py"} <= files
    assert not any(name.endswith((".so", "_build.json", ".pyc")) for name in files)

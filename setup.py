"""Builds the native libraries with CMake; everything else is in pyproject.toml.

Environment:
    NSC_BUILD_CPU, NSC_BUILD_CUDA   auto: build if possible, say what is missing and go on without (default);
                                    CUDA's beside a torch that has CUDA, as it loads beside no other
                                    1: build or fail; 0: do not build
    CXX, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST   as PyTorch extensions use them; the CUDA kernels need 9.0 or newer

torch has to be there before (its headers are compiled against), and is no requirement of the build: pip would download
a second one, of gigabytes, for an isolated build. That finds the torch of the environment that it installs into.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
PACKAGE = "nsc_kernels"
TORCH_ABI = "2.11"


def build_mode(variable: str) -> str:
    value = os.environ.get(variable, "auto").strip().lower()
    mode = {"": "auto", "on": "1", "true": "1", "off": "0", "false": "0"}.get(value, value)
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"{variable}: expected auto, 1 or 0, found {value!r}")
    return mode


def torch_dir() -> Path:
    """Where torch is installed; found without importing it, which works where libtorch cannot load."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    # pip hides the packages of the environment from an isolated build, and not where they are.
    for scheme in ("platlib", "purelib"):
        found = Path(sysconfig.get_path(scheme)) / "torch"
        if (found / "version.py").is_file():
            return found
    raise RuntimeError(
        "torch is not there: install it first (pip install torch), and where the build is isolated in an environment "
        "of its own, as uv's is, use --no-build-isolation"
    )


def demand_cuda_of(torch: Path) -> None:
    """Refuse a minute of nvcc for a library that the torch it is built beside cannot load."""
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise RuntimeError("the torch beside it had no CUDA: install it again beside one that has, or NSC_BUILD_CUDA=1")


def required_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found")
    return path


def nvcc() -> Path:
    """The CUDA compiler: of CUDA_HOME, else on the PATH, else where the toolkit installs itself."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    on_path = shutil.which("nvcc")
    candidates = [home / "bin" / "nvcc" for home in homes] + ([Path(on_path)] if on_path else [])
    for path in [*candidates, Path("/usr/local/cuda/bin/nvcc")]:
        if path.is_file():
            return path
    raise RuntimeError("nvcc was not found (CUDA_HOME says where the toolkit is)")


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, as CMake writes it and without what lacks thread block clusters; Hopper if unset."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or ["9.0a"]
    chosen = []
    for arch in asked:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0a or 10.0+PTX, found {arch!r}")
        if int(found[1]) >= 9:
            name = found[1] + found[2] + found[3]
            chosen += [f"{name}-real"] + ([f"{name}-virtual"] if found[4] else [])
    if not chosen:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST={' '.join(asked)}: the kernels need 9.0 or newer")
    return ";".join(dict.fromkeys(chosen))


class BuildNative(build_ext):
    """Runs CMake once per native library and leaves a record of what came of it in ``_build.json``."""

    def run(self) -> None:
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        record: dict[str, object] = {"torch_abi": TORCH_ABI}
        for library in ("cpu", "cuda"):
            variable = f"NSC_BUILD_{library.upper()}"
            mode = build_mode(variable)
            if mode == "auto" and not (ROOT / "csrc" / library).is_dir():
                mode = "0"
            if mode == "0":
                record[library] = "not asked for"
                continue
            try:
                if library == "cuda" and mode == "auto":
                    demand_cuda_of(torch_dir())
                record.update(self.build_library(library, destination))
                record[library] = "built"
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                if mode == "1":
                    raise
                record[library] = f"not built: {error}"
                print(f"{PACKAGE}: the {library} library was not built: {error}", file=sys.stderr)
        (destination / PACKAGE).mkdir(parents=True, exist_ok=True)
        (destination / PACKAGE / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def build_library(self, library: str, destination: Path) -> dict[str, object]:
        torch = torch_dir()
        cmake = required_tool("cmake")
        compiler = os.environ.get("CXX") or required_tool("c++")
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
        build = Path(self.build_temp).resolve() / library
        build.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        configure += [f"-DNSC_TORCH_DIR={torch}", f"-DCMAKE_INSTALL_PREFIX={destination}"]
        configure += [f"-DNSC_BUILD_{name.upper()}={'ON' if name == library else 'OFF'}" for name in ("cpu", "cuda")]
        configure += [f"-DCMAKE_CXX_COMPILER={compiler}"]
        facts: dict[str, object] = {}
        if library == "cuda":
            architectures = cuda_architectures()
            toolkit = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
            facts = {"cuda_architectures": architectures, "nvcc": toolkit.stdout.strip().splitlines()[-1]}
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc()}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
            configure += [f"-DCMAKE_CUDA_HOST_COMPILER={compiler}"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)
        subprocess.run([cmake, "--install", str(build)], check=True)
        found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
        return facts | {
            f"{library}_compiler": version.stdout.splitlines()[0],
            "torch": found[1] if found else "unknown",
        }

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class NativeWheel(bdist_wheel):
    """The libraries use no symbol of CPython, so one wheel serves every Python 3 of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = list((Path(self.bdist_dir or "") / PACKAGE / "lib").glob("*.so"))
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
    + find_packages("python", include=["nsc_merge", "nsc_merge.*"]),
    package_dir={"nsc_merge": "python/nsc_merge"},
    ext_modules=[Extension(f"{PACKAGE}._libraries", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)

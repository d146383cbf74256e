"""That the emulator would notice: the barriers and waits of the CUDA kernels taken out in turn."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import NamedTuple

import harness
import pytest
import torch
from harness import Emulator, EmulatorError, How, Variant

from nsc_kernels import reference
from nsc_kernels.verify.problems import problem


class Mutant(NamedTuple):
    """A line of a source, and the call in it that is taken out."""

    what: str
    source: str
    line: str
    call: str


EMPTY = "if (step > 0) wait_phase(empty + (step - 1) % S, (step - 1) / S % 2);"
FULL = "wait_phase(full + step % S, step / S % 2);"
MUTANTS = [
    Mutant("before the partials are read", "kernel.inl", "sync_cluster();  // every partial", "sync_cluster();"),
    Mutant("before c is read", "kernel.inl", "sync_cluster();  // every c is there", "sync_cluster();"),
    Mutant("after the shrink", "kernel.inl", "wait_copies<0>();\n  sync_block();\n}", "sync_block();"),
    Mutant("before the output is copied out", "kernel.inl", "sync_block();\n    copier.store", "sync_block();"),
    Mutant("before a row is added", "kernel.inl", "sync_warp();\n    if (products)", "sync_warp();"),
    Mutant("before dlam is added", "kernel.inl", "sync_block();\n  const float* warp_sums", "sync_block();"),
    Mutant(
        "between the steps of the expand",
        "kernel.inl",
        "sync_block();\n    load(step + S - 1);\n    unsigned char* w_tile",
        "sync_block();",
    ),
    Mutant("before a stage is filled", "warpgroup.inl", EMPTY, EMPTY),
    Mutant("before x is read", "warpgroup.inl", FULL + "\n    const unsigned char* x_tile", FULL),
    Mutant("after the shrink", "warpgroup.inl", "  }\n  sync_block();\n}", "sync_block();"),
    Mutant("before a tile leaves", "warpgroup.inl", "sync_warpgroup(group);", "sync_warpgroup(group);"),
    Mutant("before the output's place is filled", "warpgroup.inl", "wait_stores();", "wait_stores();"),
]

VARIANT = Variant(128, 64)


def right(library: Path) -> bool:
    """Whether every order of threads and copies gives the bits of the mirror."""
    emulator = Emulator(library)
    p = problem(70, 776, 840, (16,) * 6, torch.bfloat16, torch.device("cpu"))
    u = reference.forward(p.z, p.A, p.Bt, p.offsets, p.lam, None, False)[3]
    inputs = (p.A, p.Bt, p.offsets, p.lam)

    def results(how: How) -> list[torch.Tensor]:
        return [
            *emulator.forward(how, p.z, *inputs, p.base),
            *emulator.backward(how, p.dy, p.dquad, p.dsqnorm, u, p.z, *inputs, None),
        ]

    expected = results(How(VARIANT, 2, mirror=True))
    settings = itertools.product(harness.ORDERS, harness.COPIES)
    try:
        return all(all(map(torch.equal, results(How(VARIANT, 2, *setting)), expected)) for setting in settings)
    except (EmulatorError, AssertionError):  # a deadlock, or a counter that is not left at zero
        return False


def switched(source: str, name: str) -> str:
    """A source in which the call of mutant ``number`` is left out while ``left_out`` is its number."""
    for number, mutant in enumerate(MUTANTS, 1):
        if mutant.source == name:
            assert source.count(mutant.line) == 1, mutant.what
            assert mutant.line.count(mutant.call) == 1, mutant.what
            with_switch = mutant.line.replace(mutant.call, f"if (left_out != {number}) {{ {mutant.call} }}")
            source = source.replace(mutant.line, with_switch)
    return source


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The emulator of each kernel, every call of its mutants with a switch: compiled once."""
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    built = {}
    for name in ("kernel.inl", "warpgroup.inl"):
        folder = tmp_path_factory.mktemp(name.partition(".")[0])
        harness.copy_sources(folder, VARIANT)
        for source in ("kernel.inl", "warpgroup.inl"):
            (folder / source).write_text(switched((folder / source).read_text(), source))
        problem = folder / "problem.h"
        begin = "namespace nsc::cuda {\n"
        assert problem.read_text().count(begin) == 1
        problem.write_text(problem.read_text().replace(begin, begin + "\ninline int left_out = 0;\n"))
        built[name] = harness.build(folder, csrc=folder, warpgroup=name == "warpgroup.inl")
    return built


def leave_out(library: Path, number: int) -> None:
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "_ZN3nsc4cuda8left_outE").value = number


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.source}: {m.what}")
def test_without_one_of_them_it_is_wrong(libraries: dict[str, Path], mutant: Mutant) -> None:
    library = libraries[mutant.source]
    leave_out(library, MUTANTS.index(mutant) + 1)
    assert not right(library)


@pytest.mark.parametrize("source", ["kernel.inl", "warpgroup.inl"])
def test_with_all_of_them_it_is_right(libraries: dict[str, Path], source: str) -> None:
    """After the wrong ones, which have left nothing behind in the library."""
    leave_out(libraries[source], 0)
    assert right(libraries[source])

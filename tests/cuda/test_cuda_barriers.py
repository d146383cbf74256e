"""That the emulator would notice: the barriers and waits of the CUDA kernels taken out in turn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import harness
import pytest
import torch
from harness import Emulator, EmulatorError, How, Variant

from nsc_kernels import reference

problems = pytest.importorskip("problems", reason="triton is not installed", exc_type=ImportError)


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


def right(folder: Path, warpgroup: bool) -> bool:
    """Build ``folder``: whether every order of threads and copies gives the bits of the mirror."""
    emulator = Emulator(harness.build(folder, csrc=folder, warpgroup=warpgroup))
    p = problems.problem(70, 776, 840, (16,) * 6, torch.bfloat16, torch.device("cpu"))
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


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    harness.copy_sources(tmp_path, VARIANT)
    return tmp_path


@pytest.mark.parametrize("warpgroup", [False, True], ids=["mma", "wgmma"])
def test_with_all_of_them_it_is_right(sources: Path, warpgroup: bool) -> None:
    assert right(sources, warpgroup)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.source}: {m.what}")
def test_without_one_of_them_it_is_wrong(sources: Path, mutant: Mutant) -> None:
    source = (sources / mutant.source).read_text()
    assert source.count(mutant.line) == 1
    assert mutant.line.count(mutant.call) == 1
    without = mutant.line.replace(mutant.call, "")
    (sources / mutant.source).write_text(source.replace(mutant.line, without))
    assert not right(sources, mutant.source == "warpgroup.inl")

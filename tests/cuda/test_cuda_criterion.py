"""The criterion itself: a right kernel passes it under matrix units that round and that cut off, a wrong one does not.

The faults are planted in the kernel's own source, as expressions that a number chooses at run time, and run on the
emulator. Each must be off by ten times what the criterion allows: one that is only just refused would be accepted with
other random numbers.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import harness
import numpy as np
import pytest
import torch
from harness import Emulator, How, Variant

from nsc_kernels import reference
from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.verify.cases import Case
from nsc_kernels.verify.check import Run
from nsc_kernels.verify.problems import problem, wide

VARIANT = Variant(128, 64)


class Fault(NamedTuple):
    """``right`` stands in kernel.inl, followed by ``after``; ``wrong`` is what it becomes."""

    what: str
    right: str
    wrong: str
    after: str = ""


FAULTS = [
    Fault("u rounded before quad", "sum[i] * sum[i]", "square(to_float<E>(to_half<E>(sum[i])))"),
    Fault("a missed slice", "there[i]", "(b == 1 ? 0.0f : there[i])", ";\n      }\n      float c[4]"),
    Fault(
        "a stale z tile",
        "(step % S)",
        "((step == 2 ? 1 : step) % S)",
        " * P::shrink_slot;\n    const unsigned char* w_tile",
    ),
    Fault("lam of the wrong adapter", "lam[k]", "lam[(k + 1) % p.K]", " * sum[i];"),
    Fault("dlam of one tile missing", "i < tiles", "i < tiles - 1", "; i += 32)"),
    Fault("the last token left out", "p.T", "(p.T - 1)", ", column, p.d_in);\n      copier.load<P::Ranks>"),
    Fault("base added twice", "1.0f", "2.0f", ");\n          if (tail)"),
    Fault("dsqnorm without the 2", "2.0f", "1.0f", " * p.dsqnorm[t]"),
    Fault("dquad without the 2", "2.0f", "1.0f", " * p.dquad["),
    Fault("c of another token", "row * P::c_stride", "(row ^ 1) * P::c_stride", " + j * 2;"),
]


def planted(source: str) -> str:
    """kernel.inl with every fault in it, each while ``planted`` is its number from one on."""
    for number, fault in enumerate(FAULTS, 1):
        assert source.count(fault.right + fault.after) == 1, fault.what
        choice = f"(planted == {number} ? {fault.wrong} : {fault.right})"
        source = source.replace(fault.right + fault.after, choice + fault.after)
    begin = (
        "namespace nsc::cuda {\n\ninline int planted = 0;\ninline float square(float value) { return value * value; }\n"
    )
    return source.replace("namespace nsc::cuda {\n", begin, 1)


class Faulty:
    """The emulator with the faults; as a backend it serves as ``nsc_kernels.verify`` calls one."""

    def __init__(self, emulator: Emulator):
        self.emulator = emulator
        self.fault = ctypes.c_int.in_dll(emulator.library, "_ZN3nsc4cuda7plantedE")
        self.unit, self.cluster = "rounding", 2

    def backend(self) -> SimpleNamespace:
        how = How(VARIANT, self.cluster, unit=self.unit)

        def forward(call: ForwardCall) -> Any:
            return self.emulator.forward(how, *call[:8])

        def backward(call: BackwardCall) -> Any:
            return self.emulator.backward(how, *call[:12])

        return SimpleNamespace(forward=forward, backward=backward)


def build_faulty(folder: Path) -> Faulty:
    harness.copy_sources(folder, VARIANT)
    kernel = folder / "kernel.inl"
    kernel.write_text(planted(kernel.read_text()))
    return Faulty(Emulator(harness.build(folder, csrc=folder, fast=True)))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return build_faulty(tmp_path_factory.mktemp("faulty"))


def worst(run: Run) -> dict[str, float]:
    """Error over bound of every result; not a number counts as infinite."""
    ratios = {name: error / bound if bound else float(error > 0) for name, (error, bound) in run.check().items()}
    return {name: ratio if ratio == ratio else float("inf") for name, ratio in ratios.items()}


CASES = [
    Case(130, 776, 840, (16,) * 6, "bfloat16"),
    Case(67, 4096, 264, (16,) * 6, "bfloat16"),
    Case(130, 776, 840, (3, 0, 16, 5, 1, 7), "float16", per_row=True),
]


@pytest.mark.parametrize("unit", harness.UNITS)
@pytest.mark.parametrize("cluster", [1, 4])
def test_a_right_kernel_passes_with_room(faulty: Faulty, unit: str, cluster: int) -> None:
    faulty.fault.value, faulty.unit, faulty.cluster = 0, unit, cluster
    for case in CASES:
        for name, ratio in worst(Run(faulty.backend(), case, torch.device("cpu"))).items():
            assert ratio <= 0.75, f"{case}: {name} at {ratio:.2f} of its bound"


def test_what_truncation_costs_is_more_than_eager_float32(faulty: Faulty) -> None:
    """Else the additional terms of the criterion would be for nothing."""
    faulty.fault.value, faulty.unit, faulty.cluster = 0, "truncating", 1
    run = Run(faulty.backend(), CASES[1], torch.device("cpu"))
    p = run.p
    quad = run()["quad"]
    exact = reference.forward(*wide((p.z, p.A, p.Bt, p.offsets, p.lam, None)), True)[1]
    eager = reference.forward(p.z, p.A, p.Bt, p.offsets, p.lam, None, True)[1]
    assert (quad - exact).abs().max() > 4 * (eager - exact).abs().max()


def test_the_unit_is_the_one_of_the_triton_tests(faulty: Faulty) -> None:
    """Adapters of rank 1 show every sum of the shrink, unrounded, as its square."""
    interpreter = pytest.importorskip("interpreter_bf16")
    p = problem(5, 136, 8, (1,) * 16, torch.bfloat16, torch.device("cpu"))
    faulty.fault.value, faulty.unit, faulty.cluster = 0, "truncating", 1
    quad = faulty.backend().forward(ForwardCall(p.z, p.A, p.Bt, p.offsets, p.lam, None, True, True))[1]
    z, A = p.z.float().numpy(), p.A.float().numpy()
    u = torch.from_numpy(interpreter.truncated_dot(z, A.T, np.zeros((5, 16))))
    assert torch.equal(quad, u * u)


# Truncation costs the criterion its room: under rounding, the two faults that are off by least are enough.
CLOSEST = [("rounding", number) for number, fault in enumerate(FAULTS, 1) if fault.what.startswith(("u ", "dquad "))]


@pytest.mark.parametrize(
    ("unit", "number"),
    [*(("truncating", number) for number in range(1, len(FAULTS) + 1)), *CLOSEST],
    ids=lambda value: value if isinstance(value, str) else FAULTS[value - 1].what,
)
def test_a_wrong_one_is_refused_by_ten_times(faulty: Faulty, number: int, unit: str) -> None:
    faulty.fault.value, faulty.unit, faulty.cluster = number, unit, 2
    for case in CASES[:2]:
        ratios = worst(Run(faulty.backend(), case, torch.device("cpu")))
        assert max(ratios.values()) >= 10, f"{case}: {ratios}"

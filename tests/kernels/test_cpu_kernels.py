"""What is particular to the C++ kernels: instruction sets, threads, unwritten memory, large tensors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_operator import require

import nsc_kernels as nk
import operator_cases as oc
from nsc_kernels import dispatch, native, reference
from nsc_kernels.backends import two_gemms
from nsc_kernels.contract import BackwardCall, ForwardCall

TESTS = Path(__file__).parents[1]  # where the grid is


def instruction_sets() -> tuple[str, ...]:
    return native.cpu_instruction_sets()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that may import the grid, in a process of its own: the choice under test is made once per process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )


GRID = """
import torch, entry_cases, operator_cases as oc
for seed in range(12):
    entry_cases.check(seed)
for dtype in oc.DTYPES.values():
    for case in oc.CASES:
        torch.manual_seed(0)
        try:
            oc.check_against_oracle("cpu", oc.make_inputs(case, dtype))
        except AssertionError as error:
            raise SystemExit(f"{case.name} {dtype}: {error}")
print("grid passed")
"""


@pytest.mark.parametrize("isa", instruction_sets()[1:])
def test_every_instruction_set_passes_the_grid(isa: str) -> None:
    result = run_python(GRID, NSC_CPU_ISA=isa)
    assert result.stdout == "grid passed\n", result.stdout + result.stderr


def test_nothing_is_left_unwritten() -> None:
    """glibc fills every allocation with 0x7f bytes, which is a large number in every dtype."""
    require("cpu")
    result = run_python(GRID, MALLOC_PERTURB_="128")
    assert result.stdout == "grid passed\n", result.stdout + result.stderr


def test_an_instruction_set_this_processor_lacks_is_refused() -> None:
    require("cpu")
    code = """
import torch, nsc_kernels as nk
bank = nk.AdapterBank.from_factors([torch.ones(1, 4)], [torch.ones(3, 1)])
nk.merged_lora(torch.ones(1, 4), bank, torch.ones(1))
"""
    result = run_python(code, NSC_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "NSC_CPU_ISA=sse9: expected one of" in result.stderr


@pytest.mark.parametrize("dtype", oc.DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype: str) -> None:
    require("cpu")
    case = oc.Case("threads", T=1003, d_in=256, d_out=192, ranks=(16, 7, 32))
    inputs = oc.make_inputs(case, oc.DTYPES[dtype])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(oc.run("cpu", inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("rows", "T"), [(2, 1), (11, 3), (11, 5), (400, 12), (400, 13), (400, 95), (400, 96), (400, 97), (400, 385)]
)
def test_a_row_has_the_same_bits_wherever_it_stands(rows: int, T: int) -> None:
    """Among as many rows as are summed in one order: how many there are in all may decide that, and nothing else."""
    require("cpu")
    case = oc.Case("rows", T=rows, d_in=130, d_out=70, ranks=(16, 7))
    inputs = oc.make_inputs(case, torch.float32)
    with nk.use_backend("cpu"):
        whole = nk.merged_lora_nsc(inputs.z, inputs.bank, inputs.lam, inputs.base)
        part = nk.merged_lora_nsc(inputs.z[:T], inputs.bank, inputs.lam, inputs.base[:T])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[:T], b)


def available_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


@pytest.mark.skipif(available_memory() < 14 * 2**30, reason="needs 14 GiB of free memory")
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond int32, in elements and in bytes: the last rows must come out as they do alone."""
    require("cpu")
    # As many rows at the ends together as are multiplied by the same instructions as all of them.
    n, T, d = 16, 2**31 // 1024 + 40, 1024
    bank = nk.AdapterBank.from_factors([torch.randn(1, d)], [torch.randn(8, 1)], dtype=torch.bfloat16)
    # NumPy's zeros are pages that the system gives only when they are written.
    z = torch.from_numpy(np.zeros((T, d), dtype=np.int16)).view(torch.bfloat16)
    z[:n] = torch.randn(n, d)
    z[-n:] = torch.randn(n, d)
    lam = torch.ones(1)
    with nk.use_backend("cpu"):
        y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam)
        ends = torch.cat([z[:n], z[-n:]])
        want = nk.merged_lora_nsc(ends, bank, lam)
    for tensor, expected in zip((y, quad, sqnorm), want, strict=True):
        assert torch.equal(torch.cat([tensor[:n], tensor[-n:]]), expected)
        assert not tensor[n:-n].any()
    dy = torch.ones(8, 8, dtype=torch.bfloat16).repeat(T // 8, 1)
    u = torch.zeros(T, 1, dtype=torch.bfloat16)
    u[:n], u[-n:] = z[:n] @ bank.A.t(), z[-n:] @ bank.A.t()
    backward = dispatch.load("cpu")[0].backward  # type: ignore[union-attr]
    rest = (bank.A, bank.Bt, bank.offsets, lam, None, True, True)
    dz, _ = backward(BackwardCall(dy, None, sqnorm, u, z, *rest))
    last = slice(-2 * n, None)
    row, _ = backward(BackwardCall(dy[last], None, sqnorm[last], u[last], z[last], *rest))
    assert torch.equal(dz[last], row)


def test_backward_adds_to_a_given_gradient() -> None:
    require("cpu")
    i = oc.make_inputs(oc.Case("accumulate", T=20), torch.float64)
    u = i.z @ i.bank.A.t()
    start = torch.randn_like(i.z)
    rest = (i.bank.A, i.bank.Bt, i.bank.offsets, i.lam)
    results = {}
    for name in ("reference", "cpu"):
        backward = dispatch.load(name)[0].backward  # type: ignore[union-attr]
        results[name] = backward(BackwardCall(i.dy, i.dquad, i.dsqnorm, u, i.z, *rest, start, True, True))
    for a, b in zip(results["reference"], results["cpu"], strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("per_row", [False, True])
def test_two_gemms_compute_y_and_dz(dtype: str, per_row: bool) -> None:
    case = oc.Case("gemms", T=70, d_in=96, d_out=80, ranks=(16, 7), per_row=per_row)
    i = oc.make_inputs(case, oc.DTYPES[dtype])
    factors = (i.bank.A, i.bank.Bt, i.bank.offsets, i.lam)
    u = reference.forward(i.z, *factors, i.base, False)[3]

    def wide(values: tuple) -> list:
        return [t.double() if isinstance(t, torch.Tensor) else t for t in values]

    def check(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        assert oc.relative_error(found, exact) <= 2 * oc.relative_error(eager, exact)

    for base in (i.base, None):
        forward = (i.z, *factors, base)
        found = two_gemms.forward(ForwardCall(*forward, False, True))
        check(found[0], reference.forward(*forward, False)[0], reference.forward(*wide(forward), False)[0])
        assert torch.equal(found[3], u)
    given = itertools.product((i.dy, None), (i.dquad, None), (i.dsqnorm, None), (i.z, None))
    for dy, dquad, dsqnorm, start in given:
        if dy is dquad is dsqnorm is None:
            continue
        backward = (dy, dquad, dsqnorm, u, i.z, *factors, start)
        found = two_gemms.backward(BackwardCall(*backward, True, False))
        exact = reference.backward(*wide(backward), True, False)[0]
        check(found[0], reference.backward(*backward, True, False)[0], exact)


def test_what_is_formed_from_unrounded_sums_is_not_left_to_two_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cpu")
    taken = []
    monkeypatch.setattr(two_gemms, "preferred", lambda dtype, *sizes: True)
    monkeypatch.setattr(two_gemms, "forward", lambda call: taken.append("forward") or (None,) * 4)
    monkeypatch.setattr(two_gemms, "backward", lambda call: taken.append("backward") or (None,) * 2)
    i = oc.make_inputs(oc.Case("gemms", T=70), torch.bfloat16)
    backend = dispatch.load("cpu")[0]
    assert backend is not None
    factors = (i.bank.A, i.bank.Bt, i.bank.offsets, i.lam)
    u = i.z @ i.bank.A.t()
    for stats in (True, False):
        backend.forward(ForwardCall(i.z, *factors, i.base, stats, True))
    for need_dz, need_dlam in ((True, True), (False, True), (True, False)):
        backend.backward(BackwardCall(i.dy, i.dquad, i.dsqnorm, u, i.z, *factors, None, need_dz, need_dlam))
    assert taken == ["forward", "backward"]


def test_two_gemms_are_taken_on_amx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (False, True):
        two_gemms.has_tiles.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda present=present: present)
        assert two_gemms.preferred(torch.bfloat16, 512, 4096) is present
        assert not two_gemms.preferred(torch.bfloat16, 8, 4096)
        assert not two_gemms.preferred(torch.float32, 512, 4096)
        for summed in (4095, 4112, 34):
            assert not two_gemms.preferred(torch.bfloat16, 512, summed)
    two_gemms.has_tiles.cache_clear()

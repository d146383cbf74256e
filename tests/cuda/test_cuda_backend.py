"""The backend as the dispatch sees it, and its Python side with the emulator in place of the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from harness import Emulator, How
from torch import Tensor

import nsc_kernels as nk
import operator_cases as oc
from nsc_kernels import dispatch, native, ops, verified_hardware
from nsc_kernels.backends import cuda as backend
from nsc_kernels.contract import Call, ForwardCall

GPU = torch.device("cuda", 0)
CALL = Call(GPU, torch.bfloat16, 100, 64, 72, (0, 8, 16))


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = nk.available_backends()["cuda"]
    assert reason in ("this torch is built without CUDA", "no CUDA device")


def test_what_it_does_not_compute_it_rejects_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_unsupported", lambda index: None)
    assert backend.rejects(CALL) is None
    assert "float32" in backend.rejects(CALL._replace(dtype=torch.float32))
    assert "multiples of 8, found 64 and 77" in backend.rejects(CALL._replace(d_out=77))
    assert "multiples of 8, found 3 and 72" in backend.rejects(CALL._replace(d_in=3))
    assert "513, more than 512" in backend.rejects(CALL._replace(offsets=(0, 513)))
    assert "65 adapters" in backend.rejects(CALL._replace(offsets=tuple(range(66))))
    assert "cpu" in backend.rejects(CALL._replace(device=torch.device("cpu")))
    monkeypatch.setattr(backend, "_unsupported", lambda index: "it is an old card")
    assert backend.rejects(CALL) == "it is an old card"


def test_the_automatic_choice_waits_for_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "cuda_source", lambda: "abc")
    monkeypatch.setattr(verified_hardware, "entries", lambda: ({"arch": "sm_90", "source": "abc"},))
    assert "not yet shown correct on sm_90" in backend.unproven(CALL)
    monkeypatch.setattr(
        verified_hardware, "entries", lambda: ({"backend": "cuda", "arch": "sm_90", "source": "older"},)
    )
    assert "not yet shown correct on sm_90" in backend.unproven(CALL)
    monkeypatch.setattr(verified_hardware, "entries", lambda: ({"backend": "cuda", "arch": "sm_90", "source": "abc"},))
    assert backend.unproven(CALL) is None


def test_no_entry_of_the_ledger_is_about_a_library_of_unknown_source() -> None:
    assert all(e["source"] for e in verified_hardware.entries() if verified_hardware.backend_of(e) == "cuda")


def test_rows_that_cannot_be_copied_in_pieces_of_16_bytes_are_copied_once() -> None:
    whole = torch.randn(6, 32).bfloat16()
    for fine in (whole, whole[:, 8:24], whole[:1, :24], whole[2:3], whole[:1].expand(4, -1)):
        assert backend.aligned(fine) is fine
    for off in (whole[:, 2:18], torch.randn(6, 36).bfloat16()[:, :32]):
        copy = backend.aligned(off)
        assert torch.equal(copy, off)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
    assert backend.aligned(None) is None


@pytest.fixture
def emulated(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[How]]:
    """The backend serving CPU tensors through the emulator; yields how each launch was run."""
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    used: list[How] = []

    def how(T: int, R: int, d: Sequence[int], variant: int, cluster: int) -> How:
        chosen = emulator.variants[variant] if variant >= 0 else emulator.choose_variant(T, R, 132)
        tiles = -(-T // chosen.tokens)
        used.append(How(chosen, cluster or emulator.choose_cluster(tiles, *d, (264, 132, 66, 33, 0))))
        return used[-1]

    def stride(t: Tensor | None) -> int:
        return 0 if t is None else t.stride(0)

    def forward(z, A, Bt, offsets, lam, base, y, quad, sqnorm, u, variant=-1, cluster=0) -> None:
        T, (R, d_in), d_out = z.shape[0], A.shape, Bt.shape[1]
        if not T:
            return
        emulator._run(
            how(T, R, (d_in, d_out), variant, cluster), False, z.dtype, offsets, T=T, d_in=d_in, d_out=d_out, x=z,
            x_stride=stride(z), w_in=A, w_out=Bt, lam=lam, lam_per_row=int(lam.dim() == 2), base=base,
            base_stride=stride(base), out=y, out_stride=stride(y), quad=quad, sqnorm=sqnorm, u_out=u,
        )  # fmt: skip

    def backward(
        dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, dz, dlam, parts, counter, variant=-1, cluster=0
    ) -> None:
        T, R = u.shape
        d_in, d_out = Bt.shape[1], A.shape[1]
        emulator._run(
            how(T, R, (d_in, d_out), variant, cluster), True, u.dtype, offsets, T=T, d_in=d_in, d_out=d_out, x=dy,
            x_stride=stride(dy), w_in=Bt, w_out=A, lam=lam, lam_per_row=int(lam.dim() == 2), base=dz_base,
            base_stride=stride(dz_base), out=dz, out_stride=stride(dz), u=u, dquad=dquad, dsqnorm=dsqnorm, z=z,
            z_stride=stride(z), dlam=dlam, parts=parts, counter=counter,
        )  # fmt: skip

    library.impl("cuda_forward", forward, "CPU")
    library.impl("cuda_backward", backward, "CPU")
    device_types = Call._replace
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "_unsupported", lambda index: None)
    rejects = backend.rejects
    monkeypatch.setattr(backend, "rejects", lambda call: rejects(device_types(call, device=GPU)))
    dispatch.load.cache_clear()
    dispatch.select.cache_clear()
    yield used
    dispatch.load.cache_clear()
    dispatch.select.cache_clear()
    library._destroy()


CASES = [case for case in oc.CASES if case.d_in % 8 == 0 and case.d_out % 8 == 0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_the_public_functions_pass_the_grid(emulated: list[How], case: oc.Case, dtype: str) -> None:
    oc.check_against_oracle("cuda", oc.make_inputs(case, oc.DTYPES[dtype]))
    assert bool(emulated) == bool(case.T)


def test_a_width_that_is_no_multiple_of_8_is_refused(emulated: list[How]) -> None:
    case = next(case for case in oc.CASES if case.name == "primes")
    with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot serve this call: .*multiples of 8"):
        oc.run("cuda", oc.make_inputs(case, torch.bfloat16))
    assert not emulated


def test_the_output_is_written_over_base_where_that_is_allowed(emulated: list[How]) -> None:
    inputs = oc.make_inputs(oc.Case("reuse", T=9), torch.bfloat16)
    bank = inputs.bank
    arguments = (inputs.z, bank.A, bank.Bt, bank.offsets, inputs.lam)
    fresh = backend.forward(ForwardCall(*arguments, inputs.base, True, True))
    assert fresh[0].data_ptr() != inputs.base.data_ptr()
    over = inputs.base.clone()
    y = backend.forward(ForwardCall(*arguments, over, True, True, True))[0]
    assert y.data_ptr() == over.data_ptr()
    assert torch.equal(y, fresh[0])
    repeated = inputs.base[:1].expand(9, -1)
    y = backend.forward(ForwardCall(*arguments, repeated, True, True, True))[0]
    assert y.data_ptr() != repeated.data_ptr()

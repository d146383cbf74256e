"""AdapterBank: whitening, packing, checks, files."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nsc_kernels as nk


def factors(ranks: tuple[int, ...], d_in: int = 20, d_out: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(r, d_in) for r in ranks], [torch.randn(d_out, r) for r in ranks]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    d_in=st.integers(1, 33),
    d_out=st.integers(1, 17),
    seed=st.integers(0, 2**16),
)
def test_whitening_keeps_the_update_and_orthonormalises_the_rows(
    ranks: list[int], d_in: int, d_out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = [torch.randn(r, d_in, generator=generator, dtype=torch.float64) for r in ranks]
    B = [torch.randn(d_out, r, generator=generator, dtype=torch.float64) for r in ranks]
    scaling = torch.rand(len(ranks), generator=generator, dtype=torch.float64).tolist()
    bank = nk.AdapterBank.from_factors(A, B, scaling)
    assert bank.ranks == tuple(min(r, d_in) for r in ranks)
    assert bank.A.shape == (bank.R, d_in)
    assert bank.B.shape == (d_out, bank.R)
    for k, (a, b) in enumerate(zip(A, B, strict=True)):
        rows = slice(bank.offsets[k], bank.offsets[k + 1])
        white, up = bank.A[rows], bank.B[:, rows]
        assert torch.allclose(white @ white.t(), torch.eye(len(white), dtype=torch.float64), atol=1e-12)
        assert torch.allclose(up @ white, scaling[k] * b @ a, atol=1e-10)


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4])
def test_ill_conditioned_factors_keep_their_quadratic_form(condition: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64))
    mix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)
    A = mix @ torch.diag(spectrum) @ q.t()
    bank = nk.AdapterBank.from_factors([A.float()], [torch.randn(6, 8)])
    z = torch.randn(100, 40)
    _, quad, _ = nk.merged_lora_nsc(z, bank, torch.ones(1))
    exact_rows = torch.linalg.qr(A.float().double().t())[0]
    exact = (z.double() @ exact_rows).square().sum(-1)
    assert torch.allclose(quad[:, 0].double(), exact, rtol=2e-6)


def test_rank_deficient_factors_yield_their_row_space() -> None:
    A = torch.randn(6, 20)
    A[3] = A[0]
    A[4] = 2 * A[1] - A[2]
    A[5] = 0
    B = torch.randn(12, 6)
    bank = nk.AdapterBank.from_factors([A], [B])
    assert bank.ranks == (3,)
    assert torch.allclose(bank.B @ bank.A, B @ A, atol=1e-5)
    assert nk.AdapterBank.from_factors([torch.zeros(4, 20)], [torch.randn(12, 4)]).ranks == (0,)


def test_rtol_decides_what_counts_as_zero() -> None:
    A = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    assert nk.AdapterBank.from_factors([A], [torch.eye(2)]).ranks == (2,)
    assert nk.AdapterBank.from_factors([A], [torch.eye(2)], rtol=1e-2).ranks == (1,)
    for rtol in (math.nan, math.inf, -1e-9, 1.0):
        with pytest.raises(ValueError, match=rf"rtol must lie in \[0, 1\), found {rtol}"):
            nk.AdapterBank.from_factors([A], [torch.eye(2)], rtol=rtol)


def test_a_short_row_under_a_long_column_is_not_taken_for_zero() -> None:
    A, B = torch.diag(torch.tensor([1.0, 1e-8])), torch.diag(torch.tensor([1.0, 1e8]))
    bank = nk.AdapterBank.from_factors([A], [B])
    assert bank.ranks == (2,)
    assert torch.allclose(bank.delta([1.0]), torch.eye(2))
    assert torch.allclose(nk.merged_lora_nsc(torch.ones(1, 2), bank, torch.ones(1))[1], torch.tensor([[2.0]]))
    huge = torch.diag(torch.tensor([1e300, 5e-324], dtype=torch.float64))
    assert nk.AdapterBank.from_factors([huge], [torch.eye(2, dtype=torch.float64)]).ranks == (2,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rank_and_quadratic_form_of_dependent_rows(dtype: torch.dtype) -> None:
    """Against the projector of NumPy's SVD, rows scaled to one length: duplicates, zero rows, rows of many scales."""
    for trial in range(150):
        generator = np.random.default_rng(trial)
        r, d = int(generator.integers(2, 17)), int(2 ** generator.uniform(2, 9))
        independent = int(generator.integers(1, r + 1))
        rows = generator.standard_normal((r, d))
        rows[independent:] = rows[generator.integers(0, independent, r - independent)]
        sizes = 2.0 ** generator.integers(-6, 6, (r, 1))
        A = torch.from_numpy(rows).to(dtype) * torch.from_numpy(sizes).to(dtype)
        unit = A.double().numpy() / np.linalg.norm(A.double().numpy(), axis=1, keepdims=True)
        spanned = np.linalg.svd(unit, full_matrices=False)[2][: min(independent, d)]
        bank = nk.AdapterBank.from_factors([A], [torch.zeros(1, r, dtype=dtype)], dtype=torch.float64)
        assert len(spanned) == bank.R, trial
        z = torch.from_numpy(generator.standard_normal((3, d)))
        quad = nk.merged_lora_nsc(z, bank, torch.ones(1, dtype=torch.float64))[1]
        expected = np.square(z.numpy() @ spanned.T).sum(1)
        assert np.allclose(quad[:, 0].numpy(), expected, rtol=1e-6, atol=1e-6), trial


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_delta(dtype: torch.dtype) -> None:
    A, B = factors((3, 5))
    bank = nk.AdapterBank.from_factors(A, B, [1.5, 2.0], dtype=dtype)
    assert bank.dtype is bank.A.dtype is bank.B.dtype is dtype
    delta = bank.delta([0.25, -1.0])
    assert delta.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    want = 0.25 * 1.5 * B[0] @ A[0] - 2.0 * B[1] @ A[1]
    assert torch.allclose(delta.float(), want, atol=3 * torch.finfo(dtype).eps * want.abs().max().item() + 1e-5)
    with pytest.raises(ValueError, match=r"lam must have shape \(2,\)"):
        bank.delta([1.0])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_dense_update_is_not_rounded_by_autocast(compiled: bool) -> None:
    bank = nk.AdapterBank.from_factors([torch.randn(4, 20)], [torch.randn(12, 4)])
    delta = torch.compile(bank.delta, backend="aot_eager", fullgraph=True) if compiled else bank.delta
    with torch.autocast("cpu", torch.bfloat16):
        found = delta([0.7])
    assert found.dtype is torch.float32
    assert torch.equal(found, bank.delta([0.7]))


def test_moves_copies_and_pickles() -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    z, lam = torch.randn(4, 20), torch.rand(2)
    y = nk.merged_lora(z, bank, lam)
    with torch.autocast("cpu", torch.bfloat16):
        nk.merged_lora(z, bank, lam)
    for other in (copy.deepcopy(bank), copy.copy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(nk.merged_lora(z, other, lam), y)
    assert bank.to(torch.float64).dtype is torch.float64
    assert bank.A.is_contiguous()
    assert bank.Bt.is_contiguous()


@pytest.mark.parametrize("factor", ["A", "Bt"])
def test_a_copy_for_autocast_follows_what_is_written_to_the_bank(factor: str) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    z, lam = torch.randn(4, 20), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = nk.merged_lora(z, bank, lam)
        assert bank.cast_for_autocast(torch.bfloat16) is bank.cast_for_autocast(torch.bfloat16)
        getattr(bank, factor).mul_(2)
        assert torch.equal(nk.merged_lora(z, bank, lam), 2 * y)


@pytest.mark.parametrize("swap", [lambda t, new: setattr(t, "data", new), torch.utils.swap_tensors])
def test_a_copy_for_autocast_follows_a_factor_that_gets_other_memory(swap: Callable[[Tensor, Tensor], None]) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    bank.cast_for_autocast(torch.bfloat16)
    new = torch.randn(5, 20)
    expected = new.bfloat16()
    swap(bank.A, new)
    assert torch.equal(bank.cast_for_autocast(torch.bfloat16).A, expected)


@pytest.mark.parametrize("change", ["replaced", "converted"])
def test_a_copy_for_autocast_is_not_of_a_bank_that_is_gone(change: str) -> None:
    """A freed tensor's place in memory is given to the next one, so often enough an id says nothing."""
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    for _ in range(100):
        bank.cast_for_autocast(torch.bfloat16)
        other = nk.AdapterBank.from_factors(*factors((3, 2)))
        if change == "replaced":
            bank.A = None  # type: ignore[assignment]
            bank.A = other.A.clone()
        else:
            bank.load_state_dict(other.state_dict(), assign=True)
            bank.double().float()
        assert torch.equal(bank.cast_for_autocast(torch.bfloat16).A, bank.A.bfloat16())
        assert torch.equal(bank.cast_for_autocast(torch.bfloat16).Bt, bank.Bt.bfloat16())


def test_a_copy_for_autocast_made_in_inference_mode_serves_gradients_later() -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    z, lam = torch.randn(4, 20), torch.rand(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            y = nk.merged_lora(z, bank, lam)
        again = nk.merged_lora(z, bank, lam)
    again.float().sum().backward()
    assert torch.equal(again, y)
    assert lam.grad is not None


def test_a_copy_for_autocast_of_buffers_made_in_inference_mode_follows_them() -> None:
    with torch.inference_mode():
        bank = nk.AdapterBank.from_factors(*factors((3, 2)))
        bank.cast_for_autocast(torch.bfloat16)
        bank.Bt.mul_(2)
    copy_ = bank.cast_for_autocast(torch.bfloat16)
    assert torch.equal(copy_.Bt, bank.Bt.bfloat16())
    z, lam = torch.randn(4, 20), torch.rand(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        nk.merged_lora(z, bank, lam).float().sum().backward()
    assert lam.grad is not None


def test_many_banks_at_once_are_rounded_by_autocast_as_one_by_one() -> None:
    """What vmap makes of a factor has no memory of its own to tell a kept copy by."""
    layer = nk.MergedLoRALinear(nn.Linear(20, 12), nk.AdapterBank.from_factors(*factors((3, 2))), [0.3, 0.6])
    z, many = torch.randn(4, 20), torch.randn(3, 5, 20)

    def call(A: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"bank.A": A}, (z,))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = torch.vmap(call)(many), torch.stack([call(A) for A in many])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("move", [lambda bank: bank.double(), lambda bank: bank.to("meta")])
def test_a_bank_that_is_moved_leaves_nothing_behind(move: Callable[[nk.AdapterBank], object]) -> None:
    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    left = [weakref.ref(t) for t in (bank.A, bank.Bt, bank.cast_for_autocast(torch.bfloat16).A)]
    move(bank)
    assert [ref() for ref in left] == [None] * 3


def test_factors_that_somebody_put_another_way_are_found() -> None:
    class Doubled(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    bank = nk.AdapterBank.from_factors(*factors((3, 2)))
    z, lam = torch.randn(4, 20), torch.rand(2)
    y = nk.merged_lora(z, bank, lam)
    nn.utils.parametrize.register_parametrization(bank, "Bt", Doubled())
    assert torch.equal(nk.merged_lora(z, bank, lam), 2 * y)
    bank.A = nn.Parameter(bank.A)
    with pytest.raises(RuntimeError, match="bank.A requires a gradient"):
        nk.merged_lora(z, bank, lam)


GOOD_A, GOOD_B = torch.ones(2, 6), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("A", "B", "options", "error", "words"),
    [
        ([], [], {}, ValueError, "at least one"),
        ([GOOD_A], [], {}, ValueError, "found 1 and 0"),
        ([GOOD_A] * 4097, [GOOD_B] * 4097, {}, ValueError, "at most 4096 adapters per layer, found 4097"),
        ([GOOD_A, torch.ones(2, 7)], [GOOD_B] * 2, {}, ValueError, r"adapter 1: expected A \[r, 6\].*found A \(2, 7\)"),
        ([GOOD_A] * 2, [GOOD_B, torch.ones(5, 2)], {}, ValueError, r"adapter 1: .*B \[4, r\].*B \(5, 2\)"),
        ([GOOD_A] * 2, [GOOD_B, torch.ones(4, 3)], {}, ValueError, "adapter 1"),
        ([GOOD_A, torch.ones(6)], [GOOD_B] * 2, {}, ValueError, r"A\[1\] must be a matrix, found shape \(6,\)"),
        ([GOOD_A, GOOD_A.int()], [GOOD_B] * 2, {}, TypeError, r"A\[1\] must be one of float64"),
        ([GOOD_A, [1.0]], [GOOD_B] * 2, {}, TypeError, r"A\[1\] must be a tensor, found list"),
        ([GOOD_A, GOOD_A.double()], [GOOD_B] * 2, {}, TypeError, r"A\[1\] is torch.float64 but A\[0\]"),
        ([GOOD_A, GOOD_A.to("meta")], [GOOD_B] * 2, {}, ValueError, r"A\[1\] is on meta but A\[0\] is on cpu"),
        ([GOOD_A.to("meta")], [GOOD_B.to("meta")], {}, ValueError, r"A\[0\] is on the meta device"),
        ([GOOD_A, GOOD_A * float("nan")], [GOOD_B] * 2, {}, ValueError, r"A\[1\] holds 12 NaN"),
        ([GOOD_A] * 2, [GOOD_B, GOOD_B / 0], {}, ValueError, r"B\[1\] holds 8 NaN or infinite"),
        ([GOOD_A], [GOOD_B], {"scaling": [1.0, 2.0]}, ValueError, r"per adapter \(1\), found 2"),
        ([GOOD_A], [GOOD_B], {"scaling": [float("inf")]}, ValueError, r"scaling\[0\] must be finite"),
        ([GOOD_A], [GOOD_B], {"dtype": torch.int32}, TypeError, "dtype must be one of"),
        ([GOOD_A], [GOOD_B], {"dtype": torch.float16, "scaling": [1e6]}, ValueError, r"B\[0\].*overflows"),
    ],
)
def test_bad_factors(A: list, B: list, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nk.AdapterBank.from_factors(A, B, **options)


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 4), (6, 0)])
def test_a_layer_has_inputs_and_outputs(d_in: int, d_out: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        nk.AdapterBank(torch.zeros(2, d_in), torch.zeros(2, d_out), (0, 2))
    with pytest.raises(ValueError, match="must be"):
        nk.AdapterBank.from_factors([torch.zeros(2, d_in)], [torch.zeros(d_out, 2)])


def test_mixed_dtypes_are_taken_when_the_result_is_named() -> None:
    bank = nk.AdapterBank.from_factors([GOOD_A, GOOD_A.bfloat16()], [GOOD_B, GOOD_B.half()], dtype=torch.float32)
    assert bank.dtype is torch.float32


@pytest.mark.parametrize("offsets", [(0,), (1, 2), (0, 1), (0, 2, 1, 2), ()])
def test_bad_offsets(offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="offsets must rise from 0 to R=2"):
        nk.AdapterBank(torch.zeros(2, 6), torch.zeros(2, 4), offsets)


@pytest.mark.parametrize("offsets", [(0, 1.5, 2), (0, math.nan, 2), ("0", "2"), (0, 2.0)])
def test_offsets_are_ints(offsets: tuple) -> None:
    with pytest.raises(TypeError, match="offsets must be ints, found"):
        nk.AdapterBank(torch.zeros(2, 6), torch.zeros(2, 4), offsets)

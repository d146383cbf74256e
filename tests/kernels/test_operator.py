"""Every backend against the float64 oracle, over the whole grid."""

from __future__ import annotations

import pytest
import torch

import nsc_kernels as nk
import operator_cases as oc

BACKENDS = ("reference", "cpu")


def require(backend: str) -> None:
    reason = nk.available_backends()[backend]
    if reason is not True:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", oc.DTYPES)
@pytest.mark.parametrize("case", oc.CASES, ids=lambda c: c.name)
def test_matches_the_oracle(backend: str, dtype: str, case: oc.Case) -> None:
    require(backend)
    oc.check_against_oracle(backend, oc.make_inputs(case, oc.DTYPES[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", oc.DTYPES)
def test_is_bitwise_repeatable(backend: str, dtype: str) -> None:
    require(backend)
    inputs = oc.make_inputs(oc.Case("several_blocks", T=205, ranks=(8, 5, 8)), oc.DTYPES[dtype])
    first = oc.run(backend, inputs)
    for _ in range(5):
        again = oc.run(backend, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    require(backend)
    bank = oc.make_bank(oc.Case("leading"), torch.float32)
    z, base = torch.randn(*shape, 48), torch.randn(*shape, 40)
    shared, per_row = torch.rand(2), torch.rand(*shape, 2)
    with nk.use_backend(backend):
        y, quad, sqnorm = nk.merged_lora_nsc(z, bank, per_row, base)
        assert (y.shape, quad.shape, sqnorm.shape) == ((*shape, 40), (*shape, 2), shape)
        flat = nk.merged_lora(z.reshape(-1, 48), bank, per_row.reshape(-1, 2), base.reshape(-1, 40))
        assert torch.equal(y.reshape(-1, 40), flat)
        same = shared.expand(*shape, 2)
        assert torch.allclose(nk.merged_lora(z, bank, shared), nk.merged_lora(z, bank, same), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["dy", "dquad", "dsqnorm"])
@pytest.mark.parametrize("per_row", [False, True])
def test_an_output_without_a_gradient(backend: str, missing: str, per_row: bool) -> None:
    """None and zero are the same gradient."""
    require(backend)
    inputs = oc.make_inputs(oc.Case("case", T=15, per_row=per_row), torch.float64)
    upstream = {"dy": inputs.dy, "dquad": inputs.dquad, "dsqnorm": inputs.dsqnorm}
    setattr(inputs, missing, torch.zeros_like(upstream[missing]))
    expected = oc.oracle(inputs)
    z, lam = inputs.z.requires_grad_(), inputs.lam.requires_grad_()
    with nk.use_backend(backend):
        outputs = dict(zip(upstream, nk.merged_lora_nsc(z, inputs.bank, lam, inputs.base), strict=True))
        del outputs[missing], upstream[missing]
        dz, dlam = torch.autograd.grad(list(outputs.values()), (z, lam), list(upstream.values()), allow_unused=True)
    assert torch.allclose(dz, expected["dz"], atol=1e-12)
    dlam = torch.zeros_like(lam) if dlam is None else dlam
    assert torch.allclose(dlam, expected["dlam"], atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_lam_has_no_gradient_of_the_statistics_whatever_z_holds(backend: str, per_row: bool) -> None:
    """As in plain PyTorch, where lam is no part of them: the reference and Triton gave NaN, and the CPU's zero."""
    require(backend)
    inputs = oc.make_inputs(oc.Case("case", T=15, per_row=per_row), torch.float32)
    inputs.z[3, 2] = torch.nan
    z, lam = inputs.z.requires_grad_(), inputs.lam.requires_grad_()
    with nk.use_backend(backend):
        _, quad, _ = nk.merged_lora_nsc(z, inputs.bank, lam)
        (dlam,) = torch.autograd.grad(quad[4:].sum(), lam, retain_graph=True)
        dz, beside = torch.autograd.grad(quad[4:].sum(), (z, lam))
        _, quad, *_ = torch.ops.nsc.merged_lora(z, *inputs.bank.packed, lam, None, True, True)
        (of_op,) = torch.autograd.grad(quad[4:].sum(), lam)
    assert torch.equal(of_op, dlam)
    assert torch.equal(dlam, torch.zeros_like(lam))
    assert torch.equal(beside, dlam)
    assert dz[4:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_is_neither_modified_nor_returned(backend: str) -> None:
    require(backend)
    bank = oc.make_bank(oc.Case("nothing", ranks=(0, 0)), torch.float32)
    base = torch.randn(7, 40)
    before = base.clone()
    with nk.use_backend(backend):
        y = nk.merged_lora(torch.randn(7, 48), bank, torch.rand(2), base)
    assert torch.equal(base, before)
    assert torch.equal(y, before)
    assert y.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_stays_in_its_row(backend: str) -> None:
    require(backend)
    bank = oc.make_bank(oc.Case("nan"), torch.float32)
    z = torch.randn(20, 48)
    clean = nk.merged_lora(z, bank, torch.rand(2).fill_(0.5))
    z[3, 7], z[11, 0] = float("nan"), float("inf")
    with nk.use_backend(backend):
        y, quad, sqnorm = nk.merged_lora_nsc(z, bank, torch.full((2,), 0.5))
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 11]] = True
    for t in (y, quad):
        assert torch.equal(~torch.isfinite(t).all(-1), bad)
    assert torch.equal(~torch.isfinite(sqnorm), bad)
    assert torch.allclose(y[~bad], clean[~bad], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "T"), [("bf16", 97), ("bf16", 64), ("f16", 97)])
@pytest.mark.parametrize(
    ("rank", "d_in", "d_out"), [(4, 65, 33), (5, 64, 64), (38, 130, 7), (34, 96, 32), (80, 64, 96), (32, 34, 34)]
)
def test_a_bad_row_stays_in_its_row_at_every_size(
    backend: str, dtype: str, T: int, rank: int, d_in: int, d_out: int
) -> None:
    """Processors with AMX multiply in tiles: what lies past a row's end is the next row's."""
    require(backend)
    inputs = oc.make_inputs(oc.Case("odd", T=T, d_in=d_in, d_out=d_out, ranks=(rank,)), oc.DTYPES[dtype])
    z, dy = inputs.z.clone(), inputs.dy.clone()
    z[10], dy[20] = float("nan"), float("nan")
    z.requires_grad_()
    with nk.use_backend(backend):
        y = nk.merged_lora(z, inputs.bank, inputs.lam, inputs.base)
        (dz,) = torch.autograd.grad(y, z, dy)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [10]
    assert dz.isnan().any(1).nonzero().flatten().tolist() == [20]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["A", "Bt", "lam", "base"])
def test_columns_that_lie_together_are_no_matter(backend: str, name: str) -> None:
    """In the forward and in the backward, which reads factors and coefficients as they were given."""
    require(backend)
    inputs = oc.make_inputs(oc.Case("turned", per_row=True), torch.float32)
    expected = oc.run(backend, inputs)
    owner = inputs.bank if name in ("A", "Bt") else inputs
    setattr(owner, name, getattr(owner, name).t().contiguous().t())
    assert not getattr(owner, name).is_contiguous()
    for output, found in oc.run(backend, inputs).items():
        assert torch.equal(found, expected[output]), output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16), (5, 1)])
def test_strides_that_no_element_has_are_no_matter(backend: str, shape: tuple[int, int]) -> None:
    """Contiguous to torch, whose rows need no unit stride where there is no second element to find by it."""
    require(backend)
    z = torch.randn(10, 7, 32).as_strided(shape, (32, 2) if shape[0] == 0 else (1, 7))
    assert z.is_contiguous()
    bank = nk.AdapterBank.from_factors([torch.randn(1, shape[1])], [torch.randn(3, 1)])
    with nk.use_backend(backend):
        y = nk.merged_lora(z.requires_grad_(), bank, torch.ones(1), torch.zeros(3, shape[0]).t())
        torch.autograd.grad(y, z, torch.ones(3, shape[0]).t())
    torch.testing.assert_close(y, z @ bank.A.t() @ bank.Bt)


def test_the_formula_itself() -> None:
    """Against the raw factors: the explicit Gram inverse and the explicit sum, in float64."""
    A = [torch.randn(r, 30, dtype=torch.float64) for r in (3, 8)]
    B = [torch.randn(20, r, dtype=torch.float64) for r in (3, 8)]
    scaling, lam = [2.0, 0.5], torch.tensor([0.4, -0.7], dtype=torch.float64)
    z, base = torch.randn(11, 30, dtype=torch.float64), torch.randn(11, 20, dtype=torch.float64)
    bank = nk.AdapterBank.from_factors(A, B, scaling)
    y, quad, sqnorm = nk.merged_lora_nsc(z, bank, lam, base)
    u = [z @ a.t() for a in A]
    want_y = base + sum(w * s * x @ b.t() for w, s, x, b in zip(lam, scaling, u, B, strict=True))
    want_quad = torch.stack([((x @ torch.linalg.inv(a @ a.t())) * x).sum(-1) for x, a in zip(u, A, strict=True)], -1)
    assert torch.allclose(y, want_y, rtol=1e-11)
    assert torch.allclose(quad, want_quad, rtol=1e-11)
    assert torch.allclose(sqnorm, z.square().sum(-1))
    assert torch.allclose(bank.delta(lam) @ z.t(), (y - base).t(), rtol=1e-9, atol=1e-10)

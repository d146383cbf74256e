"""null_space_ratio: value and gradient everywhere, the awkward places above all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsc_kernels as nk
import operator_cases as oc


def projector_ratio(z: Tensor, A: Tensor) -> Tensor:
    """Eq. 3 literally: the norm of the projection onto the null space of A over the norm of z."""
    _, _, v = torch.linalg.svd(A, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(A))
    residual = z - (z @ v[:rank].t()) @ v[:rank]
    return residual.norm(dim=-1) / z.norm(dim=-1)


@pytest.mark.parametrize("rank_deficient", [False, True])
def test_is_the_projection_onto_the_null_space(rank_deficient: bool) -> None:
    A = torch.randn(6, 32, dtype=torch.float64)
    if rank_deficient:
        A[3:] = A[:3] * 2
    z = torch.randn(50, 32, dtype=torch.float64)
    bank = nk.AdapterBank.from_factors([A], [torch.randn(5, 6, dtype=torch.float64)])
    _, quad, sqnorm = nk.merged_lora_nsc(z, bank, torch.ones(1, dtype=torch.float64))
    assert torch.allclose(nk.null_space_ratio(quad, sqnorm)[:, 0], projector_ratio(z, A), rtol=1e-10)


def test_does_not_depend_on_scaling() -> None:
    A, B = [torch.randn(4, 16)], [torch.randn(8, 4)]
    z, lam = torch.randn(9, 16), torch.ones(1)
    ratios = [
        nk.null_space_ratio(*nk.merged_lora_nsc(z, nk.AdapterBank.from_factors(A, B, [s]), lam)[1:])
        for s in (0.125, 1.0, 4.0)
    ]
    assert torch.equal(ratios[0], ratios[1])
    assert torch.equal(ratios[1], ratios[2])


def test_isotropic_input_has_the_expected_ratio() -> None:
    bank = nk.AdapterBank.from_factors([torch.randn(8, 64)], [torch.randn(4, 8)])
    _, quad, sqnorm = nk.merged_lora_nsc(torch.randn(20000, 64), bank, torch.ones(1))
    assert abs(nk.null_space_ratio(quad, sqnorm).mean().item() - (1 - 8 / 64) ** 0.5) < 0.005


def ratio_gradient(z: Tensor, bank: nk.AdapterBank) -> tuple[Tensor, Tensor]:
    z = z.requires_grad_()
    _, quad, sqnorm = nk.merged_lora_nsc(z, bank, torch.ones(bank.K, dtype=quad_dtype(z)))
    omega = nk.null_space_ratio(quad, sqnorm)
    return omega.detach(), torch.autograd.grad(omega.sum(), z)[0]


def quad_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype is torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", oc.DTYPES)
def test_row_space_zero_and_full_rank_are_safe(dtype: str) -> None:
    dt = oc.DTYPES[dtype]
    bank = nk.AdapterBank.from_factors(
        [torch.randn(5, 24, dtype=torch.float64), torch.randn(24, 24, dtype=torch.float64)],
        [torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)],
        dtype=dt,
    )
    rows = torch.randn(6, 5, dtype=torch.float64) @ bank.A[:5].double()
    z = torch.cat([rows, torch.zeros(2, 24), torch.randn(4, 24)]).to(dt)
    omega, gradient = ratio_gradient(z, bank)
    assert bool(((omega >= 0) & (omega <= 1)).all())
    assert bool(torch.isfinite(gradient).all())
    assert torch.equal(omega[6:8], torch.ones_like(omega[6:8]))
    assert torch.equal(gradient[6:8], torch.zeros_like(gradient[6:8]))


def test_exact_ends_have_exact_values_and_zero_gradient() -> None:
    quad = torch.tensor([[4.0, 0.0, 5.0]], requires_grad=True)
    sqnorm = torch.tensor([4.0], requires_grad=True)
    omega = nk.null_space_ratio(quad, sqnorm)
    assert omega.tolist() == [[0.0, 1.0, 0.0]]
    dquad, dsqnorm = torch.autograd.grad(omega.sum(), (quad, sqnorm))
    # At omega = 1 the derivative is the ordinary one; at and beyond the row space it is zero.
    assert dquad.tolist() == [[0.0, -1 / 8, 0.0]]
    assert dsqnorm.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_gradient_could_overflow_the_norm_counts_as_zero(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edge = limits.tiny / limits.eps
    sqnorm = torch.tensor([edge / 2, edge, 2 * edge], dtype=dtype, requires_grad=True)
    quad = (sqnorm.detach() / 2)[:, None].requires_grad_()
    omega = nk.null_space_ratio(quad, sqnorm)
    assert omega[:, 0].tolist() == [1.0, 1.0, pytest.approx(0.5**0.5)]
    dquad, dsqnorm = torch.autograd.grad(omega.sum(), (quad, sqnorm))
    assert dquad[:, 0].tolist() == [0.0, 0.0, pytest.approx(-1 / (4 * edge) / 0.5**0.5, rel=1e-6)]
    assert dsqnorm.tolist() == [0.0, 0.0, pytest.approx(1 / (8 * edge) / 0.5**0.5, rel=1e-6)]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradient_is_the_closed_form_and_bounded(scale: float) -> None:
    """d omega / d z = -(P z - q z) / (omega |z|^2), whose norm is sqrt(q) / |z|."""
    A = torch.randn(7, 40, dtype=torch.float64)
    bank = nk.AdapterBank.from_factors([A], [torch.randn(3, 7, dtype=torch.float64)])
    z = scale * torch.randn(30, 40, dtype=torch.float64)
    omega, gradient = ratio_gradient(z.clone(), bank)
    n = z.square().sum(-1, keepdim=True)
    projected = (z @ bank.A.t()) @ bank.A
    share = (z @ bank.A.t()).square().sum(-1, keepdim=True) / n
    assert torch.allclose(gradient, -(projected - share * z) / (omega * n), rtol=1e-9)
    assert torch.allclose(gradient.norm(dim=-1), share.sqrt()[:, 0] / n.sqrt()[:, 0], rtol=1e-9)


def test_gradcheck_to_second_order() -> None:
    quad = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    sqnorm = (1.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(nk.null_space_ratio, (quad, sqnorm), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(nk.null_space_ratio, (quad, sqnorm))


def test_at_one_unit_from_the_row_space_the_ratio_is_the_root_and_the_gradient_zero() -> None:
    quad = torch.tensor([[1 - 2.0**-23, 1 - 2.0**-22]], requires_grad=True)
    omega = nk.null_space_ratio(quad, torch.ones(1))
    assert torch.equal(omega, torch.tensor([[2.0**-11.5, 2.0**-11]]))
    (gradient,) = torch.autograd.grad(omega.sum(), quad)
    assert gradient.tolist() == [[0.0, -(2.0**10)]]


# The gradient is the larger the less of the input is discarded.
@pytest.mark.parametrize("share", [0.5, 1 - 2.0**-21])
@pytest.mark.parametrize("sqnorm", [0.0, 1e-45, 1e-38, 1e-31, 1e-30, 3e38])
def test_no_nan_at_the_ends_of_the_range(sqnorm: float, share: float) -> None:
    n = torch.tensor([sqnorm], requires_grad=True)
    quad = (share * n.detach()).unsqueeze(-1).requires_grad_()
    omega = nk.null_space_ratio(quad, n)
    assert bool(torch.isfinite(omega).all())
    for gradient in torch.autograd.grad(omega.sum(), (quad, n)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(("quad", "sqnorm"), [(float("nan"), 1.0), (1.0, float("nan")), (float("nan"), 0.5)])
def test_nan_is_not_hidden(quad: float, sqnorm: float) -> None:
    assert bool(nk.null_space_ratio(torch.tensor([[quad]]), torch.tensor([sqnorm])).isnan().all())


@pytest.mark.parametrize(
    ("quad", "sqnorm", "error"),
    [
        (torch.ones(3, 2), torch.ones(2), ValueError),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError),
        (torch.ones(3, 2).bfloat16(), torch.ones(3).bfloat16(), TypeError),
        (torch.ones(3, 2), torch.ones(3).double(), TypeError),
    ],
)
def test_bad_input(quad: Tensor, sqnorm: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="quad"):
        nk.null_space_ratio(quad, sqnorm)

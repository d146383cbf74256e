"""Both directions and both schedules against float64, on problems small enough for the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import check_backward, check_forward

from nsc_kernels import reference
from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.triton.configs import Config
from nsc_kernels.verify.problems import problem

TILE = Config(chunk=16, block_t=16, block_k=32, block_n=32, warps=4, stages=2)
SLICED = replace(TILE, slices=4, out_slices=2, rows=4)
ONE_SLICE = replace(TILE, slices=1, out_slices=1, rows=16)
SCHEDULES = {"tile": TILE, "sliced": SLICED, "one slice": ONE_SLICE}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=SCHEDULES, ids=lambda name: name.replace(" ", "_"))
def config(request: pytest.FixtureRequest) -> Config:
    return SCHEDULES[request.param]


@pytest.mark.parametrize(
    ("dtype", "per_row"),
    # Which coefficient a row takes has nothing to do with the two halves' formats.
    [*((dtype, False) for dtype in DTYPES), (torch.float32, True), (torch.bfloat16, True)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_equal_ranks(config, dtype, per_row, device):
    """Widths of four steps, the last cut short, so that each of four slices has something to add."""
    p = problem(37, 112, 100, [16, 16, 16], dtype, device, per_row=per_row)
    check_forward(p, config)
    check_backward(p, config)


@pytest.mark.parametrize("per_row", [False, True], ids=["per_adapter", "per_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unequal_ranks_with_an_empty_adapter(config, dtype, per_row, device):
    p = problem(21, 40, 33, [3, 0, 5, 16, 1], dtype, device, per_row=per_row)
    quad = check_forward(p, config)[1]
    dlam = check_backward(p, config)[1]
    assert not quad[:, 1].any(), "an adapter of rank 0 contributes nothing"
    assert not dlam[..., 1].any(), "an adapter of rank 0 contributes nothing"


@pytest.mark.parametrize("ranks", [[8] * 5, [4, 12, 20], [32], [1] * 9, [64, 32]], ids=str)
def test_rank_layouts(config, ranks, device):
    """Groups that fill, share and straddle chunks, with and without a table of owners."""
    p = problem(9, 48, 40, ranks, torch.float32, device)
    check_forward(p, config)
    check_backward(p, config)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33])
def test_token_counts_around_the_tile(config, T, device):
    p = problem(T, 40, 56, [5, 7], torch.float32, device)
    check_forward(p, config)
    check_backward(p, config)


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (63, 1), (31, 33)], ids=str)
def test_widths_that_no_block_divides(config, shape, device):
    p = problem(5, *shape, [2, 1], torch.float32, device)
    check_forward(p, config)
    check_backward(p, config)


def test_no_tokens(config, device):
    p = problem(0, 24, 40, [4, 4], torch.float32, device)
    factors = (p.A, p.Bt, p.offsets, p.lam)
    y, quad, sqnorm, u = launch.forward(ForwardCall(p.z, *factors, p.base, True, True), config=config)
    assert (y.shape, quad.shape, sqnorm.shape, u.shape) == ((0, 40), (0, 2), (0,), (0, 8))
    call = BackwardCall(p.dy, p.dquad, p.dsqnorm, u, p.z, *factors, None, True, True)
    dz, dlam = launch.backward(call, config=config)
    assert dz.shape == (0, 24)
    assert torch.equal(dlam, torch.zeros_like(p.lam))


def test_no_ranks(config, device):
    """All adapters absent from the layer: y is base, and the gradient of z comes from its norm alone."""
    p = problem(6, 24, 40, [0, 0, 0], torch.float32, device)
    y, quad, _, u = check_forward(p, config)
    assert torch.equal(y, p.base)
    assert (quad == 0).all()
    assert u.shape == (6, 0)
    dz, dlam = check_backward(p, config)
    torch.testing.assert_close(dz, 2 * p.dsqnorm[:, None] * p.z)
    assert (dlam == 0).all()


@pytest.mark.parametrize("config_of_512", [TILE, SLICED], ids=["tile", "sliced"])
def test_rank_512(config_of_512, device):
    p = problem(5, 64, 48, [16] * 32, torch.bfloat16, device)
    config = replace(config_of_512, chunk=128)
    check_forward(p, config)
    check_backward(p, config)


def test_sixty_four_adapters(config, device):
    p = problem(7, 32, 32, [2] * 32 + [1] * 32, torch.float32, device)
    check_forward(p, config)
    check_backward(p, config)


@pytest.mark.parametrize("base", [False, True], ids=["no_base", "base"])
@pytest.mark.parametrize("stats", [False, True], ids=["no_stats", "stats"])
@pytest.mark.parametrize("save_u", [False, True], ids=["no_u", "u"])
def test_what_a_forward_is_asked_for(config, base, stats, save_u, device):
    p = problem(19, 40, 24, [4, 4], torch.float32, device)
    check_forward(p, config, base=base, stats=stats, save_u=save_u)


@pytest.mark.parametrize(
    "given",
    [
        {"dquad": False, "dsqnorm": False},
        {"dy": False},
        {"dy": False, "dquad": False},
        {"dy": False, "dsqnorm": False, "dz_base": True},
        {"dsqnorm": False, "dz_base": True},
        {"dquad": False, "dz_base": True},
        {"need_dz": False},
        {"need_dlam": False},
        {"need_dz": False, "dsqnorm": False, "dquad": False},
        {"need_dz": False, "need_dlam": False},
    ],
    ids=lambda given: "-".join(given),
)
@pytest.mark.parametrize("per_row", [False, True], ids=["per_adapter", "per_row"])
def test_what_a_backward_is_asked_for(config, given, per_row, device):
    p = problem(19, 40, 24, [4, 4], torch.float32, device, per_row=per_row)
    check_backward(p, config, **given)


def test_rows_of_any_stride(config, device):
    p = problem(18, 40, 24, [4, 8], torch.float32, device)

    def strided(t: torch.Tensor, gap: int) -> torch.Tensor:
        wide = torch.full((t.shape[0], t.shape[1] + gap), float("nan"), device=t.device, dtype=t.dtype)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    q = replace(
        p, z=strided(p.z, 3), base=strided(p.base, 5), dy=p.dy[:1].expand(18, 24), dz_base=strided(p.dz_base, 1)
    )
    check_forward(q, config)
    check_backward(q, config, dz_base=True)


def test_zero_tokens_have_zero_statistics(config, device):
    p = problem(17, 40, 24, [4, 8], torch.bfloat16, device)
    y, quad, sqnorm, u = check_forward(replace(p, z=torch.zeros_like(p.z)), config)
    assert torch.equal(y, p.base)
    assert not quad.any()
    assert not sqnorm.any()
    assert not u.any()


def test_nothing_given_is_written_to(config, device):
    p = problem(18, 40, 24, [4, 8], torch.float32, device)
    before = {name: t.clone() for name, t in vars(p).items() if isinstance(t, torch.Tensor)}
    check_forward(p, config)
    check_backward(p, config, dz_base=True)
    for name, t in before.items():
        assert torch.equal(t, getattr(p, name)), f"{name} was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_repeats_are_bitwise_equal(config, dtype, device):
    p = problem(50, 64, 48, [3, 8, 5], dtype, device)
    first, second = (check_forward(p, config) + check_backward(p, config) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on hardware the two layouts may reduce in different orders")
def test_one_slice_equals_the_tile_schedule_bitwise(device):
    """The same sums in the same order: the schedules share every step."""
    p = problem(21, 96, 80, [16, 16], torch.float32, device)
    tile, sliced = (check_forward(p, c) + check_backward(p, c) for c in (TILE, ONE_SLICE))
    for name, a, b in zip(("y", "quad", "sqnorm", "u", "dz"), tile, sliced, strict=False):
        assert torch.equal(a, b), name


def test_values_are_not_confused_between_tokens_and_adapters(config, device):
    """One adapter at a time, one token at a time: everything else must be exactly zero."""
    p = problem(20, 32, 32, [4, 4, 8], torch.float32, device)
    for k, t in ((0, 0), (1, 17), (2, 19)):
        lam = torch.zeros(20, 3, device=device)
        lam[t, k] = 1.0
        y = launch.forward(ForwardCall(p.z, p.A, p.Bt, p.offsets, lam, None, False, False), config=config)[0]
        rows = p.A[p.offsets[k] : p.offsets[k + 1]]
        expected = (p.z[t] @ rows.t()) @ p.Bt[p.offsets[k] : p.offsets[k + 1]]
        torch.testing.assert_close(y[t], expected, rtol=1e-5, atol=1e-5)
        y[t] = 0
        assert not y.any()


def test_backward_is_the_derivative_of_the_forward(config, device):
    """The directional derivative of the float64 forward, by central difference, and not only another formula."""
    p = problem(11, 24, 20, [3, 5], torch.float32, device)
    factors = (p.A, p.Bt, p.offsets, p.lam)
    u = launch.forward(ForwardCall(p.z, *factors, None, True, True), config=config)[3]
    call = BackwardCall(p.dy, p.dquad, p.dsqnorm, u, p.z, *factors, None, True, True)
    dz, dlam = launch.backward(call, config=config)
    A, Bt = p.A.double(), p.Bt.double()

    def objective(z: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        y, quad, sqnorm, _ = reference.forward(z, A, Bt, p.offsets, lam, None, True)
        return (y * p.dy).sum() + (quad * p.dquad).sum() + (sqnorm * p.dsqnorm).sum()

    source = torch.Generator().manual_seed(1)
    for _ in range(3):
        to_z = torch.randn(p.z.shape, generator=source, dtype=torch.float64).to(device)
        to_lam = torch.randn(p.lam.shape, generator=source, dtype=torch.float64).to(device)
        h = 1e-5
        ahead = objective(p.z + h * to_z, p.lam + h * to_lam)
        behind = objective(p.z - h * to_z, p.lam - h * to_lam)
        slope = (dz * to_z).sum() + (dlam * to_lam).sum()
        torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_place_gives_the_same_bits_in_the_tensor_given(config, dtype, device):
    p = problem(37, 112, 100, [16, 5], dtype, device)
    forward = (p.z, p.A, p.Bt, p.offsets, p.lam)
    y, _, _, u = launch.forward(ForwardCall(*forward, p.base, True, True), config=config)
    base = p.base.clone()
    assert launch.forward(ForwardCall(*forward, base, True, True, True), config=config)[0] is base
    assert torch.equal(base, y)

    gradients = (p.dy, p.dquad, p.dsqnorm, u, p.z, p.A, p.Bt, p.offsets, p.lam)
    dz, _ = launch.backward(BackwardCall(*gradients, p.dz_base, True, True), config=config)
    dz_base = p.dz_base.clone()
    assert launch.backward(BackwardCall(*gradients, dz_base, True, True, True), config=config)[0] is dz_base
    assert torch.equal(dz_base, dz)


def test_rows_that_overlap_are_not_written_in_place(config, device):
    p = problem(7, 40, 32, [4], torch.float32, device)
    base = p.base[:1].expand(7, -1)
    call = ForwardCall(p.z, p.A, p.Bt, p.offsets, p.lam, base, False, False, True)
    y = launch.forward(call, config=config)[0]
    assert y is not base
    assert torch.equal(base, p.base[:1].expand(7, -1))

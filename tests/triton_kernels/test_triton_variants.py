"""The prepared variants of the kernel, which no formula chooses yet, held to what the chosen ones are held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import check_backward, check_forward
from test_triton_kernels import SLICED, TILE

from nsc_kernels.contract import BackwardCall, ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.triton.configs import Config
from nsc_kernels.verify.problems import problem

# Each with the shipped configuration that adds in the same order, whose bits it must therefore give.
VARIANTS = {
    "streamed": (replace(TILE, expand_stages=3), TILE),
    "streamed slices": (replace(SLICED, expand_stages=2), SLICED),
    "early": (replace(SLICED, early=True), SLICED),
    "three slices": (replace(SLICED, slices=3, out_slices=3), replace(SLICED, slices=3, out_slices=1)),
}
SAME_SUMS = ("y", "quad", "sqnorm", "u", "dz")


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest) -> tuple[Config, Config]:
    return VARIANTS[request.param]


@pytest.fixture
def variant(pair: tuple[Config, Config]) -> Config:
    return pair[0]


@pytest.mark.parametrize(
    ("dtype", "per_row"), [(torch.float32, True), (torch.bfloat16, False)], ids=["float32-per_row", "bfloat16"]
)
def test_unequal_ranks_and_widths_that_no_block_divides(variant, dtype, per_row, device):
    p = problem(21, 112, 99, [3, 0, 5, 16, 17], dtype, device, per_row=per_row)
    check_forward(p, variant)
    check_backward(p, variant, dz_base=True)


@pytest.mark.parametrize("shape", [(1, 1, 65), (15, 31, 33), (17, 65, 1)], ids=str)
def test_odd_sizes(variant, shape, device):
    T, d_in, d_out = shape
    p = problem(T, d_in, d_out, [8, 8], torch.float32, device)
    check_forward(p, variant)
    check_backward(p, variant)


@pytest.mark.parametrize("base", [False, True], ids=["no_base", "base"])
@pytest.mark.parametrize("stats", [False, True], ids=["no_stats", "stats"])
def test_what_a_forward_is_asked_for(variant, base, stats, device):
    p = problem(19, 40, 72, [4, 4], torch.bfloat16, device)
    check_forward(p, variant, base=base, stats=stats, save_u=stats)


@pytest.mark.parametrize(
    "given",
    [{"dquad": False, "dsqnorm": False}, {"dy": False, "dz_base": True}, {"need_dz": False}, {"need_dlam": False}],
    ids=lambda given: "-".join(given),
)
def test_what_a_backward_is_asked_for(variant, given, device):
    p = problem(19, 72, 40, [4, 4], torch.float32, device, per_row=True)
    check_backward(p, variant, **given)


def test_no_ranks_leave_the_base_as_it_is(variant, device):
    p = problem(6, 24, 72, [0, 0], torch.float32, device)
    assert torch.equal(check_forward(p, variant)[0], p.base)
    check_backward(p, variant)


def test_the_bits_are_those_of_the_shipped_order_of_sums_and_repeat(pair, device):
    p = problem(21, 112, 100, [16, 5], torch.bfloat16, device)
    first, second, shipped = (check_forward(p, c) + check_backward(p, c, dz_base=True) for c in (pair[0], *pair))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    if not torch.cuda.is_available():  # on hardware layouts differ, and sums across threads with them
        for name, a, b in zip(SAME_SUMS, first, shipped, strict=False):
            assert torch.equal(a, b), name


def test_in_place_gives_the_same_bits_in_the_tensor_given(variant, device):
    """What is loaded early or several steps ahead of a store into the same tensor lies elsewhere in it."""
    p = problem(21, 112, 160, [16, 5], torch.bfloat16, device)
    forward = (p.z, p.A, p.Bt, p.offsets, p.lam)
    y, _, _, u = launch.forward(ForwardCall(*forward, p.base, True, True), config=variant)
    base = p.base.clone()
    assert launch.forward(ForwardCall(*forward, base, True, True, True), config=variant)[0] is base
    assert torch.equal(base, y)

    gradients = (p.dy, p.dquad, p.dsqnorm, u, p.z, p.A, p.Bt, p.offsets, p.lam)
    dz, _ = launch.backward(BackwardCall(*gradients, p.dz_base, True, True), config=variant)
    dz_base = p.dz_base.clone()
    assert launch.backward(BackwardCall(*gradients, dz_base, True, True, True), config=variant)[0] is dz_base
    assert torch.equal(dz_base, dz)


def test_early_is_refused_where_nothing_waits_or_the_compiler_prefetches():
    with pytest.raises(ValueError, match="wait"):
        replace(TILE, early=True)
    with pytest.raises(ValueError, match="by hand"):
        replace(SLICED, early=True, expand_stages=2)

"""The kernel with TMA, mbarriers and wgmma on the emulator, as test_cuda_kernel.py does the other one."""

from __future__ import annotations

import itertools

import harness
import pytest
import torch
from emulator_checks import check_backward, check_forward
from harness import Emulator, How, Variant

from nsc_kernels.backends import cuda
from nsc_kernels.verify.problems import problem

CPU = torch.device("cpu")
R16 = (16,) * 6
VARIANTS = [Variant(*sizes) for sizes in cuda.WARPGROUP_VARIANTS]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return Emulator(harness.build(tmp_path_factory.mktemp("warpgroup"), warpgroup=True))


def test_every_variant_is_tested(emulator: Emulator) -> None:
    assert emulator.variants == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"R{v.ranks}-T{v.tokens}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_variant_at_its_full_rank(emulator: Emulator, variant: Variant, dtype: torch.dtype) -> None:
    p = problem(variant.tokens + 5, 136, 200, (16,) * (variant.ranks // 16), dtype, CPU)
    how = How(variant, 2, "random")
    check_forward(emulator, p, how)
    check_backward(emulator, p, how)


@pytest.mark.parametrize("cluster", [1, 4, 16])
@pytest.mark.parametrize("ranks", [R16, (3, 0, 16, 5, 1, 7)], ids=["equal", "unequal"])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
@pytest.mark.parametrize("variant", [Variant(128, 64), Variant(96, 128)], ids=lambda v: f"R{v.ranks}-T{v.tokens}")
def test_clusters_ranks_and_lambda(
    emulator: Emulator, variant: Variant, cluster: int, ranks: tuple[int, ...], per_row: bool
) -> None:
    p = problem(67, 264, 520, ranks, torch.bfloat16, CPU, per_row=per_row)
    check_forward(emulator, p, How(variant, cluster))
    check_backward(emulator, p, How(variant, cluster))


@pytest.mark.parametrize("T", [1, 63, 65, 129])
@pytest.mark.parametrize("d", [(8, 8), (72, 1032), (768, 64)], ids=str)
def test_tokens_and_widths_that_divide_nothing(emulator: Emulator, T: int, d: tuple[int, int]) -> None:
    p = problem(T, *d, (5, 11), torch.bfloat16, CPU)
    for variant, cluster in ((Variant(64, 64), 4), (Variant(32, 128), 1)):
        check_forward(emulator, p, How(variant, cluster))
        check_backward(emulator, p, How(variant, cluster))


def test_what_was_not_asked_for_is_not_computed(emulator: Emulator) -> None:
    p = problem(70, 72, 328, R16, torch.bfloat16, CPU)
    how = How(Variant(128, 64), 2)
    for base, stats, save_u in ((False, True, True), (True, False, True), (True, True, False)):
        check_forward(emulator, p, how, base=base, stats=stats, save_u=save_u)
    check_backward(emulator, p, how, dy=False)
    check_backward(emulator, p, how, dquad=False, dsqnorm=False, dz_base=True)
    check_backward(emulator, p, how, need_dlam=False)
    check_backward(emulator, p, how, need_dz=False, dquad=False, dsqnorm=False)


SMALL = [(Variant(128, 64), 2), (Variant(128, 128), 2)]


@pytest.mark.parametrize(
    ("variant", "cluster", "order", "copies"),
    [
        *((*one, *setting) for one in SMALL for setting in itertools.product(harness.ORDERS, harness.COPIES)),
        # Waits do not depend on the rank: of the largest, whose threads take longest, one order.
        *((Variant(512, 64), 2, "random", copies) for copies in harness.COPIES),
    ],
    ids=str,
)
def test_no_order_of_threads_or_copies_changes_a_bit(
    emulator: Emulator, variant: Variant, cluster: int, order: str, copies: str
) -> None:
    """Enough steps that every stage is used again, in both products."""
    p = problem(130, 776, 840, R16, torch.bfloat16, CPU)
    check_forward(emulator, p, How(variant, cluster, order, copies))
    check_backward(emulator, p, How(variant, cluster, order, copies))

"""The CUDA kernel's own source, thread by thread on the CPU: against its plain mirror, bitwise, and against float64.

The emulator runs the threads in any order that the barriers allow and lands asynchronous copies as late or as early as
they may, so that a missing barrier or wait gives wrong results here. What the hardware adds (the sum inside a matrix
instruction, the memory model between clusters, time) is not tested here.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import harness
import pytest
import torch
from emulator_checks import check_backward, check_forward, same
from harness import Emulator, How, Variant

from nsc_kernels.backends import cuda
from nsc_kernels.verify.problems import problem

CPU = torch.device("cpu")
R16 = (16,) * 6
UNEQUAL = (3, 0, 16, 5, 1, 7)


VARIANTS = [Variant(*sizes) for sizes in cuda.VARIANTS]


def test_every_variant_is_tested(emulator: Emulator) -> None:
    assert emulator.variants == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"R{v.ranks}-T{v.tokens}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_variant_at_its_full_rank(emulator: Emulator, variant: Variant, dtype: torch.dtype) -> None:
    ranks = (16,) * (variant.ranks // 16)
    p = problem(variant.tokens + 5, 136, 200, ranks, dtype, CPU)
    how = How(variant, 2, "random")
    check_forward(emulator, p, how)
    check_backward(emulator, p, how)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("ranks", [R16, UNEQUAL, (2,) * 47], ids=["equal", "unequal", "many"])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
def test_clusters_ranks_and_lambda(emulator: Emulator, cluster: int, ranks: tuple[int, ...], per_row: bool) -> None:
    p = problem(67, 264, 520, ranks, torch.bfloat16, CPU, per_row=per_row)
    how = How(Variant(96, 64), cluster)
    check_forward(emulator, p, how)
    check_backward(emulator, p, how)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("d", [(8, 8), (72, 1032), (768, 64)], ids=str)
def test_tokens_and_widths_that_divide_nothing(emulator: Emulator, T: int, d: tuple[int, int]) -> None:
    p = problem(T, *d, (5, 11), torch.bfloat16, CPU)
    for variant, cluster in ((Variant(32, 64), 4), (Variant(32, 128), 1)):
        check_forward(emulator, p, How(variant, cluster))
        check_backward(emulator, p, How(variant, cluster))


@pytest.mark.parametrize("ranks", [(0, 0), (1,), (512,), (1,) * 64, (0, 130, 0)], ids=str)
def test_extreme_ranks(emulator: Emulator, ranks: tuple[int, ...]) -> None:
    p = problem(66, 72, 136, ranks, torch.bfloat16, CPU)
    variant = emulator.choose_variant(66, sum(ranks), 132)
    check_forward(emulator, p, How(variant, 2))
    check_backward(emulator, p, How(variant, 2))


def test_what_was_not_asked_for_is_not_computed(emulator: Emulator) -> None:
    p = problem(70, 72, 136, R16, torch.bfloat16, CPU)
    how = How(Variant(96, 64), 2)
    for base, stats, save_u in ((False, True, True), (True, False, True), (True, True, False), (False, False, False)):
        check_forward(emulator, p, how, base=base, stats=stats, save_u=save_u)
    check_backward(emulator, p, how, dy=False)
    check_backward(emulator, p, how, dquad=False)
    check_backward(emulator, p, how, dsqnorm=False)
    check_backward(emulator, p, how, dquad=False, dsqnorm=False, dz_base=True)
    check_backward(emulator, p, how, need_dlam=False)
    check_backward(emulator, p, how, need_dz=False, dquad=False, dsqnorm=False)
    q = problem(70, 72, 136, R16, torch.bfloat16, CPU, per_row=True)
    check_backward(emulator, q, how, need_dz=False, dquad=False, dsqnorm=False)


def test_rows_with_strides_and_the_output_over_base(emulator: Emulator) -> None:
    p = problem(70, 72, 136, R16, torch.bfloat16, CPU)
    how = How(Variant(96, 64), 2)
    plain = emulator.forward(how, p.z, p.A, p.Bt, p.offsets, p.lam, p.base)
    room = torch.full((70, 72 + 24), float("nan"), dtype=torch.bfloat16)
    room[:, 8:80] = p.z
    z = room[:, 8:80]
    one = p.base[:1].expand(70, -1)
    assert same(plain, emulator.forward(how, z, p.A, p.Bt, p.offsets, p.lam, p.base))
    repeated = emulator.forward(how, z, p.A, p.Bt, p.offsets, p.lam, one)
    assert same(repeated, emulator.forward(how, z, p.A, p.Bt, p.offsets, p.lam, one.contiguous()))
    for copies in harness.COPIES:
        over = p.base.clone()
        emulator._run(
            How(Variant(96, 64), 2, copies=copies), False, over.dtype, p.offsets, T=70, d_in=72, d_out=136, x=p.z,
            x_stride=72, w_in=p.A, w_out=p.Bt, lam=p.lam, base=over, base_stride=136, out=over, out_stride=136,
        )  # fmt: skip
        assert torch.equal(over, plain[0])


SMALL = [(Variant(96, 64), 4), (Variant(128, 128), 2)]


@pytest.mark.parametrize(
    ("variant", "cluster", "order", "copies"),
    [
        *((*one, *setting) for one in SMALL for setting in itertools.product(harness.ORDERS, harness.COPIES)),
        # Waits do not depend on the rank: of the largest, whose threads take longest, one order.
        *((Variant(512, 64), 8, "random", copies) for copies in harness.COPIES),
    ],
    ids=str,
)
def test_no_order_of_threads_or_copies_changes_a_bit(
    emulator: Emulator, variant: Variant, cluster: int, order: str, copies: str
) -> None:
    p = problem(130, 328, 392, R16, torch.bfloat16, CPU)
    how = How(variant, cluster, order, copies)
    check_forward(emulator, p, how)
    check_backward(emulator, p, how)


def test_the_choice_follows_the_documented_cases(emulator: Emulator) -> None:
    """132 processors, two blocks of R = 96 on each: clusters for few tiles, wide tiles for many tokens."""
    active = [264, 132, 66, 33, 16]
    assert emulator.choose_variant(512, 96, 132) == Variant(96, 64)
    assert emulator.choose_variant(16384, 96, 132) == Variant(96, 128)
    assert emulator.choose_variant(16384, 320, 132) == Variant(320, 64)
    assert emulator.choose_variant(16384, 513, 132) is None
    clusters = {T: emulator.choose_cluster(-(-T // 64), 4096, 4096, active) for T in (1, 256, 1024, 4096, 65536)}
    assert clusters[1] == 16
    assert clusters[65536] == 1
    assert list(clusters.values()) == sorted(clusters.values(), reverse=True)


@pytest.fixture(scope="module")
def host_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if harness.compiler() is None:
        pytest.skip("needs a C++ compiler")
    target = tmp_path_factory.mktemp("host") / "nsc_cuda_test"
    source = harness.HERE / "host_test.cpp"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{harness.CSRC}"]
    subprocess.run([str(harness.compiler()), *options, str(source), "-o", str(target)], check=True)
    return target


def test_indices_exhaustively_and_the_mirror_in_plain_cpp(host_test: Path) -> None:
    result = subprocess.run([str(host_test)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 failures" in result.stdout

"""The kernel on a matrix unit that cuts off instead of rounding, as tensor cores do, held to the same criterion."""

from __future__ import annotations

import interpreter_bf16
import numpy as np
import pytest
import torch
from checks import check_backward, check_forward

from nsc_kernels import reference
from nsc_kernels.triton.configs import Config
from nsc_kernels.verify.criterion import faults, judge_backward, judge_forward, lost
from nsc_kernels.verify.problems import problem

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")

TILE = Config(chunk=16, block_t=16, block_k=64, block_n=64, warps=4, stages=2)
SLICED = Config(chunk=16, block_t=16, block_k=64, block_n=64, warps=4, stages=2, slices=4, out_slices=2, rows=4)


@pytest.mark.parametrize("config", [TILE, SLICED], ids=["tile", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_right_kernel_passes_where_sums_are_cut_off(config, dtype, device):
    p = problem(37, 1040, 200, [16, 16], dtype, device)
    exact = check_forward(p, config)[1]
    with interpreter_bf16.truncating():
        cut = check_forward(p, config)[1]
        check_backward(p, config)
    assert not torch.equal(cut, exact), "the unit made no difference"
    assert (cut < exact).float().mean() > 0.9, "what is cut off is missing"


def test_u_rounded_before_its_square_is_refused(device):
    """The fault nearest to rounding: by ten times, at the widest layer there is."""
    p = problem(200, 16384, 8, [16], torch.bfloat16, device)
    inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, None)
    u = reference.forward(*inputs, True)[3]
    error, bound = judge_forward((None, reference.gather(u.float().square(), p.offsets), None, None), *inputs)["quad"]
    assert error > 10 * bound


def test_the_bounds_are_those_of_docs_gpu_by_hand():
    """Of numbers that eager torch is exact on: what is left is the units that are allowed, and what a sum may lose."""
    one_step, two_steps = 0.5 + 3 * (1 / 12) ** 0.5, 1 + 3 * (2 / 12) ** 0.5

    def tensor(*rows):
        return torch.tensor(rows, dtype=torch.bfloat16)

    ones, lam = torch.ones(1, 32, dtype=torch.bfloat16), torch.tensor([0.5])
    found = (torch.tensor([[-96.0]]), torch.full((1, 1), 1024.0), torch.tensor([32.0]), torch.full((1, 1), 32.0))
    judged = judge_forward(found, ones, ones, tensor([-3]), (0, 1), lam, tensor([-48]))
    assert {error for error, _ in judged.values()} == {0.0}
    units = {name: bound * 2**23 for name, (_, bound) in judged.items()}
    y, quad, u = (4 + two_steps + one_step) * 96, (4 + 2 * two_steps) * 1024, (4 + two_steps) * 32
    assert units == pytest.approx({"y": y, "quad": quad, "sqnorm": 4 * 32, "u": u})

    # Eager torch rounds -257 to -256, and is off by one, too.
    rounded = (torch.full((1, 1), -258.0), None, None, None)
    judged = judge_forward(rounded, ones, ones, tensor([-3]), (0, 1), lam, tensor([-209]))
    assert judged["y"] == (1.0, pytest.approx(2 + (4 + two_steps + one_step) * 257 / 2**23))
    assert lost(32, torch.float32) == 0.0  # which goes through no such unit
    assert [fault[0] for fault in faults({"y": (1.0, 1.0), "q": (2.0, 1.0), "u": (float("nan"), 1.0)})] == ["q", "u"]

    dy = torch.zeros(2, 32, dtype=torch.bfloat16)
    dy[0, 0] = dy[1, 16] = 1  # v = 3, -3
    Bt = torch.tensor([[3.0] * 16 + [-3.0] * 16]).bfloat16()
    dquad, dsqnorm = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, -1.0])
    inputs = (dy, dquad, dsqnorm, tensor([2], [1]), tensor([1, -3], [2, 0]), tensor([2, -2]), Bt, (0, 1), lam)
    dz, dlam = tensor([20, -24], [-12, 8]), torch.tensor([3.0])
    judged = judge_backward((dz, dlam), *inputs, tensor([-1, 1], [-1, 1]))
    assert {error for error, _ in judged.values()} == {0.0}
    units = {name: bound * 2**23 for name, (_, bound) in judged.items()}
    assert judge_backward((None, dlam + 1), *inputs, None)["dlam"][0] == 1.0
    dlam_lost = two_steps * (3 + 2 * 45**0.5)
    assert units == pytest.approx({"dz": 4 * 24 + (two_steps + one_step) * 26, "dlam": 4 * 3 + 4 * 9 + dlam_lost})
    # Of terms of the other sign as much is lost.
    turned = judge_backward((None, -dlam), -dy, *inputs[1:], None, need_dz=False)
    assert turned["dlam"] == (0.0, judged["dlam"][1])


def test_the_unit_that_cuts_off_is_the_emulators():
    """By hand: 1 + 16 products of 2^-27 are lost one by one; two bits below the last place are kept until the end."""
    one, tiny = np.ones((1, 16)), np.full((16, 1), 2.0**-27)
    assert interpreter_bf16.truncated_dot(one, tiny, np.ones((1, 1))) == 1.0
    assert interpreter_bf16.truncated_dot(one, 4 * tiny, np.ones((1, 1))) == 1 + 2.0**-21
    assert interpreter_bf16.truncated_dot(one[:, :7], 4 * tiny[:7], np.ones((1, 1))) == 1 + 2.0**-23
    assert interpreter_bf16.truncated_dot(-one, 4 * tiny, -np.ones((1, 1))) == -1 - 2.0**-21

"""The C++ CPU kernels (csrc/cpu), one pass per direction.

bfloat16 near the end of its range: the instructions that multiply it, of AVX512-BF16 and AMX, take every operand,
product and sum below 1.2e-38 for zero. Inputs of size 1e-35 lose nothing; at 1e-36 y is off by 3 %, at 1e-37 by 56 %,
and at 3e-38 it is zero. The other instruction sets (``NSC_CPU_ISA=avx512``, where PyTorch's products do not take the
call) and dtypes keep small numbers.

On AMX, calls of 32 rows or more go to the matrix unit: by csrc/cpu where statistics or dlam are formed from sums that
are not rounded, else mostly by PyTorch's own products (:mod:`two_gemms`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, ops
from ..contract import BackwardCall, Call, ForwardCall
from . import two_gemms

ops.define("cpu_forward", ops.FORWARD_SCHEMA, ops.forward_fake)
ops.define("cpu_backward", ops.BACKWARD_SCHEMA, ops.backward_fake)

native_forward = torch.ops.nsc.cpu_forward.default
native_backward = torch.ops.nsc.cpu_backward.default


def unavailable() -> str | None:
    return native.load("nsc_cpu")


def rejects(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"serves CPU tensors, and these are on {call.device}"


def unproven(call: Call) -> str | None:
    return None


def forward(call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    if not call.stats and two_gemms.preferred(call.z.dtype, call.z.shape[0], call.A.shape[1]):
        return two_gemms.forward(call)
    return native_forward(*call[:8])


def backward(call: BackwardCall) -> tuple[Tensor | None, Tensor | None]:
    if call.need_dz and not call.need_dlam and two_gemms.preferred(call.u.dtype, call.u.shape[0], call.Bt.shape[1]):
        return two_gemms.backward(call)
    return native_backward(*call[:12])

"""The C++ CPU kernels (csrc/cpu), one pass per direction."""

from __future__ import annotations

import torch

from .. import _native, ops
from .registry import Call

ops.define("cpu_forward", ops.FORWARD_SCHEMA, ops.forward_fake, ops.forward_flops)
ops.define("cpu_backward", ops.BACKWARD_SCHEMA, ops.backward_fake, ops.backward_flops)

forward = torch.ops.nsc.cpu_forward.default
backward = torch.ops.nsc.cpu_backward.default


def unavailable() -> str | None:
    return _native.load("nsc_cpu")


def rejects(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"serves CPU tensors, and these are on {call.device}"

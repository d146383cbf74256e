"""The oracle as a backend: any device, any floating dtype, nothing to build."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..contract import BackwardCall, Call, ForwardCall


def unavailable() -> str | None:
    return None


def rejects(call: Call) -> str | None:
    return None


def unproven(call: Call) -> str | None:
    return None


def forward(call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    y, quad, sqnorm, u = reference.forward(*call[:7])
    return y, quad, sqnorm, u if call.save_u else None


def backward(call: BackwardCall) -> tuple[Tensor | None, Tensor | None]:
    return reference.backward(*call[:12])

"""FLOP formulas for ``torch.utils.flop_counter.FlopCounterMode``: ``import nsc_kernels.flops`` registers them.

Not imported by the package itself: where Triton is installed, torch's FLOP counter imports it, which takes a quarter
of a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .backends import cpu  # noqa: F401  (defines the ops counted here)

nsc = torch.ops.nsc


@register_flop_formula([nsc.merged_lora, nsc.cpu_forward])
def forward_flops(z: Any, A: Any, Bt: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Multiplications and additions of the two products; the statistics are of lower order."""
    return 2 * z[0] * A[0] * (A[1] + Bt[1])


@register_flop_formula([nsc.merged_lora_backward, nsc.cpu_backward])
def backward_flops(*arguments: Any, out_shape: Any = None) -> int:
    """As :func:`forward_flops`, for the products that the call needs."""
    dy, _, _, u, _, A, Bt, _, _, _, need_dz, _ = arguments
    return 2 * u[0] * A[0] * ((Bt[1] if dy is not None else 0) + (A[1] if need_dz else 0))

"""The operator in PyTorch's own, for programs that run where this package is not installed.

>>> program = torch.export.export(model, (z,)).run_decompositions(decompositions.table())
>>> torch.onnx.export(program).save("model.onnx")

In what ``torch.export`` makes, the operator is one node, which this package computes. The table makes of it what
:mod:`nsc_kernels.reference` does, as ONNX, or AOTInductor's programs in C++, need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import NAMESPACE
from .reference import accumulation_dtype, expand, gather, shrink


def table() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``, alone or beside ``torch.export.default_decompositions()``."""
    return {getattr(torch.ops, NAMESPACE).merged_lora.default: forward}


def forward(
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    offsets: Sequence[int],
    lam: Tensor,
    base: Tensor | None,
    stats: bool,
    save_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``nsc::merged_lora``, see :data:`nsc_kernels.ops.FORWARD_SCHEMA`."""
    acc = accumulation_dtype(z.dtype)
    u = shrink(z, A)
    # By slices: a decomposition may hold no table of its own, such as reference.spread's.
    spans = enumerate(itertools.pairwise(offsets))
    columns = [lam[..., k : k + 1].expand(*lam.shape[:-1], end - begin) for k, (begin, end) in spans]
    y = expand(torch.cat(columns, -1) * u, Bt, base).to(z.dtype)
    nothing = z.new_empty(0, dtype=acc)
    quad = gather(u * u, offsets) if stats else nothing
    sqnorm = z.to(acc).square().sum(-1) if stats else nothing
    return y, quad, sqnorm, u.to(z.dtype) if save_u else z.new_empty(0)

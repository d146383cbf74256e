"""The null-space ratio from its two sufficient statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def null_space_ratio(quad: Tensor, sqnorm: Tensor) -> Tensor:
    """Share of the input that an adapter's down-projection discards (Eq. 6 of arXiv 2603.26317).

    ``omega_k = sqrt(max(1 - quad_k / sqnorm, 0))``

    Args:
        quad: ``[..., K]``, ``z^T A_k^T (A_k A_k^T)^-1 A_k z``, float32 or float64.
        sqnorm: ``[...]``, ``||z||^2``, same dtype.

    Returns:
        ``[..., K]`` in [0, 1]. An input of zero norm has ratio 1 (all of nothing is discarded).

    The gradient is exact where the ratio is resolved by the dtype and exactly zero elsewhere: where
    ``omega^2 <= eps`` (the input lies in the row space up to rounding; the derivative has no limit there, and zero is
    one of its subgradients) and where ``||z||^2`` has underflowed. It is never NaN or infinite for finite statistics;
    a NaN statistic gives a NaN ratio.
    Differentiable any number of times, in forward and reverse mode.

    Raises:
        TypeError, ValueError: naming the argument whose type, dtype or shape is another, and what was expected.
    """
    for name, t in (("quad", quad), ("sqnorm", sqnorm)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(t).__name__}")
    if quad.dim() == 0 or quad.shape[:-1] != sqnorm.shape:
        raise ValueError(
            f"quad must have shape sqnorm.shape + (K,): found quad {tuple(quad.shape)} and sqnorm {tuple(sqnorm.shape)}"
        )
    for name, t in (("quad", quad), ("sqnorm", sqnorm)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, found {t.dtype}")
    if quad.dtype is not sqnorm.dtype:
        raise TypeError(f"quad and sqnorm must share a dtype, found {quad.dtype} and {sqnorm.dtype}")
    limits = torch.finfo(quad.dtype)
    n = sqnorm.unsqueeze(-1)
    # The gradient 1 / (2 omega n) overflows below tiny / eps; selecting on the inputs of each operation, and not on
    # its result, keeps the unselected branch out of the derivative. Comparisons are the way round that lets NaN pass.
    vanishing = n <= limits.tiny / limits.eps
    square = 1 - quad / torch.where(vanishing, 1, n)
    resolved = ~vanishing & (square > limits.eps)
    omega = torch.where(resolved, square, 1).sqrt()
    unresolved = torch.where(vanishing, 1, square.detach().clamp(0, 1).sqrt())
    return torch.where(resolved, omega, unresolved)

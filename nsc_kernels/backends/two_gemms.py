"""The operator as two matrix products of PyTorch's own, on processors with a matrix unit.

Not a backend by itself: the cpu backend takes it on processors with Intel AMX, whose tiles oneDNN drives as well as
csrc/cpu does, for float16 too where there are such. Only for y alone and dz alone: PyTorch rounds ``u`` and ``v``
before it hands them over, and ``quad`` and ``dlam`` are formed from what is not rounded. And only over whole tiles: see
:func:`preferred`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..contract import BackwardCall, ForwardCall
from ..reference import spread

# Below this the products are too small for their set-up cost to be repaid.
MIN_TOKENS = 64
# Elements of a row that a tile holds.
TILE = 32
AMX_QUERY = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


def preferred(dtype: torch.dtype, T: int, summed: int) -> bool:
    """Whether two matrix products, the first over ``summed`` elements, beat the fused kernel on this processor and are
    right.

    Where a row does not fill its last tile, oneDNN may load what lies behind it, with zero for its factor: if that is
    NaN or infinite, which may be in the next row or in no row, so is the product. The second product, over the ranks,
    is filled up with zeros (:func:`_whole_tiles`).
    """
    return dtype in AMX_QUERY and T >= MIN_TOKENS and summed % TILE == 0 and has_tiles(dtype)


@cache
def has_tiles(dtype: torch.dtype) -> bool:
    query = getattr(torch.cpu, AMX_QUERY[dtype], None)
    return query is not None and query()


def forward(call: ForwardCall) -> tuple[Tensor, None, None, Tensor | None]:
    z, A, Bt, offsets, lam, base, _, save_u, _ = call
    u = z @ A.t()
    c, rows = _whole_tiles((spread(lam, offsets) * u.to(lam.dtype)).to(z.dtype), Bt)
    y = c @ rows if base is None else torch.addmm(base, c, rows)
    return y, None, None, u if save_u else None


def backward(call: BackwardCall) -> tuple[Tensor, None]:
    dy, dquad, dsqnorm, u, z, A, Bt, offsets, lam, dz_base, *_ = call
    wide = u.to(lam.dtype)
    c = torch.zeros_like(wide) if dy is None else spread(lam, offsets) * (dy @ Bt.t()).to(lam.dtype)
    if dquad is not None:
        c = c + 2 * spread(dquad, offsets) * wide
    start = dz_base
    if dsqnorm is not None:
        assert z is not None, "z must be saved when sqnorm has a gradient"
        tail = 2 * dsqnorm[:, None] * z.to(lam.dtype)
        start = (tail if start is None else start + tail).to(A.dtype)
    c, rows = _whole_tiles(c.to(A.dtype), A)
    return (c @ rows if start is None else torch.addmm(start, c, rows)), None


def _whole_tiles(c: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with zeros up to a whole number of tiles of ranks."""
    more = -c.shape[1] % TILE
    return (pad(c, (0, more)), pad(rows, (0, 0, 0, more))) if more else (c, rows)

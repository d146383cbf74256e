"""How much a call must move and compute, and how fast it could be: one formula for every contender.

The bytes are the *least* that a call of the operator moves: each input read once, each output written once, whatever a
contender really moves. So a share of the roofline compares contenders by their time alone.
"""

from __future__ import annotations

from typing import NamedTuple

from .shapes import Shape


class Ceilings(NamedTuple):
    """What the machine does at best, measured in the same run: bytes per second moved, operations per second."""

    memory: float
    products: float


def touched(shape: Shape, whole: bool, size: int = 2) -> int:
    """Bytes that every contender reads or writes in either direction: one input, one output, the weights.

    ``size``: bytes of an element. ``whole``: the frozen layer's own weight and product are part of the call.
    """
    weights = size * shape.R * (shape.d_in + shape.d_out) + whole * size * shape.d_in * shape.d_out
    return weights + size * shape.T * (shape.d_in + shape.d_out)


def least_bytes(shape: Shape, direction: str, whole: bool, inplace: bool, size: int = 2) -> int:
    """Each input once, each output once; u is written by the forward and read by the backward.

    The whole layer need not write what its own weight makes, nor read it again.
    """
    T, d_in, d_out = shape.T, shape.d_in, shape.d_out
    small = size * T * shape.R + 4 * T * (shape.K + 1)
    if direction == "forward":
        more = 0 if whole else size * T * d_out  # base
    else:
        more = size * T * d_in * (2 if inplace and not whole else 1)  # z, for the norm's gradient, and dz_base
    return touched(shape, whole, size) + small + more


def operations(shape: Shape, whole: bool) -> int:
    """Floating-point operations of the products of one direction."""
    return 2 * shape.T * (shape.R * (shape.d_in + shape.d_out) + whole * shape.d_in * shape.d_out)


def rotation(shape: Shape, whole: bool, cache_bytes: int, size: int = 2) -> int:
    """How many sets there must be for the others to move three times the cache between two turns of one."""
    return max(2, 1 + -(-3 * cache_bytes // touched(shape, whole, size)))


def roofline(moved: int, computed: int, ceilings: Ceilings) -> float:
    """The least seconds that the bytes and the operations take (Williams, Waterman and Patterson, 2009)."""
    return max(moved / ceilings.memory, computed / ceilings.products)

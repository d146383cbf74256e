"""Merges of A and of B apart, as PEFT does it where the new adapter is to have the rank of the old ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from nsc_merge.adapters import Adapter, Factor
from nsc_merge.methods.gradient_free import check_equal_ranks, present

# (name of the factor, task -> its values, task -> its weight) -> merged. The name is the module's path with ".lora_A"
# or ".lora_B" behind it, as PEFT has the factor, so that what is drawn at random differs between the two.
MergeOne = Callable[[str, Mapping[str, Tensor], Mapping[str, float]], Tensor]


def merged_in_factors(
    what: str,
    adapters: Mapping[str, Adapter],
    paths: Sequence[str],
    weights: Mapping[str, float],
    scale: float,
    merge_one: MergeOne,
) -> Iterator[tuple[str, Factor]]:
    """Path and the product of merged factors, which has cross terms between tasks and depends on how their updates are
    factored.

    Both factors of a task are weighted as :func:`roots_of` says.

    Args:
        what: asks for it, for the message.
        adapters: of equal ranks in each module.
        paths: of the modules.
        weights: task -> weight.
        scale: multiplies the merged update.
        merge_one: merges tensors of one shape, float32.

    Raises:
        ValueError: naming the module, if ranks differ there.
    """
    check_equal_ranks(what, adapters, paths)
    for path in paths:
        factors = present(adapters, path)
        into_A, into_B = roots_of(factors, weights)
        of_A, of_B = ("lora_B", "lora_A") if is_transposed(factors.values()) else ("lora_A", "lora_B")
        A = merge_one(f"{path}.{of_A}", {task: factor.A.float() for task, factor in factors.items()}, into_A)
        B = merge_one(f"{path}.{of_B}", {task: factor.B.float() for task, factor in factors.items()}, into_B)
        yield path, Factor(A, scale * B, 1.0)


def roots_of(
    factors: Mapping[str, Factor], weights: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """What A and what B of each task are weighted by: the root of weight times scaling; the sign of that goes to PEFT's
    first factor, which is A, of embeddings B.
    """
    shares = {task: weights[task] * factor.scaling for task, factor in factors.items()}
    roots = {task: math.sqrt(abs(share)) for task, share in shares.items()}
    signed = {task: math.copysign(roots[task], share) for task, share in shares.items()}
    return (roots, signed) if is_transposed(factors.values()) else (signed, roots)


def is_transposed(factors: Iterable[Factor]) -> bool:
    """Whether the first factor is B in PEFT, as it is of an embedding."""
    return any(factor.transposed for factor in factors)

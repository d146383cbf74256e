"""The merged update of a weight in the shape that it is kept in, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nsc_merge.adapters.algebra.low_rank import Rows, Term, dense, rows_of, transposed
from nsc_merge.models.bases.numbers import Stored
from nsc_merge.models.bases.transposed import is_transposed
from nsc_merge.models.merged.matrices import matrix_at, numbers_in


def update_of(
    model: nn.Module, name: str, paths: Iterable[str], terms: Callable[[str], Iterable[Term]], place: Stored
) -> Rows:
    """Rows of the update of a parameter, as many as are asked for, in float64 and of its other dimensions.

    Args:
        model: the base model.
        name: path of the parameter: a module's weight, or one that has the matrices of experts.
        paths: of all modules and matrices that are merged.
        terms: given one of them, what its update is the sum of.
        place: where the base's numbers are.
    """
    held = set(paths)
    numbers = numbers_in(held, name)
    if numbers:
        return _of_matrices(model, numbers, terms, place)
    # A router's path is that of its weight.
    path = name if name in held else name.rpartition(".")[0]
    turned = path != name and is_transposed(model.get_submodule(path))
    rows = rows_of(((lam, transposed(one) if turned else one) for lam, one in terms(path)), place.device, place.rows)
    # A norm's weight is the one column of its update, a convolution's has the kernel's dimensions.
    return lambda begin, end: rows(begin, end).reshape(-1, *place.values.shape[1:])


def _of_matrices(
    model: nn.Module, numbers: dict[int, str], terms: Callable[[str], Iterable[Term]], place: Stored
) -> Rows:
    matrix = matrix_at(model, next(iter(numbers.values())))
    turned = matrix is not None and matrix.transposed

    def rows(begin: int, end: int) -> Tensor:
        total = torch.zeros(end - begin, *place.values.shape[1:], dtype=torch.float64, device=place.device)
        for number in range(begin, end):
            if number in numbers:
                update = dense(terms(numbers[number])).to(place.device)
                total[number - begin] = update.t() if turned else update
        return total

    return rows

"""Squared gradients of weights, one by one for the examples of a batch, from few backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nsc_merge.processes.group import current

# Of per-example gradients [N, d_out, d_in] held at once.
_ENTRIES = 1 << 24

# Module path -> input and output of the linear there, of each of its runs in one forward.
Uses = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
# Weights [N] and values [N] of the examples of a batch; without weights only the sum of the values counts.
Term = tuple[Tensor | None, Tensor]


class SquaredGradients:
    """Of linears whose inputs and outputs were seen in a forward.

    Where the rows of a linear's input lie example after example, one backward of the sum over examples has all of their
    gradients. They do not everywhere: XLNet has positions before examples, and DeBERTa's linears read its relative
    positions, too, which all examples share. The gradients of the first and the last example alone tell; where they
    reach rows of others, each example gets a backward of its own. So it does where rows are of no shape that says how
    many an example has, as those that experts are sent.
    """

    def __init__(self) -> None:
        # Module, number of examples and rows of its inputs -> whether these lie example after example.
        self._in_turn: dict[tuple[str, int, tuple[int, ...]], bool] = {}

    def of(self, uses: Uses, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Path -> ``sum_n w_n (d value_n / d W)^2`` summed over terms, ``[d_out, d_in]`` in float32; of a term without
        weights ``(d sum_n value_n / d W)^2``. Modules that no value depends on are left out. Processes that share the
        work run equally many backward passes.
        """
        total: dict[str, Tensor] = {}
        for weights, values in terms:
            mixed: set[str] = set() if weights is None else self._mixed(uses, values)
            for path, pairs in _backward(uses, values.sum()).items():
                if path not in mixed:
                    _add(total, path, _squares(pairs, weights))
            # A model in shards runs its backward in all processes at once.
            for number in range(max(current().share([len(values) if mixed else 0]))):
                own = min(number, len(values) - 1)
                for path, pairs in _backward(uses, values[own]).items():
                    if path in mixed and weights is not None and own == number:
                        gradient = torch.stack([_rows(dy).t() @ _rows(z) for z, dy in pairs]).sum(0)
                        _add(total, path, weights[own].to(gradient) * gradient.square())
        return total

    def _mixed(self, uses: Uses, values: Tensor) -> set[str]:
        """The modules of whose inputs the rows do not lie example after example."""
        count = len(values)
        several = uses.items() if count > 1 else ()
        keys = {path: (path, count, tuple(len(z) for z, _ in pairs)) for path, pairs in several}
        flat = {path for path in keys if any(z.dim() < 3 and len(z) != count for z, _ in uses[path])}
        unknown = {path for path, key in keys.items() if path not in flat and key not in self._in_turn}
        if current().any(bool(unknown)):
            alone = [(number, _backward(uses, values[number])) for number in (0, count - 1)]
            for path in unknown:
                self._in_turn[keys[path]] = all(
                    _is_of(number, count, dy) for number, found in alone for _, dy in found.get(path, ())
                )
        return flat | {path for path, key in keys.items() if path not in flat and not self._in_turn[key]}


def _backward(uses: Uses, value: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Path -> inputs, and gradients of the outputs, of the runs that ``value`` depends on."""
    flat = [(path, z, y) for path, pairs in uses.items() for z, y in pairs]
    found = torch.autograd.grad(value, [y for _, _, y in flat], retain_graph=True, allow_unused=True)
    reached: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (path, z, _), dy in zip(flat, found, strict=True):
        if dy is not None:
            reached.setdefault(path, []).append((z, dy))
    return reached


def _is_of(number: int, count: int, dy: Tensor) -> bool:
    """Whether a gradient is zero but in the ``number``-th of ``count`` equal parts of its rows."""
    rows = _rows(dy)
    if len(rows) % count:
        return False
    parts = rows.unflatten(0, (count, -1))
    return not (parts[:number].any() or parts[number + 1 :].any())


def _rows(side: Tensor) -> Tensor:
    return side.reshape(-1, side.shape[-1]).float()


def _add(total: dict[str, Tensor], path: str, squares: Tensor) -> None:
    total[path] = squares if path not in total else total[path] + squares


def _squares(pairs: Sequence[tuple[Tensor, Tensor]], weights: Tensor | None) -> Tensor:
    """``sum_n w_n (sum_t dy[n, t] z[n, t]^T)^2``, ``[d_out, d_in]`` in float32, t over the positions of all pairs; the
    square of the sum over all n without weights.
    """
    count = 1 if weights is None else len(weights)
    z, dy = (
        torch.cat([side.reshape(count, -1, side.shape[-1]).float() for side in sides], 1)
        for sides in zip(*pairs, strict=True)
    )
    if weights is None:
        return (dy[0].t() @ z[0]).square()
    size = max(1, _ENTRIES // (z.shape[-1] * dy.shape[-1]))
    total = z.new_zeros(dy.shape[-1], z.shape[-1])
    for start in range(0, count, size):
        part = slice(start, start + size)
        gradients = torch.einsum("nto,nti->noi", dy[part], z[part])
        total += torch.einsum("n,noi->oi", weights[part].to(gradients), gradients.square())
    return total

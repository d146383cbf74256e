"""Updates of linears that have no room for one, as those that keep codes: added to what they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_merge.adapters import Factor
from nsc_merge.adapters.algebra.low_rank import concatenated, total_gain
from nsc_merge.models.forward_contexts import eager


@contextmanager
def added_outside(model: nn.Module, updates: Mapping[str, Sequence[tuple[float, Factor]]]) -> Iterator[None]:
    """Within it, linears of ``model`` give what they would with an update in their weight: it is added to their output
    in float32 and rounded once with it, as an adapter is served on such a base.

    Args:
        model: with the linears, which stay as they are.
        updates: path of a linear -> coefficients and updates that its own is the sum of.
    """
    with eager(model), ExitStack() as stack:
        for path, terms in updates.items():
            linear: Any = model.get_submodule(path)
            handle = linear.register_forward_hook(_Added(terms), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Added:
    """A forward hook that adds an update."""

    def __init__(self, terms: Sequence[tuple[float, Factor]]) -> None:
        self._A, self._B = concatenated(terms)
        # As they are: of full rank, each is as large as the layer.
        self._denses = [(lam * one.scaling, one.dense) for lam, one in terms if one.dense is not None]
        self._gain = total_gain(terms)
        biases = [lam * bias for lam, one in terms if (bias := one.bias_delta()) is not None]
        self._bias = torch.stack(biases).sum(0) if biases else None

    def __call__(self, linear: Any, given: tuple[Any, ...], named: Mapping[str, Any], y: Tensor) -> Tensor:
        def wide(value: Tensor) -> Tensor:
            return value.to(y.device, torch.float64 if y.dtype is torch.float64 else torch.float32)

        z = wide(given[0] if given else next(iter(named.values())))
        own = total = wide(y)
        # Brought there by the first call.
        self._A, self._B = wide(self._A), wide(self._B)
        total = total + F.linear(F.linear(z, self._A), self._B)
        for share, matrix in self._denses:
            total = total + share * F.linear(z, wide(matrix))
        if self._gain is not None:
            bias = getattr(linear, "bias", None)
            total = total + wide(self._gain) * (own if bias is None else own - wide(bias))
        if self._bias is not None:
            total = total + wide(self._bias)
        return total.to(y.dtype)

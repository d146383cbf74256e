"""FusionBench's layer-wise merged model (AdaMerging, arXiv 2310.02575), on LoRA factors instead of dense task vectors.

    import fusion_bench.method.adamerging.layer_wise_adamerging as theirs
    from nsc_merge.integrations.fusion_bench import LayerWiseMergedModel
    theirs.LayerWiseMergedModel = LayerWiseMergedModel

This file needs no FusionBench: :class:`LayerWiseFactors` is an ``nn.Module`` like any other. The class of the same name
as theirs, which is also one of theirs, is in :mod:`nsc_merge.integrations.fusion_bench`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_kernels import AdapterBank, MergedLoRALinear
from nsc_merge.adapters import Factor
from nsc_merge.integrations.fusion_bench_sources import linear_weights, updates_of

Mask = Mapping[str, Tensor]


class LayerWiseFactors(nn.Module):
    """A base model with K merged updates, each *parameter tensor* having a coefficient per update.

    What takes ``LayerWiseMergedModel``'s arguments in its place: the same columns of ``merge_weight``, the same outputs
    and the same gradient of ``merge_weight``, so that weights found with one can be loaded into the other. Updates of
    linears that are of low rank are held as factors and computed by :mod:`nsc_kernels`; no merged weight is formed
    until :meth:`merge_and_unload`. Others (norms, biases, embeddings, convolutions, linears that are tied or that
    ``nn.MultiheadAttention`` computes with unseen) are held whole where they are not zero, and added to the parameter
    once per :meth:`merge_weights`, as FusionBench does with all.

    Args:
        layer_wise_weight: ``[K, L]``, a row for each update, and a column for each parameter of ``pretrained_model``
            that requires a gradient, in the order of ``named_parameters()``. Becomes the parameter ``merge_weight``.
        pretrained_model: the base. It is frozen, and its adapted linears are wrapped in place, around their own weight
            tensors, until :meth:`merge_and_unload` takes the wrappers off.
        finetuned_models: K sources, each what :func:`nsc_merge.load_adapter` takes (a PEFT folder, a ``PeftModel``, an
            ``Adapter``), or a model like the base, whose differences from it are factored where they are of low rank.
            They are left unchanged.
        clamp_weights: use ``merge_weight`` cut to [0, 1].
        tie_weights: as ``functional_call`` has it, for parameters that are substituted whole.
        strict: accepted and without effect; only what changes is substituted.
        sparsity_ratio: refused unless None, as a pruned update is of no low rank.
        normalized_merging_weights: use the softmax of each column (after clamping).
        tolerance: relative error (Frobenius) up to which a difference of dense models counts as of low rank; None is
            rounding, see :func:`nsc_merge.adapters.algebra.factoring.factored`.

    Attributes:
        merge_weight: ``[K, L]``, the parameter that is learnt.
        layer_names: parameter of each column.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected, before the base is touched.
    """

    def __init__(
        self,
        layer_wise_weight: Tensor,
        pretrained_model: nn.Module,
        finetuned_models: Sequence[Any],
        clamp_weights: bool = True,
        tie_weights: bool = False,
        strict: bool = True,
        sparsity_ratio: float | None = None,
        normalized_merging_weights: bool = False,
        *,
        tolerance: float | None = None,
    ):
        nn.Module.__init__(self)
        if sparsity_ratio is not None:
            raise ValueError(
                f"sparsity_ratio: expected None, found {sparsity_ratio!r}: a pruned update is of no low rank; "
                "FusionBench's own LayerWiseMergedModel prunes dense task vectors"
            )
        names = _columns(layer_wise_weight, pretrained_model, len(finetuned_models))
        updates = [
            updates_of(pretrained_model, source, f"finetuned_models[{k}]", tolerance)
            for k, source in enumerate(finetuned_models)
        ]
        for k, held in enumerate(updates):
            if frozen := sorted(held.keys() - set(names)):
                raise ValueError(
                    f"finetuned_models[{k}]: changes {frozen[0]!r}, which has no column in layer_wise_weight, being "
                    "frozen in pretrained_model (requires_grad); FusionBench would leave that update out"
                )
        self.clamp_weights = clamp_weights
        self.normalized_merging_weights = normalized_merging_weights
        self.tie_weights, self.strict, self.sparsity_ratio = tie_weights, strict, None
        self.layer_names = names
        self.merge_weight = nn.Parameter(layer_wise_weight, requires_grad=True)
        self._spent = False
        self._substitutes: dict[str, Tensor] | None = None
        self._state_names = list(pretrained_model.state_dict())
        # Path of a linear whose updates are factors -> its column; any other parameter -> which updates change it.
        self._wrapped: dict[str, int] = {}
        self._whole: dict[str, list[int]] = {}
        self._hold(pretrained_model, updates)

    def _hold(self, base: nn.Module, updates: Sequence[Mapping[str, Factor | Tensor]]) -> None:
        """Put the updates of linears around these, and the others into buffers."""
        alone = linear_weights(base)
        banks = {}
        for column, name in enumerate(self.layer_names):
            found = {k: held[name] for k, held in enumerate(updates) if name in held}
            if not found:
                continue
            path, value = name.removesuffix(".weight"), base.get_parameter(name)
            if name in alone and all(isinstance(one, Factor) for one in found.values()):
                banks[path] = _bank(value, found, len(updates))
                self._wrapped[path] = column
                continue
            self._whole[name] = list(found)
            for k, one in found.items():
                delta = one.delta() if isinstance(one, Factor) else one
                self.register_buffer(f"update_{column}_{k}", delta.to(value), persistent=False)
        self.pretrained_model = base.requires_grad_(False)
        for path, bank in banks.items():
            lam = torch.zeros(len(updates), dtype=torch.float32, device=bank.device)
            _replace(base, path, MergedLoRALinear(base.get_submodule(path), bank, lam))

    @property
    def forward_model(self) -> Callable[..., Any]:
        """The merged model as a function of ``args`` and ``kwargs``, with the weights of the last merge."""
        self._check_held()
        if self._substitutes is None:
            self.merge_weights()
        assert self._substitutes is not None
        return functools.partial(
            functional_call, self.pretrained_model, self._substitutes, tie_weights=self.tie_weights, strict=False
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_model(args=args, kwargs=kwargs)

    def merge_weights(self, task_vector_mask: Mask | None = None) -> MergedWeights:
        """Take ``merge_weight`` as it is now for the next calls; to be called after each step.

        Args:
            task_vector_mask: parameter name -> what its updates are multiplied by, of the parameter's shape or one
                number, for every column. Merged weights of the linears are then formed, as a masked product is of no
                low rank.

        Returns:
            The merged state dictionary, differentiable in ``merge_weight``, whose merged entries are computed when they
            are asked for.
        """
        self._check_held()
        weights = self._weights()
        if task_vector_mask is not None:
            missing = [name for name in self.layer_names if name not in task_vector_mask]
            if missing:
                raise ValueError(
                    f"task_vector_mask: expected a mask for every column, found none for {len(missing)}, for example "
                    f"{missing[0]!r}"
                )
        merged = MergedWeights(self, weights, task_vector_mask)
        values = {}
        for path, column in self._wrapped.items():
            if task_vector_mask is None:
                # A copy: an optimiser's step must not reach what was merged before it.
                values[f"{path}.lam"] = weights[:, column].clone()
            else:
                values[f"{path}.linear.weight"] = merged[f"{path}.weight"]
        for name in self._whole:
            path, _, part = name.rpartition(".")
            values[f"{path}.linear.{part}" if path in self._wrapped else name] = merged[name]
        self._substitutes = values
        return merged

    def merge_and_unload(self, task_vector_mask: Mask | None = None, copy: bool = False) -> nn.Module:
        """The base with the merged weights in it, and without wrappers.

        Args:
            task_vector_mask: as of :meth:`merge_weights`.
            copy: return a copy and leave the base and this module as they are. Otherwise the base itself is changed and
                returned, and this module has done its work: it refuses further calls.
        """
        with torch.no_grad():
            merged = self.merge_weights(task_vector_mask)
            values = {name: merged[name].clone() for name in merged.changed}
        model = deepcopy(self.pretrained_model) if copy else self.pretrained_model
        for path in self._wrapped:
            wrapper: Any = model.get_submodule(path)
            _replace(model, path, wrapper.linear)
        self._spent = not copy
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        return model

    def _check_held(self) -> None:
        if self._spent:
            raise RuntimeError(
                "merge_and_unload() put the merged weights into pretrained_model, which is no base any more; expected "
                "merge_and_unload(copy=True) where this module is used further"
            )

    def _weights(self) -> Tensor:
        weights = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        return weights.softmax(dim=0) if self.normalized_merging_weights else weights

    def _task_vectors(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Number and update of each that changes a parameter."""
        path = name.removesuffix(".weight")
        if path in self._wrapped and path != name:
            wrapper: Any = self.pretrained_model.get_submodule(path)
            A, Bt, offsets = wrapper.bank.packed
            for k, (begin, end) in enumerate(pairwise(offsets)):
                if end > begin:
                    yield k, Bt[begin:end].t() @ A[begin:end]
            return
        column = self.layer_names.index(name)
        for k in self._whole[name]:
            yield k, self.get_buffer(f"update_{column}_{k}")


class MergedWeights(Mapping[str, Tensor]):
    """The state dictionary of a merged model, under the base's names, computed entry by entry.

    Attributes:
        changed: names of the parameters that some update changes.
    """

    def __init__(self, model: LayerWiseFactors, weights: Tensor, mask: Mask | None):
        self.changed = [*(f"{path}.weight" for path in model._wrapped), *model._whole]
        self._model, self._weights, self._mask = model, weights, mask
        held = model.pretrained_model.state_dict(keep_vars=True)
        self._own: dict[str, Tensor] = {}
        for name in model._state_names:
            path, _, part = name.rpartition(".")
            self._own[name] = held[f"{path}.linear.{part}" if path in model._wrapped else name]

    def __getitem__(self, name: str) -> Tensor:
        value = self._own[name]
        if name not in self.changed:
            return value
        weights = self._weights[:, self._model.layer_names.index(name)]
        for k, update in self._model._task_vectors(name):
            share = weights[k] if self._mask is None else weights[k] * self._mask[name]
            value = value + (update * share).to(value.dtype)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def _columns(layer_wise_weight: Any, base: nn.Module, count: int) -> list[str]:
    """The parameter of each column, of which there have to be as many as parameters that require a gradient."""
    names = [name for name, value in base.named_parameters() if value.requires_grad]
    expected = (count, len(names))
    if not isinstance(layer_wise_weight, Tensor) or tuple(layer_wise_weight.shape) != expected:
        shape = list(layer_wise_weight.shape) if isinstance(layer_wise_weight, Tensor) else layer_wise_weight
        raise ValueError(
            f"layer_wise_weight: expected {list(expected)}, a row for each of finetuned_models and a column for "
            f"each parameter of pretrained_model that requires a gradient, found {shape!r:.60}"
        )
    return names


def _bank(weight: Tensor, found: Mapping[int, Factor | Tensor], count: int) -> AdapterBank:
    absent = Factor.empty(weight.shape[0], weight.shape[1])
    factors = [one if isinstance(one := found.get(k), Factor) else absent for k in range(count)]
    return AdapterBank.from_factors(
        [one.A for one in factors],
        [one.B for one in factors],
        [one.scaling for one in factors],
        dtype=weight.dtype,
        device=weight.device,
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

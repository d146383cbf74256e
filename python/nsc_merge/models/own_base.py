"""A base whose tied weights are apart where adapters change one of them on its own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from nsc_merge.adapters import Adapter
from nsc_merge.models.bases.loading import keep_files
from nsc_merge.models.bases.numbers import file_tensor
from nsc_merge.models.bases.quantised import is_linear
from nsc_merge.models.bases.stored_weights import is_plain, offloading, sharing
from nsc_merge.models.bases.transposed import is_transposed
from nsc_merge.models.fitting import renamed
from nsc_merge.models.merged.matrices import matrix_at
from nsc_merge.models.trained_in_full import is_unchanged
from nsc_merge.models.traits import configs_to_untie, input_embeddings

# On a copy: what it shares tensors with, and its own number, which a copy of the copy lacks.
_COPY_OF = "_nsc_merge_copy_of"
# Paths of modules that were another under a second name, and have one of their own on the copy.
_SPLIT = "_nsc_merge_split"


def own_base(model: nn.Module, adapters: Mapping[str, Adapter]) -> tuple[nn.Module, dict[str, Adapter]]:
    """The base to merge on, and the adapters by its names.

    PEFT gives every name of a tied weight (head and embeddings) an update of its own: what has none keeps the base's
    weight. Where an adapter changes a tied weight, the base is therefore a copy of ``model`` that shares every tensor
    with it, but has a weight for each of the tied names, and a configuration that does not tie them, unless its forward
    looks at that. Rows of tokens that PEFT trains in tied embeddings count under every name that has no rows of its
    own, as they do in PEFT.

    A model whose weights are quantised, in shards, or offloaded by a hook is not copied; what cannot be merged into
    tied weights is then refused by name where it is fitted or saved.

    Args:
        model: the base as given.
        adapters: task -> adapter as read.

    Returns:
        The model itself where no tied weight changes.
    """
    if not callable(getattr(model, "get_input_embeddings", None)):
        return model, dict(adapters)
    found = renamed(adapters, model)
    groups = {tuple(names) for names in sharing(model).values() if len(names) > 1}
    touched = any(_touches(adapter, group, model) for group in groups for adapter in found.values())
    if not touched or not can_be_copied(model):
        return model, dict(adapters)
    own = with_weights_apart(model, groups)
    return own, {task: with_rows_everywhere(adapter, groups, model) for task, adapter in found.items()}


def linears_of(adapter: Adapter, model: nn.Module) -> Adapter:
    """An adapter without its updates of embeddings, norms and experts, for what looks at inputs of linears."""
    modules = dict(model.named_modules())
    factors = {
        path: one
        for path, one in adapter.factors.items()
        if (is_linear(modules[path]) or is_transposed(modules[path]) if path in modules else not matrix_at(model, path))
    }
    return replace(adapter, factors=factors)


def _touches(adapter: Adapter, group: tuple[str, ...], model: nn.Module) -> bool:
    changed = {f"{path}.weight" for path in (*adapter.factors, *adapter.token_rows)}
    trained = {name: adapter.trained[name] for name in group if name in adapter.trained}
    changed |= {name for name, value in trained.items() if not is_unchanged(model, name, value)}
    return not changed.isdisjoint(group)


def can_be_copied(model: nn.Module) -> bool:
    """Whether the model is whole in this process, in plain numbers or in its files, with nothing hooked into it."""
    plain = all(is_plain(value) or file_tensor(value) is not None for value in model.parameters())
    hooked = any(offloading(module) is not None or hasattr(module, "_hf_hook") for module in model.modules())
    return plain and not hooked and not getattr(model, "is_quantized", False)


def sharing_tensors(model: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of a model's modules and configuration around the very same parameters and buffers, with other modules, or
    the very same, in the place of those of ``instead``.
    """
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    # accelerate's hold offloaded weights, and those of diffusers the original's modules.
    hooks = (vars(module).get(name) for module in model.modules() for name in ("_hf_hook", "_diffusers_hook"))
    shared |= {id(hook): hook for hook in hooks if hook is not None} if instead else {}
    own = copy.deepcopy(model, shared | {id(module): other for module, other in (instead or {}).items()})
    for module in set(own.modules()).difference(model.modules()):
        # diffusers' hooks call the forward of the module that they were made for.
        if getattr(vars(module).pop("_diffusers_hook", None), "hooks", None):
            vars(module).pop("forward", None)
    keep_files(own, model)
    setattr(own, _COPY_OF, (weakref.ref(original_of(model)), id(own)))
    return own


def original_of(model: nn.Module) -> nn.Module:
    """The model that :func:`sharing_tensors` made this very one of, whose tensors change with it; or else itself."""
    reference, number = getattr(model, _COPY_OF, (lambda: None, 0))
    original = reference() if number == id(model) else None
    return model if original is None else original


def split_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths at which :func:`own_base` put a module of their own, and the base as given has one that it has elsewhere,
    too: PEFT adapts such a module under its first name alone.
    """
    return getattr(model, _SPLIT, ())


def with_weights_apart(model: nn.Module, groups: Collection[tuple[str, ...]]) -> nn.Module:
    """A copy of a model that shares every tensor with it but those of ``groups``, each of names of one tensor."""
    own: Any = sharing_tensors(model)
    split: list[str] = []
    for group in groups:
        # The first name keeps the tensor.
        seen = {own.get_submodule(group[0].rpartition(".")[0])}
        for name in group[1:]:
            path, _, part = name.rpartition(".")
            module = own.get_submodule(path)
            if module in seen:
                # One module under several names, as T5 has its embeddings once they were resized.
                module = sharing_tensors(module)
                own.set_submodule(path, module)
                split.append(path)
            seen.add(module)
            weight = module.get_parameter(part)
            apart = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            if there := file_tensor(weight):
                there.attach_to(apart)
            setattr(module, part, apart)
    for config in configs_to_untie(own):
        config.tie_word_embeddings = False
    own.all_tied_weights_keys = {}
    setattr(own, _SPLIT, tuple(split))
    return own


def with_rows_everywhere(adapter: Adapter, groups: Collection[tuple[str, ...]], model: Any) -> Adapter:
    """An adapter whose rows of tokens in the embeddings are those of all that ``groups`` tie to these."""
    embeddings = input_embeddings(model)
    source = next((path for path in adapter.token_rows if model.get_submodule(path) is embeddings), None)
    if source is None:
        return adapter
    paths = [name.rpartition(".")[0] for group in groups if f"{source}.weight" in group for name in group]
    rows = dict.fromkeys(paths, adapter.token_rows[source])
    return replace(adapter, token_rows={**rows, **adapter.token_rows})

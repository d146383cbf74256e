"""A base whose vocabulary has grown to that of its adapters: rows of tokens that only some adapters know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Adapter
from nsc_merge.models.bases.stored_weights import sharing
from nsc_merge.models.fitting import renamed
from nsc_merge.models.own_base import can_be_copied, sharing_tensors, with_rows_everywhere, with_weights_apart
from nsc_merge.models.trained_in_full import base_value
from nsc_merge.models.traits import input_embeddings, output_embeddings

ADDED_TOKENS = ("refuse", "mean", "first", "base")
# On the base: paths of the embedding and head that have more rows than the model that was handed over.
_GROWN = "_nsc_merge_grown"
# And of what is tied to them under names that are neither.
_ELSEWHERE = "_nsc_merge_grown_elsewhere"


def grown_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of embedding and head, where :func:`with_vocabulary` gave a base more tokens."""
    return getattr(model, _GROWN, ())


def grown_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Paths of other modules that got the same new rows, such as the embeddings of T5's encoder and decoder."""
    return getattr(model, _ELSEWHERE, ())


def with_vocabulary(
    model: nn.Module, adapters: Mapping[str, Adapter], added_tokens: str
) -> tuple[nn.Module, dict[str, Adapter]]:
    """The base with as many tokens as the adapter that has most, and the adapters cut or filled up to as many.

    The base is a copy of ``model`` that shares every other tensor. The rows that adapters have for new tokens, trained
    or not, become the base's, so that no coefficient scales them; what LoRA adds to them stays the adapter's.

    Args:
        model: the base as given.
        adapters: task -> adapter as read.
        added_tokens: ``"mean"`` over the tasks that have a token, of the ``"first"`` task that has it, or ``"base"``,
            which leaves new tokens out. ``"refuse"`` changes nothing: an adapter with more tokens is then refused when
            it is fitted.

    Raises:
        ValueError: if ``added_tokens`` is none of these, if the model cannot be copied, or if a row is not known.
    """
    if added_tokens not in ADDED_TOKENS:
        raise ValueError(f"added_tokens: expected one of {list(ADDED_TOKENS)}, found {added_tokens!r}")
    if added_tokens == "refuse":
        return model, dict(adapters)
    found = renamed(adapters, model)
    tables = _tables(model)
    if not tables:
        raise ValueError(f"added_tokens: {type(model).__name__} has no token embeddings; expected a language model")
    old = min(len(model.get_parameter(name)) for name in tables)
    found = {task: _with_tied(adapter, tables, model) for task, adapter in found.items()}
    sizes = {task: _size(adapter, tables, old) for task, adapter in found.items()}
    if max(sizes.values()) == old:
        return model, dict(adapters)
    if added_tokens == "base":
        return model, {task: _of_size(adapter, tables, model, old, old) for task, adapter in found.items()}
    if not can_be_copied(model) or any(value.is_meta for value in map(model.get_parameter, tables)):
        raise ValueError(
            f"added_tokens={added_tokens!r}: the vocabulary can only grow of a base that is loaded whole and "
            "unquantised on one device; expected such a base, added_tokens='base', or one resized as the "
            "adapters' bases were (resize_token_embeddings)"
        )
    _check_texts(found)
    size = max(sizes.values())
    own = _grown(model, tables, size)
    rows = {name: _new_rows(found, name, old, size, added_tokens) for name in tables}
    own, found = _untied(own, found, rows)
    for name, values in rows.items():
        weight = own.get_parameter(name).detach()
        weight[old:] = values.to(weight)
    note = (
        f"merged on a base whose vocabulary has grown from {old} tokens to {size}: resize what a saved adapter is "
        f"loaded on with resize_token_embeddings({size})"
    )
    cut = {task: _of_size(adapter, tables, own, old, size) for task, adapter in found.items()}
    return own, {task: replace(adapter, notes=(*adapter.notes, note)) for task, adapter in cut.items()}


def _tables(model: nn.Module) -> list[str]:
    """Names of the weights that have a row for each token."""
    parts = (input_embeddings(model), output_embeddings(model))
    return [f"{path}.weight" for path, module in model.named_modules() if any(module is part for part in parts)]


def _with_tied(adapter: Adapter, tables: list[str], model: nn.Module) -> Adapter:
    """An adapter that knows the base's rows of a weight under all names that the base ties to it: with LoRA on one of
    them, PEFT saves them under that alone.
    """
    saved = dict(adapter.base_weights)
    shared = sharing(model)
    for name in tables:
        known = next((saved[other] for other in shared[name] if other in saved), None)
        if known is not None and name not in adapter.trained:
            saved.setdefault(name, known)
    return replace(adapter, base_weights=saved)


def _size(adapter: Adapter, tables: list[str], old: int) -> int:
    held = (values.get(name) for name in tables for values in (adapter.trained, adapter.base_weights))
    return max((len(values) for values in held if values is not None), default=old)


def _check_texts(adapters: Mapping[str, Adapter]) -> None:
    """Refuse tokenizers beside adapters that give one number to different texts."""
    from transformers import AutoTokenizer

    known: dict[int, tuple[str, str]] = {}
    for task, adapter in adapters.items():
        if adapter.source is None or not (adapter.source / "tokenizer_config.json").is_file():
            continue
        tokenizer = AutoTokenizer.from_pretrained(adapter.source, local_files_only=True, trust_remote_code=False)
        for text, number in tokenizer.get_vocab().items():
            other, held = known.setdefault(number, (task, text))
            if held != text:
                raise ValueError(
                    f"added_tokens: token {number} is {held!r:.60} of adapters[{other!r}] and {text!r:.60} of "
                    f"adapters[{task!r}]; expected tokenizers that agree, or added_tokens='base'"
                )


def _new_rows(adapters: Mapping[str, Adapter], name: str, old: int, size: int, added_tokens: str) -> Tensor:
    """The base's rows of a weight for the tokens from ``old`` on, in float64."""
    rows = []
    for row in range(old, size):
        held = [values[row] for adapter in adapters.values() if (values := _rows(adapter, name, row)) is not None]
        if not held:
            raise ValueError(
                f"added_tokens: no adapter has a row of {name} for token {row}; expected adapters saved with "
                "save_embedding_layers=True (PEFT leaves out lm_head where LoRA is on the embedding alone), or "
                "added_tokens='base'"
            )
        chosen = held[:1] if added_tokens == "first" else held
        rows.append(torch.stack([one.double() for one in chosen]).mean(0))
    return torch.stack(rows)


def _untied(
    own: Any, adapters: dict[str, Adapter], rows: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Adapter]]:
    """The base with weights of their own where it ties some for which adapters have different new rows: those that
    trained the embedding alone, whose head kept what the base had. Rows of tokens that were trained while the two were
    one count for each then.
    """
    unlike = []
    for group in {tuple(names) for names in sharing(own).values() if len(names) > 1}:
        held = [name for name in group if name in rows]
        if all(torch.equal(rows[held[0]], rows[name]) for name in held):
            continue
        unlike.append(group)
        if others := [name for name in group if name not in rows]:
            raise ValueError(
                f"added_tokens: adapters have new rows of {held[0]} and {held[1]} that differ, which the base ties to "
                f"{others[0]} as well, whose rows no adapter has; expected a base resized as theirs were "
                "(resize_token_embeddings), or added_tokens='base'"
            )
    if not unlike:
        return own, adapters
    return with_weights_apart(own, unlike), {
        task: with_rows_everywhere(adapter, unlike, own) for task, adapter in adapters.items()
    }


def _rows(adapter: Adapter, name: str, row: int) -> Tensor | None:
    """The values of a weight, where the adapter has that row."""
    values = adapter.trained.get(name, adapter.base_weights.get(name))
    return values if values is not None and len(values) > row else None


def _of_size(adapter: Adapter, tables: list[str], base: nn.Module, old: int, size: int) -> Adapter:
    """An adapter whose tables have ``size`` rows: those beyond ``old`` are the base's."""
    trained, saved, factors = dict(adapter.trained), dict(adapter.base_weights), dict(adapter.factors)
    for name in tables:
        for held in (trained, saved):
            if name in held:
                held[name] = torch.cat([held[name][:old], base_value(base, name)[old:size].to(held[name])])
        path = name.rpartition(".")[0]
        factor = factors.get(path)
        if factor is not None and len(factor.B) != size:
            B = factor.B[:size]
            factors[path] = replace(factor, B=torch.cat([B, B.new_zeros(size - len(B), B.shape[1])]))
    return replace(adapter, trained=trained, base_weights=saved, factors=factors)


def _grown(model: Any, tables: list[str], size: int) -> Any:
    own: Any = sharing_tensors(model)
    # resize_token_embeddings writes into the old weight's place.
    apart: dict[int, nn.Parameter] = {}
    for name in tables:
        weight = own.get_parameter(name)
        path, _, part = name.rpartition(".")
        copied = apart.setdefault(id(weight), nn.Parameter(weight.detach().clone(), weight.requires_grad))
        apart[id(copied)] = copied
        setattr(own.get_submodule(path), part, copied)
    own.resize_token_embeddings(size, mean_resizing=False)
    setattr(own, _GROWN, tuple(name.rpartition(".")[0] for name in tables))
    shared = sharing(own)
    names = dict.fromkeys(name for table in tables for name in shared[table] if name not in tables)
    setattr(own, _ELSEWHERE, tuple(name.rpartition(".")[0] for name in names))
    return own

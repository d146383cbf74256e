"""Adapters of experts made updates of single matrices: those of whole parameters (PEFT's ``target_parameters``), and
those of experts that were modules in transformers 4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nsc_merge.adapters import Factor
from nsc_merge.adapters.adapter import WRAPPER, Stack, parameters_of, unwrapped
from nsc_merge.adapters.formats.parameter_stacks import matrices_of
from nsc_merge.adapters.peft_keys import PREFIX
from nsc_merge.models.bases.quantised import is_linear
from nsc_merge.models.families import find_family
from nsc_merge.models.merged.matrices import Matrix, matrix_at, module_at
from nsc_merge.models.renaming import name_today, rules_of
from nsc_merge.models.traits import type_of


def updates_of_stacks(
    task: str, stacks: Mapping[str, Stack], model: nn.Module, today: Callable[[str], str]
) -> dict[str, Factor]:
    """Path of a matrix -> its update, of LoRA on parameters.

    PEFT puts a wrapper around a module for each of its parameters, one around the other in the order that the module
    has them, so that a key tells its parameter by how many ``base_layer`` it has. In ``lora_A [E r, d_in]`` the rows of
    an expert lie together, in ``lora_B [d_out, r E]`` the columns of one rank do.

    Args:
        task: for messages.
        stacks: PEFT's path -> tensors.
        model: the base model.
        today: what a module of the adapter is called in the model.

    Raises:
        ValueError: naming the module, if it is not in the model, has not the parameters that the configuration names,
            or a shape does not fit.
    """
    owners: dict[str, list[Stack]] = {}
    # The outermost wrapper's path is the shortest, and its parameter the last.
    for path in sorted(stacks, key=len, reverse=True):
        owners.setdefault(unwrapped(path), []).append(stacks[path])
    factors: dict[str, Factor] = {}
    for owner, held in owners.items():
        named = today(owner)
        module = module_at(model, named)
        if module is None:
            raise ValueError(
                f"adapters[{task!r}]: {owner} has adapted parameters (target_parameters), but {type(model).__name__} "
                "has no such module; expected the model that the adapter was trained on"
            )
        targets = list(dict.fromkeys(target for stack in held for target in stack.targets))
        selected = parameters_of(owner, targets)
        names = [name for name, _ in module.named_parameters(recurse=False) if name in selected]
        if len(names) != len(held):
            raise ValueError(
                f"adapters[{task!r}]: {owner} has tensors for {len(held)} parameters, and target_parameters="
                f"{targets!r:.100} names {names} of {type(module).__name__}; expected one of each"
            )
        for name, stack in zip(names, held, strict=True):
            # LoRA on the weight of a linear is the linear's own.
            path = named if name == "weight" and is_linear(module) else f"{named}.{name}"
            factors.update(_of_parameter(task, path, f"{owner}.{name}", stack, module, name))
    return factors


def _of_parameter(
    task: str, path: str, trained: str, stack: Stack, module: nn.Module, name: str
) -> dict[str, Factor]:
    value = module._parameters[name]
    assert value is not None
    rank, scaling = stack.settings(trained)
    experts, (first, second) = len(value) if value.dim() == 3 else 1, value.shape[-2:]
    turned = value.dim() == 3 and bool(getattr(module, "is_transposed", False))
    d_out, d_in = (second, first) if turned else (first, second)
    wanted = [rank * experts, d_in], [d_out, rank * experts]
    found = list(stack.A.shape), list(stack.B.shape)
    swapped = [rank * experts, d_out], [d_in, rank * experts]
    if value.dim() == 3 and found == swapped and (found != wanted or _is_swapped(stack.peft_version, turned)):
        return {
            f"{path}.{number}": Factor(one.B.t().contiguous(), one.A.t().contiguous(), scaling)
            for number, one in enumerate(matrices_of(stack, rank, scaling))
        }
    if found != wanted:
        raise ValueError(
            f"adapters[{task!r}]: {trained}: expected lora_A {wanted[0]} and lora_B {wanted[1]} for {experts} matrices "
            f"of rank {rank}, found {list(stack.A.shape)} and {list(stack.B.shape)}"
        )
    if value.dim() == 2:
        return {path: Factor(stack.A, stack.B, scaling)}
    return {f"{path}.{number}": one for number, one in enumerate(matrices_of(stack, rank, scaling))}


def _is_swapped(peft_version: str, turned: bool) -> bool:
    """Whether that PEFT took outputs for inputs, which today's refuses or, of square matrices, misreads: 0.17, which
    left no version, and 0.18 those of matrices ``[d_out, d_in]``, 0.19.0 all.
    """
    return peft_version.startswith("0.19.0") or (peft_version.startswith("0.18.") and not turned)


def stacks_of_updates(updates: Mapping[str, Factor], model: nn.Module) -> dict[str, Stack]:
    """PEFT's path of a module -> LoRA on one of its parameters, of updates of matrices: what
    :func:`updates_of_stacks` reads.

    Args:
        updates: path of a matrix -> its update, with a scaling of 1.
        model: the base model.
    """
    held: dict[str, dict[str, list[tuple[Matrix, Factor]]]] = {}
    for path, factor in updates.items():
        matrix = matrix_at(model, path)
        assert matrix is not None
        held.setdefault(matrix.owner, {}).setdefault(matrix.name, []).append((matrix, factor))
    stacks = {}
    for owner, parameters in held.items():
        names = [name for name, _ in model.get_submodule(owner).named_parameters(recurse=False) if name in parameters]
        for depth, name in enumerate(reversed(names)):
            stacks[owner + depth * WRAPPER] = _stacked(parameters[name])
    return stacks


def stacks_of_linears(factors: Mapping[str, Factor], model: nn.Module) -> dict[str, Stack]:
    """Path of a linear -> LoRA on its weight as a parameter, of those of ``factors`` that PEFT, as it loads an adapter,
    takes for the experts of transformers 4 by their names, and loses: the ``gate_proj`` of DeepSeek's shared experts.
    Parameters it takes as they are called. None where an update has a bias or DoRA, which PEFT has on modules alone.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    @functools.cache
    def is_taken(name: str) -> bool:
        config = LoraConfig(target_modules=[f"of.{name}"])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            # Half of a matrix that was fused.
            return True
        return not config.target_modules

    def whole(path: str, factor: Factor) -> Stack:
        return Stack(factor.A, factor.B, (f"{path}.weight",), lambda _: (factor.rank, 1.0))

    if any(factor.bias is not None or factor.magnitude is not None for factor in factors.values()):
        return {}
    return {
        path: whole(path, factor)
        for path, factor in factors.items()
        if isinstance(model.get_submodule(path), nn.Linear) and is_taken(path.rpartition(".")[2])
    }


def lost_by_peft(paths: Iterable[str], model: nn.Module, names: Mapping[str, str] | None = None) -> list[str]:
    """Linears whose update PEFT loses as it loads an adapter: it treats the tensors' names as transformers treats those
    of a checkpoint, and of some models makes names of them that no module has (``shared_expert.`` in a pattern is
    also the beginning of ``shared_experts``).

    Args:
        names: path -> name that its tensors have in the file, where that is not the path.
    """
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return []
    own = {path: [f"{PREFIX}{path}.lora_{part}.weight" for part in "AB"] for path in paths}
    written = (f"{PREFIX}{(names or {}).get(path, path)}.lora_{part}.weight" for path in own for part in "AB")
    made = {key: torch.zeros(1, 1, device="cpu") for key in written}
    try:
        found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), made)
    except Exception:
        # It is PEFT's own affair what it converts, and how: of numbers as these it need not.
        return list(names or ())
    left = {key.replace(".default", "") for key in found}
    return [path for path, keys in own.items() if not left.issuperset(keys)]


def names_for_peft(paths: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Path of a linear -> name of its tensors in a file, of those that PEFT loses under their own name and finds under
    this one: that of the weight in a checkpoint, of which PEFT and transformers make today's. Of those alone that are
    found again here, too.
    """
    lost = [path for path in lost_by_peft(paths, model) if isinstance(model.get_submodule(path), nn.Linear)]
    names = {path: name for path in lost if (name := _in_a_checkpoint(path, model)) is not None}
    if not names:
        return {}
    still = lost_by_peft(names, model, names)
    modules, rules = {path for path, _ in model.named_modules()}, rules_of(model, find_family(model))
    return {
        path: name
        for path, name in names.items()
        if path not in still and name_today(name, modules, rules, "") == path
    }


def _in_a_checkpoint(path: str, model: nn.Module) -> str | None:
    from transformers.core_model_loading import revert_weight_conversion

    weight: Any = {f"{path}.weight": torch.zeros(1, 1, device="cpu")}
    try:
        (key,) = revert_weight_conversion(model, weight)
    except Exception:
        # Of a weight that is one of several in a checkpoint, or part of one.
        return None
    return str(key).removesuffix(".weight")


def _stacked(held: list[tuple[Matrix, Factor]]) -> Stack:
    matrix = held[0][0]
    rank, experts = max(factor.rank for _, factor in held), 1 if matrix.number is None else len(matrix.weight)
    A = torch.zeros(experts, rank, matrix.in_features, dtype=torch.float32, device="cpu")
    B = torch.zeros(matrix.out_features, rank, experts, dtype=torch.float32, device="cpu")
    for one, factor in held:
        A[one.number or 0, : factor.rank] = factor.A
        B[:, : factor.rank, one.number or 0] = factor.B
    return Stack(A.flatten(0, 1), B.flatten(1), (matrix.parameter,), lambda _: (rank, 1.0))


def updates_of_experts(
    task: str, factors: Mapping[str, Factor], model: nn.Module, today: Callable[[str], str]
) -> tuple[dict[str, Factor], set[str]]:
    """Path of a matrix -> its update, of LoRA on experts that were modules and are parameters now; and the paths that
    these were made of.

    Which parameter they went to, and in which rows, is what transformers does with files of earlier releases
    (``conversion_mapping``): where a parameter has the matrices of several of them, one above the other, the update's
    factors are theirs, ``A`` one above the other and ``B`` in blocks.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = type_of(model)
    conversions: Any = [
        entry
        for entry in get_checkpoint_conversion_mapping(kind) or ()
        if [type(one).__name__ for one in getattr(entry, "operations", None) or ()]
        in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
    ]
    found: dict[str, dict[int, Factor]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    used = set()
    for path, factor in factors.items():
        for entry in conversions:
            for place, pattern in enumerate(entry.source_patterns):
                if ".*." not in pattern:
                    continue
                match = re.search(pattern.replace(".*.", r"\.(\d+)\.") + "$", f"{path}.weight")
                if match is None:
                    continue
                parameter = f"{path}.weight"[: match.start()] + entry.target_patterns[0]
                owner, _, name = parameter.rpartition(".")
                owner = today(owner)
                value = _parameter(model, owner, name)
                if value is None or int(match[1]) >= len(value):
                    continue
                if factor.bias is not None or factor.magnitude is not None:
                    raise ValueError(
                        f"adapters[{task!r}]: {path}: expected plain LoRA on an expert, found a bias or DoRA; an "
                        "earlier transformers has the module that it was trained on"
                    )
                rows, width = value.shape[1] // len(entry.source_patterns), value.shape[2]
                if (factor.B.shape[0], factor.A.shape[1]) != (rows, width):
                    raise ValueError(
                        f"adapters[{task!r}]: {path}: expected an update of shape {[rows, width]}, found "
                        f"[{factor.B.shape[0]}, {factor.A.shape[1]}]"
                    )
                matrix = f"{owner}.{name}.{match[1]}"
                if place in found.get(matrix, ()):
                    raise ValueError(f"adapters[{task!r}]: {path} and another module both mean a part of {matrix}")
                found.setdefault(matrix, {})[place] = factor
                sizes[matrix] = len(entry.source_patterns), rows
                used.add(path)
    return {matrix: _above_each_other(parts, *sizes[matrix]) for matrix, parts in found.items()}, used


def _parameter(model: nn.Module, owner: str, name: str) -> Tensor | None:
    """The parameter with the matrices ``[d_out, d_in]`` of several experts, if it is one."""
    module = module_at(model, owner)
    value = None if module is None else module._parameters.get(name)
    return None if value is None or value.dim() != 3 or getattr(module, "is_transposed", False) else value


def _above_each_other(parts: Mapping[int, Factor], count: int, rows: int) -> Factor:
    """The update of a matrix of ``count`` blocks of ``rows`` rows, some of which have one."""
    if count == 1:
        return parts[0]
    ordered = sorted(parts.items())
    # PEFT scales all modules alike, unless patterns say otherwise.
    scaling = ordered[0][1].scaling
    kinds = [factor.B.dtype if factor.scaling == scaling else torch.float32 for _, factor in ordered]
    kind = functools.reduce(torch.promote_types, kinds)
    B = torch.zeros(count * rows, sum(factor.rank for _, factor in ordered), dtype=kind, device="cpu")
    begin = 0
    for place, factor in ordered:
        block = factor.B if factor.scaling == scaling else factor.B.double() * (factor.scaling / scaling)
        B[place * rows : (place + 1) * rows, begin : begin + factor.rank] = block
        begin += factor.rank
    return Factor(torch.cat([factor.A for _, factor in ordered]), B, scaling)

"""LoRA on parameters (``target_parameters``) as it lies in PEFT's files: which one it is of, the model tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nsc_merge.adapters.adapter import Adapter, Factor, Stack, parameters_of, unwrapped
from nsc_merge.adapters.peft_config import Scalings

FACTORS = ("lora_A.weight", "lora_B.weight")


def matrices_of(stack: Stack, rank: int, scaling: float) -> list[Factor]:
    """The updates of the single matrices: in ``A`` the rows of one lie together, in ``B`` the columns of one rank."""
    count = len(stack.A) // rank
    A = stack.A.reshape(count, rank, -1)
    B = stack.B.reshape(-1, rank, count).permute(2, 0, 1).contiguous()
    return [Factor(A[number], B[number], scaling) for number in range(count)]


def updates_of(adapter: Adapter) -> dict[str, Factor]:
    """All low-rank updates of an adapter, where there is no model to say which parameters it means: of several in one
    module, those of a parameter are under PEFT's path of its wrapper.
    """
    found = dict(adapter.factors)
    owners: dict[str, dict[str, Stack]] = {}
    for path, stack in adapter.stacks.items():
        owners.setdefault(unwrapped(path), {})[path] = stack
    for owner, held in owners.items():
        named = {path: parameters_of(owner, stack.targets) for path, stack in held.items()}
        for names in itertools.product(*named.values()):
            # Patterns of ranks name parameters: the right ones are those with which all have as many matrices.
            settings = [one.settings(f"{owner}.{name}") for one, name in zip(held.values(), names, strict=True)]
            if len(set(names)) == len(names) and _are_as_many(held.values(), settings):
                break
        else:
            raise ValueError(
                f"adapters[{adapter.name!r}]: {owner} has tensors for {len(held)} parameters, whose ranks are none "
                "that r and rank_pattern have for target_parameters; expected the configuration of these weights"
            )
        for (path, stack), own in zip(held.items(), settings, strict=True):
            begin = f"{owner}.{named[path][0]}" if len(named[path]) == 1 else path
            found |= {f"{begin}.{number}": one for number, one in enumerate(matrices_of(stack, *own))}
    return found


def _are_as_many(stacks: Iterable[Stack], settings: Iterable[tuple[int, float]]) -> bool:
    counts = {len(stack.A) / rank for stack, (rank, _) in zip(stacks, settings, strict=True)}
    return len(counts) == 1 and counts.pop().is_integer()


def stacks_of(
    name: str, config: Mapping[str, Any], held: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Stack]:
    """Path of a module -> LoRA on one of its parameters.

    Args:
        name: of the task, for messages.
        config: as in ``adapter_config.json``.
        held: path of a module -> its two factors.

    Raises:
        ValueError: if there is one factor alone.
    """
    settings, targets = Scalings(name, config), tuple(config.get("target_parameters") or ())
    made_by = str(config.get("peft_version") or "")
    stacks = {}
    for path, parts in held.items():
        if set(parts) != set(FACTORS):
            raise ValueError(f"adapters[{name!r}]: {path} has {next(iter(parts))} only; expected {', '.join(FACTORS)}")
        A, B = (parts[part] for part in FACTORS)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"adapters[{name!r}]: {path}: expected lora_A [E r, d_in] and lora_B [d_out, r E], found "
                f"{list(A.shape)} and {list(B.shape)}"
            )
        stacks[path] = Stack(A, B, targets, settings.of, made_by)
    return stacks

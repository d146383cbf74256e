"""Writes a LoRA adapter in the PEFT format, as :mod:`nsc_merge.adapters.peft_reader` reads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc_merge.adapters.adapter import Factor, Stack
from nsc_merge.adapters.adapter_files import WEIGHTS_FILE
from nsc_merge.adapters.peft_keys import PREFIX


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factor],
    whole: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, Any],
    embeddings: Collection[str] = (),
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    stacks: Mapping[str, Stack] | None = None,
    *,
    fan_in_fan_out: bool = False,
    modules: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Write ``adapter_config.json``, as PEFT writes it, and ``adapter_model.safetensors``.

    Args:
        folder: that there is.
        factors: module path -> update of rank 1 at least, with a scaling of 1: alpha is r everywhere. All of them, or
            none, have a magnitude (DoRA).
        whole: path of a module kept in full (``modules_to_save``) -> its parameters by name.
        about: what else the configuration says, as fields of ``peft.LoraConfig``: what the adapter is for.
        embeddings: module paths among ``factors`` that are no linears but embeddings.
        kernels: module path -> size of the kernel, of those that are convolutions.
        stacks: PEFT's path of a module -> LoRA on one of its parameters, with a scaling of 1.
        fan_in_fan_out: linears are Conv1D.
        modules: paths of all modules of the base.
        names: module path -> name that its tensors have in the file, of LoRA without biases and magnitudes.

    Raises:
        ValueError: naming a tensor that is not finite, before anything is written.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    has_dora = any(factor.magnitude is not None for factor in factors.values())
    has_bias = any(factor.bias is not None for factor in factors.values())
    called = names if names and not has_dora and not has_bias else {}
    for path, factor in factors.items():
        if path in embeddings:
            tensors[f"{PREFIX}{path}.lora_embedding_A"] = factor.B.float().t().contiguous()
            tensors[f"{PREFIX}{path}.lora_embedding_B"] = factor.A.float().t().contiguous()
            continue
        kernel = (kernels or {}).get(path, ())
        A, B = factor.A.float(), factor.B.float()
        name = called.get(path, path)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.reshape(len(A), -1, *kernel).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.reshape(*B.shape, *[1 for _ in kernel]).contiguous()
        if factor.magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = factor.magnitude.float()
        if has_bias:
            bias = torch.zeros(factor.B.shape[0], device="cpu") if factor.bias is None else factor.bias
            tensors[f"{PREFIX}{path}.lora_B.bias"] = bias.float()
    for path, stack in (stacks or {}).items():
        for part, value in (("lora_A", stack.A), ("lora_B", stack.B)):
            tensors[f"{PREFIX}{path}.{part}.weight"] = value.float().contiguous()
    for path, parameters in whole.items():
        for name, value in parameters.items():
            tensors[f"{PREFIX}{path}.{name}"] = value.contiguous()
    overflowed = next((key for key, value in tensors.items() if not value.isfinite().all()), None)
    if overflowed is not None:
        raise ValueError(
            f"{overflowed.removeprefix(PREFIX)}: not finite in {tensors[overflowed].dtype}; expected coefficients and "
            "adapters whose products it holds"
        )
    # Under both names: who reads the tensors by theirs finds that they are meant, and their ranks.
    ranks = {path: factor.rank for path, factor in factors.items()}
    ranks |= {name: ranks[path] for path, name in called.items()}
    targets = targets_of(list(ranks), modules)
    adapted = {target: stack.settings(target)[0] for stack in (stacks or {}).values() for target in stack.targets}
    ranks |= adapted
    largest = max(ranks.values(), default=1)
    other = rank_patterns(ranks, largest)
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=other,
        alpha_pattern=other,
        modules_to_save=list(whole) or None,
        lora_bias=has_bias,
        use_dora=has_dora,
        inference_mode=True,
        fan_in_fan_out=fan_in_fan_out,
        target_parameters=list(adapted) or None,
        **about,
    )
    # In their order: PEFT makes a set of what it is given, whose order is another in every process.
    config.target_modules = targets
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def targets_of(paths: list[str], modules: Iterable[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for these of a base's modules and no others: a name is the end of a path there, a
    pattern a whole one.
    """
    ends = tuple(f".{path}" for path in paths)
    others = set(modules) - set(paths)
    return "|".join(map(re.escape, paths)) if any(name.endswith(ends) for name in others) else paths


def rank_patterns(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's ``rank_pattern`` for modules, or parameters, of which all have the ranks that are not the default.

    PEFT takes a pattern for the end of a path, from a dot on: ``proj_out`` is ``blocks.0.proj_out`` as well. It stands
    at the beginning only where another would be taken for it.
    """

    def pattern(path: str) -> str:
        others = (rank for name, rank in ranks.items() if name.endswith(f".{path}"))
        return ("^" if any(rank != ranks[path] for rank in others) else "") + re.escape(path)

    return {pattern(path): rank for path, rank in ranks.items() if rank != default}

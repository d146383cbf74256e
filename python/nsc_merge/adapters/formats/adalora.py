"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, Eq. 3) as plain LoRA: its update is ``B diag(E) A``, times a number."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nsc_merge.adapters.peft_keys import PREFIX

_PARTS = ("lora_A", "lora_B", "lora_E")
# Settings of how ranks were given out in training; and those of LoRA that PEFT's layers of AdaLoRA do not heed.
_SCHEDULE = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_UNHEEDED = ("r", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "lora_bias")


def is_adalora(config: Mapping[str, Any]) -> bool:
    """Whether a configuration, as in ``adapter_config.json`` or of PEFT in memory, is AdaLoRA's."""
    return bool(config.get("peft_type") == "ADALORA")


def settings_as_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of LoRA on the same modules, without ranks and scalings; that of another kind as it is."""
    if not is_adalora(config):
        return dict(config)
    left = {key: value for key, value in config.items() if key not in (*_SCHEDULE, *_UNHEEDED)}
    return {**left, "peft_type": "LORA"}


def as_lora(
    name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of LoRA with the updates of AdaLoRA; those of another kind as they are.

    Singular values go into ``lora_A``. PEFT scales by alpha over the rank that training began with, whatever is left to
    a module, plus 1e-5. A module to which no rank is left has no update.

    Args:
        name: of the task, for messages.
        config: as in ``adapter_config.json``.
        weights: PEFT's keys -> tensors, ``lora_A`` [r, d_in], ``lora_E`` [r, 1] and ``lora_B`` [d_out, r].

    Raises:
        ValueError: naming a setting that is no positive number, or a module whose tensors do not belong together.
    """
    if not is_adalora(config):
        return dict(config), dict(weights)
    initial, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    if type(initial) is not int or not 0 < initial <= sys.maxsize:
        raise ValueError(f"adapters[{name!r}]: init_r: expected a positive whole number, found {initial!r:.60}")
    if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
        raise ValueError(f"adapters[{name!r}]: lora_alpha: expected a positive number, found {alpha!r:.60}")
    left = _ranks_left(name, config)
    made, ranks = {}, {}
    for key, value in weights.items():
        path, _, part = key.rpartition(".")
        if part not in _PARTS:
            made[key] = value
        elif part == "lora_E":
            module = path.removeprefix(PREFIX)
            rank = left.get(module, initial)
            A, B = (weights.get(f"{path}.{factor}") for factor in ("lora_A", "lora_B"))
            shapes = [None if one is None else list(one.shape) for one in (A, value, B)]
            if A is None or B is None or shapes != [[rank, *A.shape[1:2]], [rank, 1], [*B.shape[:1], rank]]:
                raise ValueError(
                    f"adapters[{name!r}]: {module}: expected lora_A [{rank}, d_in], lora_E [{rank}, 1] and lora_B "
                    f"[d_out, {rank}] by the configuration (init_r, rank_pattern), found {shapes}"
                )
            if rank:
                ranks[module] = rank
                # In float32, as PEFT computes it, at least.
                scaled = A.float() if A.itemsize < 4 else A
                made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = scaled * value, B
        elif f"{path}.lora_E" not in weights:
            made[key] = value
    scaling = alpha / (initial + 1e-5)
    of_all = {f"^{re.escape(module)}": rank for module, rank in ranks.items()}
    patterns = {"rank_pattern": of_all, "alpha_pattern": {module: rank * scaling for module, rank in of_all.items()}}
    return {**settings_as_lora(config), "r": initial, **patterns}, made


def _ranks_left(name: str, config: Mapping[str, Any]) -> dict[str, int]:
    """The rank of every module for which the configuration says which of its directions training kept."""
    held = config.get("rank_pattern") or {}
    lists = isinstance(held, Mapping) and all(isinstance(kept, list | tuple) for kept in held.values())
    if not lists or not all(type(one) is bool for kept in held.values() for one in kept):
        raise ValueError(f"adapters[{name!r}]: rank_pattern: expected lists of true and false, found {held!r:.60}")
    return {str(key).removesuffix(".lora_E"): sum(kept) for key, kept in held.items()}

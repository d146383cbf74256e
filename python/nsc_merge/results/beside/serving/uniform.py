"""The same update as a server takes it: one rank for all modules, and LoRA of zeros where it wants LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsc_merge.adapters import Factor, load_adapter
from nsc_merge.adapters.peft_writer import write_adapter
from nsc_merge.results.beside.serving import lorax, sglang
from nsc_merge.results.beside.serving.outline import Base, Outline, part_of, place_of, read_outline
from nsc_merge.results.layout import refuse_mixture
from nsc_merge.utils.atomic_folder import replacing_folder

_TWINS = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


def write_uniform(
    folder: Path, out: Path, server: str, base: str | Path | Mapping[str, Any] | None = None, shards: int = 1
) -> None:
    """Write an adapter with the same updates, one rank and a scaling of 1, in float32.

    Ranks are filled up with zeros, to the largest (SGLang, vLLM, llama.cpp) or to what LoRAX's kernels take; linears
    without LoRA get one of zeros where the server wants all of a stack (SGLang) or of all layers (LoRAX). Scalings go
    into B.

    Args:
        folder: of the adapter.
        out: the folder to write, which must be another.
        server: ``"vllm"``, ``"sglang"``, ``"lorax"`` or ``"llama.cpp"``.
        base: of the base model; see :func:`.outline.read_outline`. It is needed for linears none of whose kind has
            LoRA anywhere.
        shards: GPUs that serve one model, of LoRAX.

    Raises:
        ValueError: if ``out`` holds a model, if the adapter is more than LoRA on linears and, but for LoRAX,
            embeddings, if the size of a linear is not known, or as :func:`nsc_merge.load_adapter`.
    """
    if out.resolve() == folder.resolve():
        raise ValueError(f"out: expected another folder than the adapter's own, found {out}")
    refuse_mixture(out, [""], ["lora"], nested=False)
    outline = read_outline(folder, base)
    kinds = {"DoRA": outline.gained, "biases": outline.biased, "modules_to_save": outline.whole,
             "LoRA on embeddings": server == "lorax" and outline.embeddings,
             "LoRA on parameters": outline.parameters}  # fmt: skip
    if more := [kind for kind, there in kinds.items() if there]:
        taken = "linears" if server == "lorax" else "linears and embeddings"
        raise ValueError(f"{folder} has {', '.join(more)}; expected LoRA on {taken} alone: save as a model")
    rank = max(one.rank for one in outline.low.values())
    rank = lorax.padded(rank, shards) if server == "lorax" else rank
    shapes = {path: one.shape for path, one in outline.low.items()}
    shapes |= {path: _shape(path, outline, folder) for path in _missing(outline, server)}
    held = load_adapter(folder, folder.name).factors
    factors = {}
    for path, (rows, columns) in shapes.items():
        A, B = (torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in ((rank, columns), (rows, rank)))
        if path in held:
            one = held[path]
            A[: one.rank] = one.A.float()
            B[:, : one.rank] = (one.B.double() * one.scaling).float()
        factors[path] = Factor(A, B, 1.0)
    about = {key: outline.config.get(key) for key in ("base_model_name_or_path", "revision", "task_type")}
    with replacing_folder(out, lambda path, written: False) as staging:
        conv1d = bool(outline.config.get("fan_in_fan_out"))
        write_adapter(staging, factors, {}, about, outline.embeddings, fan_in_fan_out=conv1d)


def _missing(outline: Outline, server: str) -> list[str]:
    """Paths that get LoRA of zeros."""
    if server == "lorax":
        return [
            f"model.layers.{number}.{kind}"
            for kind, layers in lorax.kinds(outline).items()
            for number in sorted(set(range(outline.layers)) - set(layers))
            if kind in lorax.LINEARS
        ]
    if server == "sglang":
        wanted = (
            f"{path.rpartition('.')[0]}.{end}"
            for path in sglang.incomplete(outline)
            for end in sglang.STACKS[part_of(path)]
        )
        return [path for path in dict.fromkeys(wanted) if path not in outline.modules]
    return []


def _shape(path: str, outline: Outline, folder: Path) -> tuple[int, int]:
    """``(d_out, d_in)`` of a linear without LoRA: of its like in other layers, its twin, or by the base."""
    place = place_of(path)
    for kind in (part_of(path), _TWINS.get(part_of(path))):
        for other, one in outline.modules.items():
            if part_of(other) == kind and place and place_of(other):
                return one.shape
    if part_of(path) not in outline.base.shapes:
        known = "no base" if outline.base == Base() else f"a {outline.base.kind} model"
        raise ValueError(
            f"base: the size of {path} is not known from {folder} and {known}; expected the folder of the base model"
        )
    return outline.base.shapes[part_of(path)]

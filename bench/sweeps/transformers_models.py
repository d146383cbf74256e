"""Every model type of transformers, small and random, with two adapters on all linears: is the merge what PEFT says?

    python -m bench.sweeps.transformers_models --heads text --out bench/results/sweeps/text.jsonl
    python -m bench.sweeps.transformers_models --types llama,bert --out rows.jsonl

One class for each model type: the first of its heads in the order of :data:`HEADS`. A row says

- ``applied``, ``model``, ``lora``: how far the outputs of the merge are from PEFT's with both adapters active, relative
  to their largest difference from the base's, in float64: put into the model, saved as a model and loaded, and saved as
  an adapter and loaded by PEFT;
- ``files``: "same" where a merge of the base left in its files writes the bytes that one in memory does;
- ``passed_over``: how many linears PEFT cannot adapt, as the forward does not call them; they have no adapter;
- ``nsc``, ``match``, ``distill``: "ran" after two steps on one batch, and ``measured`` what NSC measured.

In place of a figure stands the error's first line. What cannot be built or run without adapters has ``error``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from torch import Tensor, nn

import nsc_merge
from bench.merging.cost_rows import environment
from bench.sweeps.beside_peft import (
    EQUAL,
    METHODS,
    adaptable,
    apart,
    attempt,
    config_of,
    line,
    nudged,
    outputs,
    passed_over,
    run,
    together,
    write_adapter,
)
from bench.sweeps.small_models import HEADS, build, classes, limited
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.results.result import MergeResult

# Seconds for one model type.
LONGEST = 180
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
ADAPTERS = ("linears", "dora", "bias", "embeddings", "experts")


def row_of(kind: str, name: str, heads: str, adapter: str, methods: bool) -> dict[str, Any]:
    """What becomes of one model type."""
    found: dict[str, Any] = {"type": kind, "class": name}
    try:
        model, batch = build(kind, name, heads)
    except Exception as error:
        return {**found, "error": line(error)}
    found["parameters"] = sum(value.numel() for value in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        try:
            with limited(LONGEST):
                found.update(_checks(model, batch, Path(folder), adapter, methods))
        except Exception as error:
            found["error"] = line(error)
    return found


def _checks(
    model: nn.Module, batch: dict[str, Tensor], folder: Path, adapter: str, methods: bool
) -> dict[str, Any]:
    config: Any = model.config
    found: dict[str, Any] = {}
    without = passed_over(model, batch)
    if without:
        found["passed_over"] = len(without)
    if config.model_type in MAMBA:  # PEFT refuses it there, as their kernels read the weight past the module
        without.append("out_proj")
    # PEFT applies a second DoRA adapter to what the first made, and a scaling to more than its update.
    ranks, scale = ({"a": 4}, 1.0) if adapter == "dora" else ({"a": 4, "b": 3}, 0.3)
    targets = config_of(adapter, model, without)
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    folders = {
        task: write_adapter(model, folder / task, seed, r=rank, **targets)
        for seed, (task, rank) in enumerate(ranks.items())
    }
    result = attempt(found, "merge", lambda: nsc_merge.merge(model, folders, method="task_arithmetic", scale=scale))
    if result is not None:
        found["modules"] = len(result.paths)
        _compare(found, model, batch, result, folder, folders, scale)
    data = {task: [_alike(batch, seed)] for seed, task in enumerate(folders)}
    for method in METHODS if methods else ():
        attempt(found, method, functools.partial(run, found, method, model, folders, data), keep=True)
    return found


def _compare(
    found: dict[str, Any],
    model: nn.Module,
    batch: dict[str, Tensor],
    result: MergeResult,
    folder: Path,
    folders: dict[str, Path],
    scale: float,
) -> None:
    """Outputs of a merge, put into the model and saved in both formats, beside PEFT's."""
    held, dtype = together(model, folders, scale), torch.float64
    try:
        base = outputs(model, batch, dtype)
    except (RuntimeError, OverflowError, TypeError):  # code that holds to float32
        dtype, found["dtype"] = torch.float32, "float32"
        base = outputs(model, batch, dtype)
    expected = outputs(held, batch, dtype)
    ways: dict[str, Callable[[], nn.Module]] = {
        "applied": lambda: result.apply(copy.deepcopy(result.model)),
        "model": lambda: type(model).from_pretrained(result.save(folder / "model", "model")),  # type: ignore[attr-defined]
        "lora": lambda: peft.PeftModel.from_pretrained(adaptable(model), str(result.save(folder / "lora", "lora"))),
    }
    for name, way in ways.items():
        attempt(found, name, lambda way=way: apart(outputs(way(), batch, dtype), expected, base), keep=True)  # type: ignore[misc]
    if any(isinstance(found[way], float) and found[way] > EQUAL for way in ways):
        # What chooses by a threshold, or the best of many, may choose otherwise.
        found["jumps"] = apart(outputs(nudged(held), batch, dtype), expected, base)
    attempt(found, "files", lambda: _files(folder, folders), keep=True)


def _alike(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A batch of its own for a task: of other numbers, with the same tokens at the same places, or of a text alone the
    same tokens in another order.
    """
    generator = torch.Generator().manual_seed(seed)
    if not any(value.is_floating_point() for value in batch.values()) and "input_ids" in batch:
        return {**batch, "input_ids": batch["input_ids"].roll(seed, 1)}
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in batch.items()
    }


def _files(folder: Path, folders: dict[str, Path]) -> str:
    """The base in memory and the base in its files, each merged and saved."""
    outs = []
    for numbers in (True, False):
        base = load_model(str(folder / "base"), local=True, placement=Placement(device="cpu", numbers=numbers))
        result = nsc_merge.merge(base, folders, method="task_arithmetic")
        outs.append(result.save(folder / f"files-{numbers}", "model"))
    names = [sorted(path.name for path in out.glob("*.safetensors*")) for out in outs]
    if names[0] != names[1]:
        return f"other files: {names}"
    unlike = [name for name in names[0] if (outs[0] / name).read_bytes() != (outs[1] / name).read_bytes()]
    return f"unlike: {unlike}" if unlike else "same"


def main(arguments: list[str] | None = None) -> None:
    """Rows appear in the file as they are made; types that are in it are passed over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", choices=HEADS, default="text")
    parser.add_argument("--types", help="model types with commas between them; by default all that have such a head")
    parser.add_argument("--adapter", choices=ADAPTERS, default="linears", help="what PEFT adapts, and how")
    parser.add_argument("--no-methods", action="store_true", help="leave out the methods that take data")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = classes(options.heads)
    kinds = options.types.split(",") if options.types else list(found)
    if unknown := [kind for kind in kinds if kind not in found]:
        parser.error(f"--types: {unknown[0]!r} has none of the heads of {options.heads}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if before and before[0].get("adapter") != options.adapter:
        parser.error(f"--out: {options.out} has rows of adapter {before[0].get('adapter')!r}; expected another file")
    done = {row.get("type") for row in before}
    with options.out.open("a", encoding="utf-8") as file:
        if not before:
            versions = {"transformers": transformers.__version__, "peft": peft.__version__}
            print(json.dumps(environment(**versions, adapter=options.adapter)), file=file, flush=True)
        for kind in (kind for kind in kinds if kind not in done):
            made = row_of(kind, found[kind], options.heads, options.adapter, not options.no_methods)
            print(json.dumps(made), file=file, flush=True)
            print(json.dumps(made), file=sys.stderr)


if __name__ == "__main__":
    main()

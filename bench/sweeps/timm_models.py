"""The smallest model of every module of timm, random, with two adapters: is the merge what PEFT says?

    python -m bench.sweeps.timm_models --out bench/results/sweeps/timm.jsonl

Rows are those of :mod:`bench.sweeps.transformers_models`, with the module as the type and without saved models, which
timm has in a format of its own. Needs timm, and torchvision for it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn

import nsc_merge
from bench.merging.cost_rows import environment
from bench.sweeps.beside_peft import METHODS, apart, attempt, line, outputs, passed_over, run, together, write_adapter
from bench.sweeps.small_models import limited

SCALE = 0.3
# Seconds for one model.
LONGEST = 120


def smallest(module: str) -> str:
    """The model of a module with the fewest parameters."""
    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = sum(value.numel() for value in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: sizes[name])


def row(module: str) -> dict[str, Any]:
    """What becomes of one module's smallest model."""
    found: dict[str, Any] = {"type": module}
    try:
        with limited(LONGEST), tempfile.TemporaryDirectory() as folder:
            found["class"] = smallest(module)
            torch.manual_seed(0)
            model = timm.create_model(found["class"]).eval()
            found["parameters"] = sum(value.numel() for value in model.parameters())
            pictures = torch.randn(2, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(1))
            _check(found, model, {"x": pictures}, Path(folder))
    except Exception as error:  # of timm, PEFT or the merge, and each says so by itself
        found["error"] = line(error)
    return found


def _check(found: dict[str, Any], model: nn.Module, batch: dict[str, Tensor], folder: Path) -> None:
    without = passed_over(model, batch)
    if without:
        found["passed_over"] = len(without)
    config: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": without or None}
    parts = dict(model.named_modules())
    if sum(isinstance(one, nn.Linear) and path not in without for path, one in parts.items()) < 3:
        # Its linears are its head.
        plain = [path for path, one in parts.items() if type(one) is nn.Conv2d and one.groups == 1]
        config, found["adapted"] = {"target_modules": plain}, "convolutions"
    folders = {task: write_adapter(model, folder / task, seed, r=4, **config) for seed, task in enumerate("ab")}
    base = outputs(model, batch, torch.float64)
    expected = outputs(together(model, folders, SCALE), batch, torch.float64)
    result = nsc_merge.merge(model, folders, method="task_arithmetic", scale=SCALE)
    found["modules"] = len(result.paths)
    found["applied"] = apart(outputs(result.apply(copy.deepcopy(model)), batch, torch.float64), expected, base)
    data = {task: [batch] for task in folders}
    for method in METHODS:
        attempt(found, method, functools.partial(run, found, method, model, folders, data), keep=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", help="with commas between them; by default all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        print(json.dumps(environment(timm=timm.__version__, peft=peft.__version__)), file=file, flush=True)
        for module in options.modules.split(",") if options.modules else timm.list_modules():
            made = row(module)
            print(json.dumps(made), file=file, flush=True)
            print(json.dumps(made), file=sys.stderr)


if __name__ == "__main__":
    main()

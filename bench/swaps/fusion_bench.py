"""FusionBench's layer-wise AdaMerging and merge methods, by its own code and by ours, on the same adapters.

    python -m bench.swaps.fusion_bench --out bench/results/cpu/swaps            tables, and fusion_bench.jsonl
    python -m bench.swaps.fusion_bench --layers 2 --tasks 3 --repeats 2     quicker

A CLIP vision model of ViT-B/32's sizes with random weights, float32, and rank-16 adapters with random factors on q and
v of every layer. Theirs gets models with the adapters in the weights, in memory; ours the adapters.

"step" is one step of layer-wise AdaMerging: for every task a batch of pictures forward, the entropy of a random head,
and backward; a step of Adam on ``merge_weight``; ``merge_weights()``. "merge" is an algorithm's ``run`` over a pool,
models at hand for theirs, and adapters in folders for ours. Both take turns in one process, and what is printed is the
median of the wall times; "ratio" is the median of the ratios of each turn. "peak" is how much the resident set grows at
most, in a process of its own for each, over what it was with the base and the adapters read. "differs" is relative
(Frobenius): of the model's output, of the gradient of ``merge_weight`` at the first step, and of the merged update.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import nsc_merge
from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident

RANK, TARGETS, CLASSES = 16, ("q_proj", "v_proj"), 100
SIDES = ("theirs", "ours")
STEP_IMPORTS = (
    "fusion_bench.models.wrappers.layer_wise_fusion",
    "nsc_merge.integrations.fusion_bench_layerwise",
)
METHODS = ("task_arithmetic", "simple_average", "ties", "dare_ties")


def base_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers)).eval()


def write_adapters(folder: Path, base: nn.Module, tasks: int) -> dict[str, str]:
    """PEFT folders with random factors."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "bias": "none"}
    found = {}
    for k in range(tasks):
        generator = torch.Generator().manual_seed(k)
        tensors = {}
        for path, module in base.named_modules():
            if path.rpartition(".")[2] in TARGETS:
                d_out, d_in = module.weight.shape
                key = f"base_model.model.{path}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
                tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(d_out, RANK, generator=generator)
        place = folder / f"task{k}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))
        found[place.name] = str(place)
    return found


def whole(base: nn.Module, adapter: Any) -> nn.Module:
    model = deepcopy(base)
    with torch.no_grad():
        for path, factor in adapter.factors.items():
            model.get_parameter(f"{path}.weight").add_(factor.delta().float())
    return model


class Stepper:
    """Layer-wise AdaMerging, one step after another."""

    def __init__(self, side: str, base: nn.Module, adapters: dict[str, Any], batch: int):
        from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel as Theirs

        from nsc_merge.integrations.fusion_bench_layerwise import LayerWiseFactors

        count = sum(value.requires_grad for value in base.parameters())
        weights = torch.full((len(adapters), count), 0.3)
        sources = list(adapters.values()) if side == "ours" else [whole(base, one) for one in adapters.values()]
        kind: Any = LayerWiseFactors if side == "ours" else Theirs
        self.model = kind(weights, deepcopy(base), sources, clamp_weights=False, strict=False)
        self.optimizer = torch.optim.Adam([self.model.merge_weight], lr=1e-3)
        generator = torch.Generator().manual_seed(5)
        self.pictures = torch.randn(len(adapters), batch, 3, 224, 224, generator=generator)
        self.heads = torch.randn(len(adapters), CLASSES, 768, generator=generator) / 768**0.5
        self.outputs: list[Tensor] = []
        self.gradient: Tensor | None = None
        self.model.merge_weights()

    def step(self) -> None:
        self.outputs = []
        for pictures, head in zip(self.pictures, self.heads, strict=True):
            output = self.model(pictures)[1]
            logits = output @ head.t()
            loss = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
            loss.backward(retain_graph=True)
            self.outputs.append(output.detach())
        self.gradient = self.model.merge_weight.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.merge_weights()


def merges(base: nn.Module, tasks: int) -> dict[str, tuple[Callable[[], Any], str, dict[str, Any]]]:
    """FusionBench's algorithm, and our method with the options that mean the same."""
    from fusion_bench.method.dare import DareTiesMerging
    from fusion_bench.method.simple_average import SimpleAverageAlgorithm
    from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
    from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

    every = sum(value.numel() for value in base.state_dict().values())
    adapted = sum(
        value.numel() for name, value in base.named_parameters() if name.endswith(tuple(f"{t}.weight" for t in TARGETS))
    )
    # Their share is one of all parameters; the half keeps rounding from taking one off.
    density = (int(every * 0.05) + 0.5) / adapted
    trimmed = {"density": min(1.0, density), "scale": 0.3}
    return {
        "task_arithmetic": (lambda: TaskArithmeticAlgorithm(scaling_factor=0.3), "task_arithmetic", {"scale": 0.3}),
        "simple_average": (SimpleAverageAlgorithm, "task_arithmetic", {"scale": 1 / tasks}),
        "ties": (lambda: TiesMergingAlgorithm(0.3, 5, [], "sum"), "ties", {"preset": "adamerging", **trimmed}),
        "dare_ties": (
            lambda: DareTiesMerging(0.0, False, True, 0.3, 5, [], "sum"),
            "dare_ties",
            {"preset": "fusion_bench", "drop": 0.0, **trimmed},
        ),
    }


def merger(side: str, name: str, base: nn.Module, folders: dict[str, str]) -> Callable[[], Any]:
    """One run; pools are made anew each time, as runs change the models."""
    from fusion_bench.modelpool import BaseModelPool

    from nsc_merge.integrations.fusion_bench import LoRAPool, NSCMerging

    theirs, method, options = merges(base, len(folders))[name]
    if side == "ours":
        pool: Any = LoRAPool({"_pretrained_": deepcopy(base), **folders})
        return lambda: NSCMerging(method, options).run(pool)
    models = {task: whole(base, nsc_merge.load_adapter(folder, task)) for task, folder in folders.items()}
    pool = BaseModelPool({"_pretrained_": deepcopy(base), **models})
    return lambda: theirs().run(pool)


def differs(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def updates(model: nn.Module, base: nn.Module) -> Tensor:
    parts = [model.get_parameter(name) - value for name, value in base.named_parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def in_turns(runs: dict[str, Callable[[], Callable[[], Any]]], repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of each side, after a first turn that does not count, and what each gave in that."""
    taken: dict[str, list[float]] = {side: [] for side in runs}
    first = {}
    for turn in range(repeats + 1):
        for side, prepare in runs.items():
            run = prepare()
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            if turn:
                taken[side].append(seconds)
            else:
                first[side] = result
    ratios = [theirs / ours for theirs, ours in zip(taken["theirs"], taken["ours"], strict=True)]
    row = {f"{side}_seconds": statistics.median(times) for side, times in taken.items()}
    return {**row, "ratio": statistics.median(ratios), "turns": repeats}, first


def measure_step(base: nn.Module, folders: dict[str, str], batch: int, repeats: int) -> dict[str, Any]:
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    steppers = {side: Stepper(side, base, adapters, batch) for side in SIDES}
    kept: dict[str, Any] = {}

    def one(side: str) -> Callable[[], Any]:
        def run() -> None:
            steppers[side].step()
            # Of the first step alone: later ones are at coefficients that Adam moved by signs of rounding.
            kept.setdefault(side, (torch.cat(steppers[side].outputs), steppers[side].gradient))

        return run

    row, _ = in_turns({side: partial(one, side) for side in SIDES}, repeats)
    (ours, ours_gradient), (theirs, theirs_gradient) = kept["ours"], kept["theirs"]
    return {
        "op": "step", **row, "output_differs": differs(ours, theirs),
        "gradient_differs": differs(ours_gradient, theirs_gradient),
    }  # fmt: skip


def measure_merge(name: str, base: nn.Module, folders: dict[str, str], repeats: int) -> dict[str, Any]:
    row, first = in_turns(
        {side: partial(merger, side, name, base, folders) for side in SIDES},
        repeats,
    )
    found = differs(updates(first["ours"], base), updates(first["theirs"], base))
    return {"op": "merge", "method": name, **row, "differs": found}


def measure_peak(op: str, side: str, base: nn.Module, folders: dict[str, str], batch: int) -> dict[str, Any]:
    """Growth of this process by one step or one merge, with all that it needs."""
    adapters = {task: nsc_merge.load_adapter(folder, task) for task, folder in folders.items()}
    # What importing takes is no part of it.
    for name in STEP_IMPORTS if op == "step" else ("nsc_merge.integrations.fusion_bench",):
        importlib.import_module(name)
    before = resident()
    reset_peak()
    if op == "step":
        Stepper(side, base, adapters, batch).step()
    else:
        merger(side, op, base, folders)()
    return {"op": "peak", "of": op, "side": side, "bytes": peak() - before}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for fusion_bench.jsonl")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=8, help="of the step")
    parser.add_argument("--merge-tasks", type=int, default=3, help="of the merges")
    parser.add_argument("--batch", type=int, default=4, help="pictures of each task")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    base = base_of(given.layers)
    with tempfile.TemporaryDirectory() as folder:
        folders = write_adapters(Path(folder), base, max(given.tasks, given.merge_tasks))
        few, many = (dict(list(folders.items())[:count]) for count in (given.merge_tasks, given.tasks))
        if given.child:
            op, side = given.child[0], given.child[1]
            # FusionBench prints as it goes.
            with contextlib.redirect_stdout(sys.stderr):
                if side != "both":
                    row = measure_peak(op, side, base, many if op == "step" else few, given.batch)
                elif op == "step":
                    row = measure_step(base, many, given.batch, given.repeats)
                else:
                    row = measure_merge(op, base, few, given.repeats)
            print(json.dumps({**row, "load": os.getloadavg()[0]}))
            return 0
    shape = {name: getattr(given, name) for name in ("layers", "tasks", "merge_tasks", "batch", "repeats", "threads")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    rows = [environment(rank=RANK, targets=TARGETS, **shape)]
    print(f"{'':16} {'theirs':>9} {'ours':>9} {'ratio':>7} {'peak':>9} {'ours':>9}   differs")
    for op in ("step", *METHODS):
        found = list(children(op, options))
        rows += found
        row, theirs, ours = found
        differences = " ".join(f"{value:.1e}" for name, value in row.items() if name.endswith("differs"))
        print(
            f"{op:16} {row['theirs_seconds']:8.2f}s {row['ours_seconds']:8.2f}s {row['ratio']:6.1f}x "
            f"{theirs['bytes'] / 1e9:6.2f} GB {ours['bytes'] / 1e9:6.2f} GB   {differences}",
            flush=True,
        )
    if given.out:
        write_rows(given.out / "fusion_bench.jsonl", rows)
    return 0


def children(op: str, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    for side in ("both", *SIDES):
        command = [sys.executable, "-m", "bench.swaps.fusion_bench", *options, "--child", op, side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
        yield json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    raise SystemExit(main())

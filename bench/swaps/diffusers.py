"""A denoising step of diffusers' models with several active LoRA adapters: theirs, accelerated, or merged into one.

    python -m bench.swaps.diffusers --out bench/results/cpu/swaps

A UNet as Stable Diffusion's with 160 and 320 channels on 32 x 32 latents, and a DiT as Flux's with two double and two
single blocks 768 wide on 256 + 64 tokens; random weights, float32; K rank-16 adapters on every projection of attention
and MLP, active by ``set_adapters`` with weights. "theirs" is diffusers as it is, "accelerated" with
``nsc_merge.integrations.diffusers.accelerate``, "merged" with the one adapter that ``merge`` makes of the K, and
"base" with adapters disabled. Seconds are medians of wall time of rounds in which all take turns in one process;
"ratio" is theirs by ours, the median over rounds. "differs" is the relative difference of the prediction (Frobenius).
"peak" is what one step adds to the resident set, in a process that runs nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import peft
import torch
from torch import Tensor

from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident
from nsc_merge.integrations.diffusers import accelerate, merge

RANK = 16
WAYS = ("theirs", "accelerated", "merged", "base")


def unet() -> tuple[Any, list[str]]:
    model = diffusers.UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(160, 320),
        attention_head_dim=8,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=model, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    return pipe, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def dit() -> tuple[Any, list[str]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=768,
        pooled_projection_dim=768,
        axes_dims_rope=[8, 28, 28],
    )
    pipe = diffusers.FluxPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=model,
    )
    return pipe, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


MODELS: dict[str, Callable[[], tuple[Any, list[str]]]] = {"unet": unet, "dit": dit}


def prepared(name: str, tasks: int) -> tuple[Any, Callable[[], Tensor], list[str]]:
    """A pipeline with adapters, and one step of its model."""
    torch.manual_seed(0)
    pipe, targets = MODELS[name]()
    model = next(part for part in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)) if part is not None)
    names = [f"task{k}" for k in range(tasks)]
    for task in names:
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, adapter_name=task)
    if name == "unet":
        inputs = {
            "sample": torch.randn(1, 4, 32, 32),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 77, 768),
        }
    else:
        inputs = {
            "hidden_states": torch.randn(1, 256, 64),
            "encoder_hidden_states": torch.randn(1, 64, 768),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(256, 3),
            "txt_ids": torch.zeros(64, 3),
        }
    model.eval().requires_grad_(False)

    def step() -> Tensor:
        with torch.no_grad():
            sample: Tensor = model(**inputs).sample
        return sample

    return pipe, step, names


@contextmanager
def running(pipe: Any, names: Sequence[str], way: str) -> Iterator[None]:
    """A pipeline as one of :data:`WAYS` runs it."""
    pipe.set_adapters(["merged"] if way == "merged" else list(names), weights_of(names, way))
    if way == "accelerated":
        with accelerate(pipe):
            yield
        return
    if way == "base":
        pipe.disable_lora()
    yield
    pipe.enable_lora()


def weights_of(names: Sequence[str], way: str = "") -> list[float]:
    return [1.0] if way == "merged" else [0.2 + 0.1 * k for k in range(len(names))]


def compare(name: str, tasks: int, rounds: int) -> dict[str, Any]:
    pipe, step, names = prepared(name, tasks)
    begin = time.process_time()
    merge(pipe, names, weights_of(names))
    merging = time.process_time() - begin
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for way in WAYS:
            with running(pipe, names, way):
                begin = time.perf_counter()
                found[way] = step()
                # The first is a warm-up.
                if number:
                    taken[way].append(time.perf_counter() - begin)
    wanted = found["theirs"].double()
    return {
        "op": "denoising_step",
        "model": name,
        "tasks": tasks,
        "rounds": rounds,
        "seconds": {way: statistics.median(values) for way, values in taken.items()},
        "ratio": {
            way: statistics.median(a / b for a, b in zip(taken["theirs"], taken[way], strict=True))
            for way in ("accelerated", "merged")
        },
        "relative_difference": {
            way: float((found[way].double() - wanted).norm() / wanted.norm()) for way in WAYS if way != "theirs"
        },
        "merging_cpu_seconds": merging,
    }


def measure(name: str, tasks: int, way: str) -> dict[str, Any]:
    """The memory of one step, in this process."""
    pipe, step, names = prepared(name, tasks)
    if way == "merged":
        merge(pipe, names, weights_of(names))
    with running(pipe, names, way):
        before = resident()
        reset_peak()
        step()
        return {"added_bytes": peak() - before}


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.swaps.diffusers", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for diffusers.jsonl")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8], help="how many adapters are active")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    shared = ["--threads", str(arguments.threads)]
    if arguments.measure:
        name, tasks, way = arguments.measure
        print(json.dumps(measure(name, int(tasks), way)))
        return 0
    rows = [
        environment(threads=arguments.threads, rank=RANK, diffusers=diffusers.__version__, peft=peft.__version__)
    ]
    print(f"{'':8} {'K':>3} " + " ".join(f"{way:>12}" for way in WAYS) + f" {'ratios':>16} {'differs':>18}  peaks")
    for name in arguments.models:
        for tasks in arguments.tasks:
            row = compare(name, tasks, arguments.rounds)
            row["added_bytes"] = {
                way: child("--measure", name, str(tasks), way, *shared)["added_bytes"] for way in WAYS
            }
            rows.append(row)
            ratios = " ".join(f"{value:7.2f}x" for value in row["ratio"].values())
            apart = " ".join(f"{row['relative_difference'][way]:8.1e}" for way in row["ratio"])
            seconds = " ".join(f"{row['seconds'][way]:11.3f}s" for way in WAYS)
            peaks = " ".join(f"{row['added_bytes'][way] / 1e6:.0f}" for way in WAYS)
            print(f"{name:8} {tasks:3} {seconds} {ratios} {apart}  {peaks} MB", flush=True)
    if arguments.out:
        write_rows(arguments.out / "diffusers.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

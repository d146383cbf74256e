"""LoRA models merged by mergekit, and the same from factors: agreement, seconds, memory and disk.

    python -m bench.swaps.mergekit --out bench/results/cpu/swaps    a table, and mergekit.jsonl

A Llama (random weights) with six rank-16 adapters on q, v and up, a configuration of mergekit for each method. Routes:

    mergekit   as it is: PEFT makes a dense checkpoint of each adapter, which are then merged
    cached     the same again, with the checkpoints there already
    factors    python -m nsc_merge.integrations.mergekit: mergekit with the adapters read from their factors
    recipe     nsc-merge import, then nsc-merge run, which writes the model
    adapter    the same, which writes an adapter (methods whose update is one)

Seconds are medians over rounds in which the routes take turns, in one process for each dtype, without imports. "peak"
is the highest resident set over that after the imports, of one run in a process of its own (float32 only); "disk" what
is written, checkpoints included. "differs" is how far the merged model is from that of "mergekit" (Frobenius, relative
to how far that is from the base), "error" how far from the same merge computed in float64 from the factors. With
bfloat16 the base's files are, and mergekit computes and writes float32 (dtype: float32), so that errors are those of
the checkpoints. Methods here draw nothing at random.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.bench.resident_memory import peak, reset_peak, resident

TASKS, RANK = 6, 16
DTYPES = ("float32", "bfloat16")
# Parameters of a model, and those of all.
METHODS: dict[str, dict[str, Any]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
ROUTES = ("mergekit", "cached", "factors", "recipe", "adapter")
FLAGS = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]


def write_place(folder: Path, dtype: str, width: int, layers: int) -> None:
    """The base, the adapters, and a configuration and a recipe for each method."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(getattr(torch, dtype))
    base.save_pretrained(folder / "base")
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj", "up_proj"])
    tuned = get_peft_model(base, settings)
    for seed in range(TASKS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in tuned.named_parameters():
                if "lora_" in name:
                    size = width**-0.5 if "lora_A" in name else 0.002
                    value.copy_(size * torch.randn(value.shape, generator=generator))
        tuned.save_pretrained(str(folder / f"task{seed}"))
    for method, own in METHODS.items():
        models = [
            {"model": f"{folder / 'base'}+{folder / f'task{k}'}", "parameters": {"weight": 0.2 + 0.1 * k, **own}}
            for k in range(TASKS)
        ]
        written = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(written))


def run_route(route: str, folder: Path, method: str, out: Path) -> None:
    """One merge in this process."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from nsc_merge.commands.main import main as nsc_merge
    from nsc_merge.integrations.mergekit.__main__ import main as wrapper

    out.mkdir()
    config = folder / f"{method}.yaml"
    if route in ("mergekit", "cached"):
        LoaderCache.loaders.clear()
        cache = ["--lora-merge-cache", str(folder / "checkpoints")]
        mergekit_yaml.main([str(config), str(out / "model"), *cache, *FLAGS], standalone_mode=False)
        return
    if route == "factors":
        LoaderCache.loaders.clear()
        assert wrapper([str(config), str(out / "model"), *FLAGS]) == 0
        return
    # Not in the folder that the merge is written to, where the run puts its own record under that name.
    recipe = out.with_name(f"{out.name}.yaml")
    with redirect_stdout(StringIO()):
        assert nsc_merge(["import", str(config), "--out", str(recipe)]) == 0
        form = "model" if route == "recipe" else "lora"
        overrides = [f"output.dir={out}", f"output.formats=[{form}]", "output.plots=false", "device=cpu"]
        assert nsc_merge(["run", str(recipe), *overrides]) == 0


def measured(route: str, folder: Path, method: str, out: Path) -> dict[str, Any]:
    """The same, with what it took."""
    if route == "mergekit":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    there = size(folder / "checkpoints")
    wall, processor = time.perf_counter(), time.process_time()
    run_route(route, folder, method, out)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "disk_bytes": size(out) + size(folder / "checkpoints") - there,
    }


def memory(route: str, folder: Path, method: str) -> int:
    """Bytes that one merge takes over what the imports did."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import nsc_merge.integrations.mergekit.__main__
    import nsc_merge.recipes.first.mergekit.text
    import nsc_merge.recipes.run  # noqa: F401

    before = resident()
    reset_peak()
    out = folder / f"memory-{method}-{route}"
    measured(route, folder, method, out)
    shutil.rmtree(out)
    return peak() - before


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def child(*arguments: str) -> Any:
    """What this program prints last in a process of its own."""
    command = [sys.executable, "-m", "bench.swaps.mergekit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exact(folder: Path, method: str) -> dict[str, Tensor]:
    """Tensor -> its update in float64, of those that an adapter touches."""
    from nsc_merge import load_adapter, merge_factors

    adapters = {f"task{k}": load_adapter(folder / f"task{k}", f"task{k}").factors for k in range(TASKS)}
    weights = {task: 0.2 + 0.1 * k for k, task in enumerate(adapters)}
    if method == "task_arithmetic":
        paths = dict.fromkeys(path for factors in adapters.values() for path in factors)
        return {
            f"{path}.weight": torch.stack(
                [weights[task] * factors[path].delta() for task, factors in adapters.items()]
            ).sum(0)
            for path in paths
        }
    merged = merge_factors(adapters, "ties", preset="mergekit", weights=weights, density=METHODS[method]["density"])
    return {f"{path}.weight": factor.delta() for path, factor in merged}


def model_in(out: Path) -> dict[str, Tensor]:
    files = sorted((out / "model").glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def change(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert model.keys() == base.keys()
    return {key: value.double() - base[key].double() for key, value in model.items()}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    away = sum(float((value - expected[key]).square().sum()) if key in expected else float(value.square().sum())
               for key, value in found.items())  # fmt: skip
    return (away / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def routes_of(method: str) -> list[str]:
    return [route for route in ROUTES if route != "adapter" or method == "task_arithmetic"]


def timed(place: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of all methods and routes on one base, in this process."""
    base, rows = load_file(place / "base" / "model.safetensors"), []
    for route in ("mergekit", "adapter"):
        # What is imported on first use, and caches of files.
        run_route(route, place, "task_arithmetic", place / f"first-{route}")
    for method in METHODS:
        found: dict[str, list[dict[str, Any]]] = {route: [] for route in routes_of(method)}
        changes: dict[str, dict[str, Tensor]] = {}
        for number in range(rounds):
            for route, runs in found.items():
                out = place / f"{method}-{route}-{number}"
                runs.append(measured(route, place, method, out))
                if number == 0 and route != "adapter":
                    changes[route] = change(model_in(out), base)
                shutil.rmtree(out)
        update = exact(place, method)
        for route, runs in found.items():
            numbers = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            row = {"op": "route", "dtype": dtype, "method": method, "route": route, **numbers}
            if route in changes:
                row["differs"] = apart(changes[route], changes["mergekit"])
                row["error"] = apart(changes[route], update)
            rows.append({**row, "load": os.getloadavg()[0]})
    return rows


def told(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    same = (one for one in rows if (one["dtype"], one["method"]) == (row["dtype"], row["method"]))
    theirs = next(one for one in same if one["route"] == "mergekit")
    agreement = f"{row['differs']:9.1e} {row['error']:9.1e}" if "error" in row else ""
    peak = f"{row['peak_bytes'] / 1e6:8.0f} MB" if "peak_bytes" in row else " " * 11
    return (
        f"{row['dtype']:9} {row['method']:16} {row['route']:9} {row['seconds']:7.2f}s "
        f"{theirs['seconds'] / row['seconds']:6.1f}x {peak} {row['disk_bytes'] / 1e6:8.0f} MB {agreement}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for mergekit.jsonl")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        route, folder, method = arguments.memory
        print(json.dumps(memory(route, Path(folder), method)))
        return 0
    if arguments.time:
        folder, dtype = arguments.time
        print(json.dumps(timed(Path(folder), dtype, arguments.rounds)))
        return 0
    sizes = {"width": arguments.width, "layers": arguments.layers, "rounds": arguments.rounds}
    rows = [environment(threads=arguments.threads, tasks=TASKS, rank=RANK, mergekit=version("mergekit"), **sizes)]
    shared = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    print(f"{'':36} {'seconds':>8} {'faster':>7} {'peak':>11} {'disk':>11} {'differs':>9} {'error':>9}")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as place:
            write_place(Path(place), dtype, arguments.width, arguments.layers)
            found = child("--time", place, dtype, *shared)
            for row in found:
                if dtype == "float32":
                    row["peak_bytes"] = child("--memory", row["route"], place, row["method"], *shared)
                print(told(row, found), flush=True)
        rows += found
    if arguments.out:
        write_rows(arguments.out / "mergekit.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

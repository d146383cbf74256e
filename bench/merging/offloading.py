"""Memory and time of NSC's step on a base model that is not in memory: by placement, with and without recomputation.

    python -m bench.merging.offloading --dtype float32

A LLaMA of 373 M random weights (24 layers, d=1024), two rank-16 adapters on q and v, a batch of 64 tokens per task, a
process per row. Memory is what the steps have beyond the process before it loaded the model: RssAnon, sampled, to which
the pages of a checkpoint that is read through a map do not belong; and of weights that are brought to where they are
computed with, the most bytes that were there at once. Seconds are medians of steps, by processor time too.

Placements:
    plain       all weights in memory
    host        accelerate's offloading to the host's memory, with every weight copied for a call, as to a GPU
    disk        device_map {"": "disk"}: weights stay in the checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from nsc_merge import Adapter, Factor
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options
from nsc_merge.models.bases.loading import load_model
from nsc_merge.models.bases.placement import Placement
from nsc_merge.models.families import family_of, scored_paths

TASKS = ("one", "two")
ROWS = [(place, again) for place in ("plain", "host", "disk") for again in (False, True)]
WIDTH, LAYERS = 1024, 24


class Copies(dict[str, Tensor]):
    """Weights of which every call gets copies: ``alive`` bytes of them are there, and there were ``most``."""

    alive = most = 0

    def __getitem__(self, name: str) -> Tensor:
        copy = super().__getitem__(name).clone()
        self.alive += copy.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(copy.untyped_storage(), self._gone, copy.nbytes)
        return copy

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes


class Anonymous:
    """The highest RssAnon while it runs, looked at every 5 ms."""

    def __enter__(self) -> Anonymous:
        self.most, self._going = 0, True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._thread.join()

    def _look(self) -> None:
        while self._going:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write_base(folder: Path, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16, vocab_size=32000
    )
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config)
    base.to(dtype).save_pretrained(folder)


def adapters() -> dict[str, Adapter]:
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qv"]
    return {
        task: Adapter(
            task, {path: Factor(torch.randn(16, WIDTH) / 32, 0.1 * torch.randn(WIDTH, 16), 1.0) for path in paths}
        )
        for task in TASKS
    }


def row(folder: str, place: str, again: bool, steps: int) -> dict[str, Any]:
    """Measured in this process."""
    from accelerate import cpu_offload

    torch.manual_seed(1)
    held: Copies | None = None
    before = anonymous()
    model: nn.Module = load_model(
        folder, local=True, placement=Placement(device="cpu", device_map={"": "disk"} if place == "disk" else None)
    )
    if place == "host":
        held = Copies({name: value.detach() for name, value in model.state_dict().items()})
        model = cpu_offload(model, torch.device("cpu"), state_dict=held)
    family, given = family_of(model), adapters()
    scored = scored_paths(family, model, list(given["one"].factors), None, "last_quarter")
    options = resolve_options(family, TASKS, {"checkpointing": again, "batch_tasks": False, "fold": False})
    batches = [{"input_ids": torch.randint(0, 32000, (1, 64))} for _ in TASKS]
    taken = []
    with ExitStack() as stack:
        objective = stack.enter_context(objective_of(model, given, family, scored, options))
        memory = stack.enter_context(Anonymous())
        for _ in range(steps + 1):
            wall, processor = time.perf_counter(), time.process_time()
            omega = objective.accumulate(batches)
            taken.append((time.perf_counter() - wall, time.process_time() - processor))
    seconds = [statistics.median(clock) for clock in zip(*taken[1:], strict=True)]
    return {
        "place": place,
        "recomputed": again,
        "anonymous": memory.most - before,
        "brought": held.most if held is not None else None,
        "seconds": seconds,
        "objective": omega.mean().item(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.row:
        folder, place, again = arguments.row
        print(json.dumps(row(folder, place, again == "True", arguments.steps)))
        return 0
    print(f"{'':6} {'recomputed':>10} {'RssAnon':>9} {'brought':>9} {'step':>8} {'(cpu)':>8}  objective")
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), getattr(torch, arguments.dtype))
        command = [sys.executable, "-m", "bench.merging.offloading", "--steps", str(arguments.steps), "--row", folder]
        for place, again in ROWS:
            done = subprocess.run([*command, place, str(again)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            brought = "" if found["brought"] is None else f"{found['brought'] / 2**20:6.0f} MB"
            wall, processor = found["seconds"]
            print(
                f"{place:6} {'yes' if again else 'no':>10} {found['anonymous'] / 2**20:6.0f} MB {brought:>9} "
                f"{wall:7.2f}s {processor:7.2f}s  {found['objective']:.6f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What loading the operator through Hugging Face ``kernels`` costs: time to import, and per call.

    python -m bench.swaps.hf_kernels --out bench/results/cpu/swaps       a table, and hf_kernels.jsonl; two minutes

"import" is the median time in fresh processes, after torch, to have the operator: the installed package, a build as
``get_local_kernel`` loads it once ``kernels`` is imported, and ``kernels`` itself. A call is timed on the CPU, one
thread, where a build has the reference alone: against the installed package's reference, which computes the same, and
against its C++ library, which a build lacks. "layer" is MergedLoRALinear, and the same module after ``kernelize``;
"plain" is a layer of the same attributes in plain PyTorch, before and after. Rounds are interleaved; "ratio" is the
median over rounds of the other by the build.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import nsc_kernels as nk
from bench.merging.cost_rows import environment, write_rows
from nsc_kernels.integrations.hf_kernels import build_layout, layer_mapping, write

RANKS, TOKENS = (16,) * 4, 64
WIDTHS = (64, 1024)
IMPORTS = {
    "installed": "import nsc_kernels",
    "kernels": "import kernels",
    "build": "kernels.get_local_kernel(Path(sys.argv[1]))",
}
TIMED = "import sys, time\nfrom pathlib import Path\nimport torch\n{before}\nt = time.perf_counter()\n{code}\n"


def seconds_to_import(what: str, folder: Path, repeats: int) -> list[float]:
    before = "import kernels" if what == "build" else ""
    code = TIMED.format(before=before, code=IMPORTS[what]) + "print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code, str(folder)]
    run = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(repeats + 1)]
    return [float(done.stdout) for done in run[1:]]  # the first one compiles and fills the cache of files


class Plain(nn.Module):
    """A layer as somebody else would write one."""

    def __init__(self, linear: nn.Linear, bank: nk.AdapterBank, lam: Tensor) -> None:
        super().__init__()
        self.linear, self.bank, self.lam = linear, bank, lam
        self.owner = torch.repeat_interleave(torch.tensor(bank.ranks))

    def forward(self, z: Tensor) -> Tensor:
        u = z @ self.bank.A.t()
        return self.linear(z) + (self.lam[self.owner] * u) @ self.bank.Bt


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call: of every round a batch of calls each, one after another."""
    for call in calls.values():
        call()
    start = time.perf_counter()
    next(iter(calls.values()))()
    batch = max(1, int(0.02 / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(batch):
                call()
            taken[name].append((time.perf_counter() - start) / batch)
    return taken


def calls_of(kernel: Any, folder: Path, width: int, grad: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """Contenders by kind: what each does once."""
    import kernels

    torch.manual_seed(0)
    A = [torch.randn(r, width) / width**0.5 for r in RANKS]
    bank = nk.AdapterBank.from_factors(A, [torch.randn(width, r) / r**0.5 for r in RANKS])
    own = kernel.AdapterBank(*bank.packed)
    z, base = (torch.randn(TOKENS, width, requires_grad=grad) for _ in range(2))
    lam = torch.full((len(RANKS),), 0.3, requires_grad=grad)
    dy = torch.randn(TOKENS, width)

    def once(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), inputs, dy) if grad else forward()

    def under(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def chosen() -> Any:
            with nk.use_backend(backend):
                return call()

        return chosen

    def layers(made: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
        plain, mapped = made(), made()
        kernels.replace_kernel_forward_from_hub(type(mapped), "MergedLoRALinear")
        with kernels.use_kernel_mapping(layer_mapping(folder)):
            kernels.kernelize(mapped, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
        return plain, mapped

    linear = nn.Linear(width, width).requires_grad_(False)
    layer, mapped = layers(lambda: nk.MergedLoRALinear(linear, bank, lam))
    plain, under_plain = layers(lambda: Plain(linear, bank, lam))
    installed = once(lambda: nk.merged_lora(z, bank, lam, base), (z, lam, base))
    return {
        "merged_lora": {
            "build": once(lambda: kernel.merged_lora(z, own, lam, base), (z, lam, base)),
            "installed, reference": under("reference", installed),
            "installed, auto": installed,
        },
        "layer": {
            "build": once(lambda: mapped(z), (z, lam)),
            "installed, reference": under("reference", once(lambda: layer(z), (z, lam))),
            "installed, auto": once(lambda: layer(z), (z, lam)),
        },
        "plain": {"build": once(lambda: under_plain(z), (z, lam)), "plain": once(lambda: plain(z), (z, lam))},
    }


def difference(found: Any, expected: Any) -> float:
    """Relative, the largest over outputs or gradients."""
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for hf_kernels.jsonl")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--imports", type=int, default=5, help="processes per row")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    import kernels

    rows = [environment(threads=1, tokens=TOKENS, ranks=RANKS, kernels=kernels.__version__)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary) / "kernel", build_layout())
        for what in IMPORTS:
            taken = seconds_to_import(what, folder, arguments.imports)
            rows.append({"op": "import", "what": what, "seconds": statistics.median(taken), "least": min(taken)})
            print(f"import {what:42} {1e3 * rows[-1]['seconds']:9.1f} ms", flush=True)
        kernel = kernels.get_local_kernel(folder)
        for width in WIDTHS:
            for grad in (False, True):
                for kind, calls in calls_of(kernel, folder, width, grad).items():
                    times = interleaved(calls, arguments.rounds)
                    own, found = times["build"], calls["build"]()
                    for name, seconds in times.items():
                        rows.append(
                            {
                                "op": "call",
                                "kind": kind,
                                "contender": name,
                                "width": width,
                                "backward": grad,
                                "seconds": statistics.median(seconds),
                                "ratio": statistics.median(a / b for a, b in zip(seconds, own, strict=True)),
                                "difference": difference(found, calls[name]()),
                            }
                        )
                        row = rows[-1]
                        what = f"{kind}, {'forward and backward' if grad else 'forward'}, {width}"
                        print(
                            f"{what:40} {name:21} {1e6 * row['seconds']:9.1f} us {row['ratio']:6.2f}x "
                            f"{row['difference']:8.1e}",
                            flush=True,
                        )
    if arguments.out:
        write_rows(arguments.out / "hf_kernels.jsonl", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

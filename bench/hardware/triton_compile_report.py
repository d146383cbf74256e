"""Compile the Triton kernel for GPUs that are not here and say what the compiler made of it.

    python -m bench.hardware.triton_compile_report [--quick] [--arch 80 90 100] [--variants] [--json]

Needs Triton (3.6 to 3.9) and no GPU. Every configuration that the formula gives for the grid below is compiled in both
directions with everything switched on, and read back from the machine code: registers, spills, shared memory, matrix
instructions, asynchronous copies and plain loads. Exits with 1 if a row spills, asks for more shared memory than the
GPU has or than configs.py says, or lacks matrix instructions.

With --variants it is what tune.py times beside the formula's choice for the layers of the benchmark, each distinct
one once: about ten minutes of a core per architecture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Compiled and not interpreted, whatever the caller tests with: settled where the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsc_kernels.triton.columns import columns
from nsc_kernels.triton.configs import SHARED, SMALLEST_SHARED, Config, Machine, Problem, bucket, choose, shared_bytes
from nsc_kernels.triton.kernels import merged_lora_kernel
from nsc_kernels.verified_hardware import triton_source

from .candidates import MOST, candidates
from .triton_buffers import overwritten

# Processor counts of the A100, RTX 3090, RTX 4090, H100/H200, B200 and RTX 5090: they decide between the schedules.
MACHINES = {
    80: Machine("sm_80", 80, 108, SHARED[80]),
    86: Machine("sm_86", 86, 82, SHARED[86]),
    89: Machine("sm_89", 89, 128, SHARED[89]),
    90: Machine("sm_90", 90, 132, SHARED[90]),
    100: Machine("sm_100", 100, 148, SHARED[100]),
    120: Machine("sm_120", 120, 170, SMALLEST_SHARED),
}
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05"}  # instructions; mma elsewhere
# T, d and R of the layers of the benchmark.
LAYERS = [(6304, 768, 320), *((T, 4096, 96) for T in (256, 640, 1536, 3840)), (16384, 4096, 128), (16384, 4096, 16)]
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = ("x", "w_in", "w_out", "base", "out", "u", "z", "c")
FLOATS = ("lam", "quad", "sqnorm", "dlam", "work")
INTS = ("owner", "counters")
UNALIGNED = ("T", "K", "parts_at")
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


class Case(NamedTuple):
    """One compilation. ``ranks``: "equal" (adapters of rank 16) or "unequal" (groups of one column)."""

    arch: int
    backward: bool
    T: int
    d: int
    R: int
    dtype: str
    precision: str
    ranks: str = "equal"

    @property
    def problem(self) -> Problem:
        return Problem(self.T, self.d, self.d, self.R, self.mode, self.backward)

    @property
    def mode(self) -> str:
        return self.precision if self.dtype == "fp32" else "half"


def signature(case: Case, config: Config) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[Any, Any]]:
    """Types, constants and alignments as a call with everything switched on gives them."""
    offsets = tuple(range(0, case.R + 1, 16)) if case.ranks == "equal" else (0, 3, case.R)
    layout = columns(offsets, config.chunk)
    sliced = config.slices > 0
    absent = {
        "z": not case.backward,
        "dlam": not case.backward,
        "owner": layout.uniform,
        "work": not (sliced or case.backward),
        "c": not sliced,
        "counters": not (sliced or case.backward),
    }
    constants: dict[str, Any] = {
        "BACKWARD": case.backward,
        "PER_ROW": False,
        "UNIFORM": layout.uniform,
        "N": layout.chunks,
        "C": layout.chunk,
        "G": layout.group,
        "BT": config.block_t,
        "BK": config.block_k,
        "BN": config.block_n,
        "SLICES": config.slices,
        "OUT_SLICES": config.out_slices,
        "ROWS": config.rows,
        "PRECISION": case.precision,
        "EXPAND_STAGES": config.expand_stages,
        "EARLY": config.early,
        "WARPGROUPS": case.mode == "half" and case.arch // 10 == 9,
    }
    constants |= {name: None for name, missing in absent.items() if missing}
    types: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(merged_lora_kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            constexprs[(index,)] = constants[name]
            continue
        groups = ((POINTERS, TYPES[case.dtype]), (FLOATS, "*fp32"), (INTS, "*i32"))
        types[name] = next((kind for names, kind in groups if name in names), "i32")
        if name not in UNALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constexprs, attributes


def compile_case(case: Case, config: Config) -> dict[str, Any]:
    """Compile one case and read its machine code."""
    types, constexprs, attributes = signature(case, config)
    source = ASTSource(fn=merged_lora_kernel, signature=types, constexprs=constexprs, attrs=attributes)
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _disassemble("-res-usage", file.name)
        code = _disassemble("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in the disassembler's output: {usage[:200]}")
    machine = MACHINES[case.arch]
    return {
        "kernel": "backward" if case.backward else "forward",
        "arch": f"sm_{case.arch}",
        "T": case.T,
        "d": case.d,
        "R": case.R,
        "ranks": case.ranks,
        "dtype": case.dtype,
        "precision": case.precision,
        "config": vars(config),
        "regs": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "shared_limit": machine.shared,
        "shared_estimate": shared_bytes(machine, case.problem, config),
        "mma": len(re.findall(r"\bHMMA\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "tcgen05": len(re.findall(r"\bUTC\w*MMA\b", code)),
        "cp_async": len(re.findall(r"\bLDGSTS\b", code)),
        "ldg": len(re.findall(r"\bLDG\b", code)),
        "tma": len(re.findall(r"\bUTMALDG\b", code)),
        "overwritten": overwritten(compiled.asm["ttgir"]),
        "seconds": round(seconds, 2),
        "triton": triton.__version__,
        "source": triton_source(),
    }


def _disassemble(option: str, path: str) -> str:
    return subprocess.run([str(DISASSEMBLER), option, path], capture_output=True, text=True, check=True).stdout


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spill instructions, {row['stack']} bytes of stack")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, limit {row['shared_limit']}")
    if row["shared"] > row["shared_estimate"]:
        found.append(f"{row['shared']} bytes of shared memory, estimated {row['shared_estimate']}")
    if row["overwritten"]:
        found.append(f"copies into what a product still reads: {', '.join(row['overwritten'])}")
    if row["precision"] != "ieee" or row["dtype"] != "fp32":
        wanted = MATRIX.get(row["arch"], "mma")
        # float32 products in three TF32 parts and tiles of 32 tokens may stay on mma.sync on every architecture.
        small = row["dtype"] == "fp32" or row["config"]["block_t"] < 64
        if not row[wanted] and not (small and row["mma"]):
            found.append(f"no {wanted}")
    return found


def grid(archs: list[int], quick: bool) -> Iterator[Case]:
    """The cases: every tile of the formula, both schedules, both directions."""
    for arch, backward in itertools.product(archs, (False, True)):
        if quick:
            for T, R in ((256, 96), (16384, 96), (8192, 512)):
                yield Case(arch, backward, T, 4096, R, "bf16", "ieee")
            continue
        for T, R in itertools.product((256, 2048, 8192, 65536), (16, 96, 256, 320, 512)):
            yield Case(arch, backward, T, 4096, R, "bf16", "ieee")
        for T, R in ((256, 20), (8192, 20), (65536, 128), (8192, 512)):
            yield Case(arch, backward, T, 4096, R, "bf16", "ieee", "unequal")
        for T, R in itertools.product((256, 65536), (16, 128, 512)):
            yield Case(arch, backward, T, 4096, R, "fp32", "ieee")
            if R <= 128:
                yield Case(arch, backward, T, 4096, R, "fp32", "tf32x3")
        yield Case(arch, backward, 8192, 4096, 96, "fp16", "ieee")


def layers(archs: list[int], quick: bool) -> Iterator[Case]:
    """The layers of the benchmark, by what tells their candidates apart."""
    for arch, backward in itertools.product(archs, (False, True)):
        for T, d, R in [(256, 4096, 96)] if quick else LAYERS:
            yield Case(arch, backward, T, d, R, "bf16", "ieee")


def rows(cases: Iterator[Case], variants: int = 0) -> Iterator[dict[str, Any]]:
    """A row per distinct compilation: the chosen configuration, or the first ``variants`` candidates beside it."""
    seen = set()
    for case in cases:
        problem, machine = case.problem._replace(T=bucket(case.T)), MACHINES[case.arch]
        config = choose(machine, problem)
        if config is None:
            raise RuntimeError(f"no configuration for {case}")
        wanted = list(candidates(machine, problem, config).values())[:variants] if variants else [config]
        for config in wanted:
            key = (config, case._replace(T=0, d=0))
            if key not in seen:
                seen.add(key)
                row = compile_case(case, config)
                yield row | {"faults": faults(row)}


TABLE = ("kernel", "arch", "dtype", "precision", "ranks", "R", "T", "regs", "spills", "shared")
INSTRUCTIONS = ("mma", "wgmma", "tcgen05", "cp_async", "ldg", "tma")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(MACHINES))
    parser.add_argument("--quick", action="store_true", help="a few cases per architecture, about a minute")
    parser.add_argument("--variants", action="store_true", help="what tune.py would time, not what is chosen")
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    args = parser.parse_args()
    found = []
    if not args.json:
        print(f"Triton {triton.__version__}, kernel source {triton_source()[:12]}")
        print("  ".join(f"{name:>9}" for name in (*TABLE, *INSTRUCTIONS)) + "  config")
    if args.variants:
        found_rows = rows(layers(args.arch, args.quick), 2 if args.quick else MOST)
    else:
        found_rows = rows(grid(args.arch, args.quick))
    for row in found_rows:
        found.append(row)
        if not args.json:
            line = "  ".join(f"{row[name]!s:>9}" for name in (*TABLE, *INSTRUCTIONS))
            config = "/".join(str(value) for value in row["config"].values())
            print(line, f" {config}", "  <- " + "; ".join(row["faults"]) if row["faults"] else "", flush=True)
    if args.json:
        print(json.dumps(found))
    else:
        faulty = sum(bool(row["faults"]) for row in found)
        print(f"{len(found)} compilations, {faulty} with faults; config is {'/'.join(f.name for f in fields(Config))}")
    return int(any(row["faults"] for row in found))


if __name__ == "__main__":
    sys.exit(main())

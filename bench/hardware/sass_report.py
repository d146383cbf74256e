"""What is in the machine code of libnsc_cuda: registers, spills, matrix, copy and cluster instructions per kernel.

    python -m bench.hardware.sass_report [LIBRARY] [--json]

Needs no GPU and no CUDA toolkit: the disassembler ships with Triton. Exits with 1 if a kernel spills to local memory,
lacks matrix, asynchronous copy or cluster instructions, or had fences added to its matrix instructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "nsc_kernels" / "lib" / "libnsc_cuda.so"
# Mangled: element, padded ranks, tokens per tile, backward.
NAME = re.compile(r"merged_lora_(?P<family>\w*?)kernelI\w*?\d(?P<element>Bf16|F16)ELi(\d+)ELi(\d+)ELb([01])E")
# Behind the address and, if there is one, the predicate.
OPCODE = re.compile(r"\n\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)")
INSTRUCTIONS = {
    "mma": r"HMMA",
    "wgmma": r"HGMMA",
    "fences": r"WARPGROUP\.ARRIVE",
    "waits": r"WARPGROUP\.DEPBAR",
    "cp_async": r"LDGSTS",
    "tma": r"UTMALDG",
    "tma_store": r"UTMASTG",
    "cluster": r"UCGABAR_\w+",
    "ldmatrix": r"LDSM",
    "local": r"(?:LDL|STL)",
}


def disassembler() -> Path:
    """cuobjdump as Triton ships it."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("triton is not installed: its wheel holds the disassembler")
    return Path(next(iter(spec.submodule_search_locations))) / "backends" / "nvidia" / "bin" / "cuobjdump"


def _dump(option: str, library: Path) -> str:
    command = [str(disassembler()), option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(library: Path) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack by mangled name."""
    found = re.finditer(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+)", _dump("-res-usage", library))
    return {match[1]: {"regs": int(match[2]), "stack": int(match[3])} for match in found}


def rows(library: Path) -> list[dict[str, Any]]:
    """One row per kernel and architecture, in the order of element, direction, tokens and ranks."""
    usage = _usage(library)
    found = []
    for section in re.split(r"\n\s+code for ", _dump("-sass", library))[1:]:
        arch = section.split(None, 1)[0]
        for body in re.split(r"\n\s+Function : ", section)[1:]:
            name, code = body.split(None, 1)
            match = NAME.search(name)
            if match is None:
                continue
            opcodes = Counter(OPCODE.findall(code))
            row: dict[str, Any] = {
                "kernel": "backward" if match[5] == "1" else "forward",
                "family": match["family"].rstrip("_") or "mma",
                "element": match["element"].lower(),
                "ranks": int(match[3]),
                "tokens": int(match[4]),
                "arch": arch,
                **usage[name],
                **{
                    key: sum(times for opcode, times in opcodes.items() if re.match(rf"{word}\b", opcode))
                    for key, word in INSTRUCTIONS.items()
                },
            }
            found.append(row | {"faults": faults(row)})
    return sorted(found, key=lambda r: (r["arch"], r["family"], r["element"], r["kernel"], r["tokens"], r["ranks"]))


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    if row["local"] or row["stack"]:
        found.append(f"{row['local']} accesses to local memory, {row['stack']} bytes of stack")
    wanted = {"mma": ("mma", "cp_async"), "wgmma": ("wgmma", "tma", "tma_store")}[row["family"]]
    found += [f"no {name}" for name in (*wanted, "cluster") if not row[name]]
    if row["fences"] > row["waits"]:
        # The source has one before each wait; the assembler adds others where it finds accumulators written after it.
        found.append(f"{row['fences']} fences of matrix instructions for {row['waits']} waits")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY)
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    args = parser.parse_args()
    if not args.library.is_file():
        print(f"{args.library} is not there: build with NSC_BUILD_CUDA=1", file=sys.stderr)
        return 2
    found = rows(args.library)
    if args.json:
        print(json.dumps(found))
    else:
        columns = [key for key in found[0] if key != "faults"] if found else []
        print("  ".join(f"{name:>8}" for name in columns))
        for row in found:
            line = "  ".join(f"{row[name]!s:>8}" for name in columns)
            print(line + ("  <- " + "; ".join(row["faults"]) if row["faults"] else ""))
        print(f"{len(found)} kernels, {sum(bool(row['faults']) for row in found)} with faults")
    return int(not found or any(row["faults"] for row in found))


if __name__ == "__main__":
    sys.exit(main())

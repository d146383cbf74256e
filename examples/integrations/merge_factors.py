"""Merge adapters without their model: PEFT folders in, one safetensors file of merged factors or matrices out.

    python examples/integrations/merge_factors.py french=adapters/french legal=adapters/legal --out merged.safetensors
    ... --method knots_ties scale=0.3 density=0.2            # any method that needs no data, with its options
    ... --rank 16                                            # factors of that rank, whatever the method gives
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

import nsc_merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="TASK=FOLDER")
    parser.add_argument("--method", nargs="+", default=["task_arithmetic"], metavar=("NAME", "OPTION=VALUE"))
    parser.add_argument("--rank", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folders = dict(one.split("=", 1) for one in given.adapters)
    method, *pairs = given.method
    options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
    tasks = {task: nsc_merge.load_adapter(folder, task).factors for task, folder in folders.items()}
    tensors = {}
    for path, merged in nsc_merge.merge_factors(tasks, method, rank=given.rank, **options):
        if merged.dense is not None:
            tensors[f"{path}.delta"] = merged.dense.contiguous()
        else:
            tensors[f"{path}.A"], tensors[f"{path}.B"] = merged.A.contiguous(), merged.B.contiguous()
    partial = given.out.with_name(given.out.name + ".partial")
    save_file(tensors, partial)
    partial.replace(given.out)
    print(f"{given.out}: {len(tensors)} tensors by {method}")


if __name__ == "__main__":
    main()

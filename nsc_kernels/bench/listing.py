"""What can be measured, and by whom: contenders and their groups, models and their layers.

    python -m nsc_kernels.bench list                     on the device at hand
    python -m nsc_kernels.bench list --contender my_kernel.py --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from .problem import DTYPES
from .registry import LINEAR, OPERATOR, Contender, load, registered
from .shapes import MODELS, Shape


def available(one: Contender, on: torch.device, shape: Shape) -> dict[str, str | None]:
    """Why not, per dtype."""
    return {
        name: one.unavailable(on, dtype, shape) if one.unavailable is not None else None
        for name, dtype in DTYPES.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nsc_kernels.bench list", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contender", action="append", default=[], metavar="FILE.py|MODULE[:NAME]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        for text in arguments.contender:
            load(text)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    on, shape = torch.device(arguments.device), Shape("llama3-8b.q", 256, 4096, 4096, 6, 16)
    found: list[dict[str, Any]] = [
        {
            "of": of,
            "name": one.name,
            "group": one.group,
            "stats": one.stats,
            "about": one.about,
            "why_not": available(one, on, shape),
        }
        for of in (OPERATOR, LINEAR)
        for one in registered(of)
    ]
    if arguments.json:
        print(json.dumps({"contenders": found, "models": MODELS}))
        return 0
    for of in (OPERATOR, LINEAR):
        print(f"\n{of} on {on.type}:")
        for row in found:
            if row["of"] != of or row["group"] == "variant":
                continue
            why = set(row["why_not"].values())
            reason = "" if None in why else f"not here: {why.pop()}"
            print(f"  {row['name']:<24}{row['group']:<10}{'' if row['stats'] else 'no statistics  '}{reason}")
    variants = [str(row["name"]) for row in found if row["group"] == "variant"]
    print(f"\nvariants of this package's GPU kernels (--contenders fused,variant): {len(variants)}, as {variants[0]}")
    print("\nlayers, d_in x d_out:")
    for model, layers in MODELS.items():
        print(f"  {model:<18}" + "  ".join(f"{name} {d_in}x{d_out}" for name, (d_in, d_out) in layers.items()))
    return 0

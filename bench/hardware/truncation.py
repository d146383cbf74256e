"""How this GPU's matrix unit rounds, and what the criterion makes of it.

    python -m bench.hardware.truncation --out truncation.jsonl

First the unit alone: 1 + 15 x 2^-e in one product of 16 columns, for e = 24 .. 27. Rounded to nearest, or cut off after
how many more bits? Then the error of quad on two layers, by eager float32, by cuBLAS on tensor cores and by the Triton
kernel, each over the bound of nsc_kernels/verify/criterion.py. If cuBLAS, which nobody doubts, is far below it and a
faulty kernel (tests/cuda/test_cuda_criterion.py: 18 times and more) far above, the criterion decides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsc_kernels import reference
from nsc_kernels.bench.measuring import Rows, arguments, own_stream
from nsc_kernels.contract import ForwardCall
from nsc_kernels.triton import launch
from nsc_kernels.verify.criterion import judge_forward
from nsc_kernels.verify.problems import problem

from .. import from_tests


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w^T`` of 16-bit numbers in float32, as cuBLAS takes it; on a CPU, where there is no such call, exactly."""
    return torch.mm(x, w.t(), out_dtype=torch.float32) if x.is_cuda else (x.double() @ w.double().t()).float()


def unit(on: torch.device) -> Iterator[dict[str, Any]]:
    for e in range(24, 28):
        x = torch.full((16, 16), 2.0**-e, device=on, dtype=torch.bfloat16)
        x[:, 0] = 1
        found = product(x, torch.ones_like(x))[0, 0].double().item()
        places, exact = (found - 1) * 2**23, 15 * 2.0 ** (23 - e)
        yield {"what": "unit", "e": e, "found": places, "exact": exact}


def layers(on: torch.device, dry_run: bool) -> Iterator[dict[str, Any]]:
    for T, d, K in ((50, 64, 2),) if dry_run else ((16384, 4096, 6), (6304, 768, 20)):
        p = problem(T, d, d, (16,) * K, torch.bfloat16, on)
        inputs = (p.z, p.A, p.Bt, p.offsets, p.lam, p.base)
        sums = {"eager float32": reference.shrink(p.z, p.A), "cuBLAS, tensor cores": product(p.z, p.A)}
        quads: dict[str, Tensor | None] = {name: reference.gather(u * u, p.offsets) for name, u in sums.items()}
        quads["triton"] = launch.forward(ForwardCall(*inputs, True, False))[1]
        for name, quad in quads.items():
            error, bound = judge_forward((None, quad, None, None), *inputs)["quad"]
            yield {"what": "quad", "T": T, "d": d, "K": K, "by": name, "error": error, "bound": bound}


def main() -> int:
    args = arguments(__doc__).parse_args()
    on, rows = from_tests.device(args.dry_run), Rows(args.out)
    with own_stream(on):
        for row in unit(on):
            rows.write(row | {"dry_run": args.dry_run})
            print(f"1 + 15 x 2^-{row['e']}: {row['found']:g} units in the last place, exactly {row['exact']:g}")
        for row in layers(on, args.dry_run):
            rows.write(row | {"dry_run": args.dry_run})
            print("quad, T={T} d={d} K={K}, {by}: error {error:.1e}, bound {bound:.1e}".format(**row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

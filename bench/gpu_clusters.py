"""Every variant and cluster size of the CUDA C++ kernel on the shapes of the benchmark, to set its formula by.

    python bench/gpu_clusters.py --out clusters.jsonl [--seconds 120]

Times CUDA graphs over a rotation of inputs, forward and backward, with everything switched on. Rows with ``chosen``
are what the formula in csrc/cuda/geometry.h takes; the printed line compares it with the best. A size that the device
cannot run leaves a row with the error. Does nothing where the cuda backend is not available.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from torch import Tensor

import nsc_kernels as nk
from gpu_bench import SHAPES, Data, Shape
from gpu_common import Rows, arguments, device
from gpu_tune import timed
from nsc_kernels.backends import cuda

ALL = [*cuda.VARIANTS, *cuda.WARPGROUP_VARIANTS]
CHOSEN = (cuda.AUTOMATIC, 0)


def call(data: Data, backward: bool, u: Tensor, variant: int, cluster: int) -> Any:
    bank, z, lam = data.bank, data.z.detach(), data.lam.detach()
    how = {"variant": variant, "cluster": cluster}
    factors = (bank.A, bank.Bt, bank.offsets, lam)
    if not backward:
        return lambda: cuda.forward(z, *factors, data.base, True, True, **how)
    return lambda: cuda.backward(*data.grads, u, z, *factors, None, True, True, **how)


def name_of(variant: int) -> str:
    if variant == cuda.AUTOMATIC:
        return "the formula"
    family = "mma" if variant < len(cuda.VARIANTS) else "wgmma"
    return "{} {} x {}".format(family, *ALL[variant])


def sweep(shape: Shape, rows: Rows, samples: int) -> None:
    on = device(False)
    sets = [Data(shape, on, seed) for seed in range(2 if shape.T > 4096 else 8)]
    saved = [
        cuda.forward(d.z.detach(), d.bank.A, d.bank.Bt, d.bank.offsets, d.lam.detach(), None, False, True)[3]
        for d in sets
    ]
    for backward in (False, True):
        times: dict[tuple[int, int], float] = {}
        for how in [CHOSEN, *itertools.product(cuda.variants_of(shape.K * shape.r), (1, 2, 4, 8, 16))]:
            row = {
                **shape._asdict(),
                "backend": "cuda",
                "backward": backward,
                "chosen": how == CHOSEN,
                "cluster": how[1],
            }
            row["variant"] = name_of(how[0])
            try:
                calls = [call(d, backward, u, *how) for d, u in zip(sets, saved, strict=True)]
                times[how] = timed(calls, on, samples)
            except RuntimeError as error:
                rows.write(row | {"error": str(error)})
                continue
            rows.write(row | {"us_p50": times[how]})
        best = min(times, key=lambda how: times[how])
        name = name_of(best[0]) if best == CHOSEN else f"{name_of(best[0])} in clusters of {best[1]}"
        direction = "backward" if backward else "forward"
        print(
            f"{shape.name} T={shape.T} {direction}: formula {times[CHOSEN]:.1f} us, best {times[best]:.1f} us, {name}"
        )


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="start no new shape after this long")
    args = parser.parse_args()
    rows = Rows(args.out)
    reason = nk.available_backends()["cuda"]
    if args.dry_run or reason is not True:
        print(f"nothing to measure: {'a dry run' if args.dry_run else reason}")
        return 0
    start = time.monotonic()
    for shape in SHAPES:
        if time.monotonic() - start < args.seconds:
            sweep(shape, rows, 15)
    return 0


if __name__ == "__main__":
    sys.exit(main())

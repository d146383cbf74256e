"""How many kernels one forward and one backward launch, as the profiler sees them.

python bench/gpu_launches.py --out launches.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import nsc_kernels as nk
from gpu_bench import SHAPES, Data, Shape
from gpu_common import Rows, arguments, device, synchronize


def launched(run: Callable[[], Any], on: torch.device) -> list[str]:
    """Names of the kernels, copies and fills on the device's timeline during one warm call."""
    for _ in range(3):
        run()
    synchronize(on)
    activities = [ProfilerActivity.CUDA] if on.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        run()
        synchronize(on)
    return [event.name for event in found.events() if event.device_type is torch.autograd.DeviceType.CUDA]


def main() -> int:
    args = arguments(__doc__).parse_args()
    on = device(args.dry_run)
    rows = Rows(args.out)
    several = 0
    shapes = [Shape("dry run", 5, 24, 40, 2, 4)] if args.dry_run else [s for s in SHAPES if s.T in (256, 6304, 16384)]
    for shape in shapes:
        for name in ("triton", "cuda"):
            if nk.available_backends()[name] is not True:
                continue
            data = Data(shape, on, seed=0)
            with nk.use_backend(name):
                outputs = data.fused()
                runs = {"forward": data.fused, "backward": lambda d=data, o=outputs: d.backward(o)}
                for direction, run in runs.items():
                    kernels = launched(run, on)
                    several += len(kernels) != 1
                    rows.write(
                        {
                            "backend": name,
                            "direction": direction,
                            **shape._asdict(),
                            "launches": len(kernels),
                            "kernels": kernels,
                            "dry_run": args.dry_run,
                        }
                    )
                    print(f"{name} {direction} {shape.name} T={shape.T}: {len(kernels)} launches {kernels}")
    return 0 if args.dry_run else int(several > 0 or not rows.count)


if __name__ == "__main__":
    sys.exit(main())

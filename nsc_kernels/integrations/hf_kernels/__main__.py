"""``python -m nsc_kernels.integrations.hf_kernels OUT``: this package as a kernel for Hugging Face ``kernels``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .layout import VARIANT, build_layout, source_layout, write


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nsc_kernels.integrations.hf_kernels",
        description="Write the Triton and Python kernels as a folder that kernels.get_local_kernel loads, on any "
        "device and without an installation.",
        epilog="examples: python -m nsc_kernels.integrations.hf_kernels nsc-kernel; then, in Python, "
        'kernels.get_local_kernel(Path("nsc-kernel"))',
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder: a new one, or one that this command wrote")
    parser.add_argument(
        "--source",
        action="store_true",
        help="write the sources for kernel-builder (build.toml, flake.nix, torch-ext) in place of a build",
    )
    arguments = parser.parse_args(argv)
    files = source_layout() if arguments.source else build_layout()
    try:
        out = write(arguments.out, files)
    except OSError as error:
        parser.error(str(error))
    if arguments.source:
        print(f"{out}: {len(files)} files for kernel-builder")
        return 0
    name = json.loads(files[f"{VARIANT}/metadata.json"])["id"]
    print(f"{out}: {len(files)} files, operators in torch.ops.{name}\nkernels.get_local_kernel(Path({str(out)!r}))")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

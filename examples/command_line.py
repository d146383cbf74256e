"""What the examples' command lines share: a model, adapters and files of inputs, each named, or a small example."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

import nsc_merge


def pairs(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def local(source: str) -> str:
    return source if Path(source).is_dir() else snapshot_download(source)


def run(
    description: str | None,
    small_example: Callable[[Path], tuple],
    from_hub: Callable[[argparse.Namespace], tuple],
    *,
    inputs: str,
    metavar: str,
    steps: int,
    out: str,
) -> None:
    """Merge what the command line names, or the small example if it names no model.

    Args:
        inputs: the option that gives every adapter its inputs.
        steps: of the merge of a named model.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id")
    parser.add_argument("adapters", nargs="*", metavar="NAME=ADAPTER")
    parser.add_argument(inputs, nargs="+", default=[], metavar=metavar)
    parser.add_argument("--steps", type=int, help=f"default: {steps}, or 10 for the small example")
    parser.add_argument("--out", default=out)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, adapters, batches = from_hub(arguments) if arguments.model else small_example(Path(folder))
        steps = arguments.steps or (steps if arguments.model else 10)
        result = nsc_merge.merge(model, adapters, batches, steps=steps)
        print(f"null-space ratio {result.objective['before']:.4f} -> {result.objective['after']:.4f}")
        print(f"one adapter with everything merged: {result.save(arguments.out, format='lora')}")

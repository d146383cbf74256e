"""The ``pipeline`` command: its texts and parser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nsc_merge.commands.pipeline.given import size_of
from nsc_merge.commands.terminal import positive, seed

_PIPELINE = """\
Merges LoRA of a pipeline of diffusers (Stable Diffusion, SDXL, Flux, Wan, ...) into one adapter, in every model of the
pipeline that holds some, and draws the same prompts by the base, each adapter and the merge.

BASE is a folder or hub id of a pipeline. NAME=PATH:WEIGHT is an adapter: a .safetensors file as diffusers, kohya or
ComfyUI write it, a folder or owner/name on the hub with one, or owner/name/file.safetensors there (@revision behind
it), and the weight that it is used with (default: 1). NAME.transformer_2=PATH:WEIGHT is what the same adapter has for
the second transformer of Wan 2.2 ("low noise"), if that is no folder transformer_2 beside the first.

examples:
  nsc-merge pipeline sdxl ink=ink.safetensors:0.7 toy=owner/toy-lora --out both
  nsc-merge pipeline sdxl ink=ink.safetensors toy=toy.safetensors --method ties --rank 32 --out both
  nsc-merge pipeline flux ink=ink toy=toy --method nsc --prompts prompts.yaml --out both \\
      --images "a lighthouse, ink drawing" "a toy cat" --dtype bfloat16
  nsc-merge pipeline wan22 fast=high.safetensors fast.transformer_2=low.safetensors:0.8 --out both --size 1280x720
  nsc-merge pipeline kontext ink=ink toy=toy --out both --images "in ink" --argument image=cat.png

--prompts is for methods that need data: what the pipeline calls its models with is recorded while it draws them by
each adapter alone.

  ink: ["a lighthouse, ink drawing", "a cat, ink drawing"]           # prompts.yaml: adapter -> prompts, or
  toy: [{prompt: a toy cat, image: cat.png, strength: 0.6}]           # arguments of the pipeline

Written are pytorch_lora_weights.safetensors for pipe.load_lora_weights, merge.json (what was merged, coefficients and
hashes), README.md, and images.png. Weights are read from safetensors alone.
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    command = commands.add_parser(
        "pipeline",
        help="merge LoRA of a pipeline of diffusers, and draw by it",
        description=_PIPELINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("base", metavar="BASE", help="folder or hub id of a pipeline")
    command.add_argument("adapters", nargs="+", metavar="NAME=PATH:WEIGHT", help="adapters to merge")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    command.add_argument("--method", default="task_arithmetic", help="as nsc-merge methods lists them (default: "
                         "task_arithmetic, the sum by the weights)")  # fmt: skip
    command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method")
    command.add_argument("--rank", type=positive, metavar="R", help="truncate the merge to this rank")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="YAML or JSON: prompts of each adapter")
    command.add_argument("--calls", type=positive, default=8, metavar="N", help="of every drawing kept (default: 8)")
    command.add_argument("--images", nargs="+", default=[], metavar="PROMPT", help="draw these, side by side")
    command.add_argument("--steps", type=positive, metavar="N", help="of denoising (default: the pipeline's)")
    command.add_argument("--size", type=size_of, metavar="N", help="pixels, or WIDTHxHEIGHT (default: the pipeline's)")
    command.add_argument("--argument", action="append", default=[], metavar="KEY=VALUE", help="of the "
                         "pipeline, for all that is drawn: image=cat.png, strength=0.6")  # fmt: skip
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="of noise and draws (default: 0)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the pipeline's weights"
    )
    command.add_argument("--device", default="auto", help="default: auto, the accelerator if there is one")
    command.add_argument("--json", action="store_true", help="print merge.json")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from nsc_merge.commands.pipeline.actions import run

    return run(arguments)

"""What all commands share at a terminal."""

from __future__ import annotations

import argparse
import os
import sys

from nsc_merge.utils.errors import printable

EXAMPLES = """\
examples:
  nsc-merge init adapters/* --base base --data prompts.jsonl     write recipe.yaml, with what was found
  nsc-merge import mergekit.yaml                  write recipe.yaml for a configuration of mergekit
  nsc-merge run recipe.yaml --dry-run             load, check, and estimate time and memory
  nsc-merge run recipe.yaml options.steps=200     merge; methods that take steps go on after Ctrl-C with --resume
  nsc-merge inspect adapters/* --model base --inputs depth.safetensors
  nsc-merge eval evaluation.yaml                  measure merges on labelled data, side by side
  nsc-merge analyse quartiles evaluation.yaml     null-space ratio of every sample against its quality
  nsc-merge export merged --format lora --rank 16 --out merged-16
  nsc-merge pipeline sdxl ink=ink.safetensors:0.7 toy=toy.safetensors --out both --images "a toy cat, ink"
  nsc-merge demo                                  merge six adapters of a small ViT and measure the result
  nsc-merge demo --tasks depth,normal,edge,semseg --out dense
  nsc-merge demo --steps 20 --json > summary.json
  nsc-merge demo --retrain --assets my-assets     train base and adapters anew (15-20 minutes)
  nsc-merge demo --assets my-assets               and merge those

exit status: 0 success, 1 failure (one line says why), 2 wrong usage or recipe, 130 interrupted, 141 output closed
"""


def prepare(*, local: bool) -> None:
    """Quiet libraries; and none may look for anything on the network unless a hub id was given."""
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"
    quieten_libraries()


def quieten_libraries() -> None:
    """Keep transformers' own bars and deprecation notices out of the output."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def log(line: str) -> None:
    """A line on standard error, where it disturbs no output that a program reads."""
    print(printable(line).replace("\n", " "), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Text on standard output, for a person: what its encoding has no form of is shown by its number, as on standard
    error, since what it tells of is done.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def positive(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """The type of an argument that seeds generators of random numbers, in what is made of it too."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    # Ten digits at most: int refuses some thousands in words of its own, and nothing counts so far.
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to 9999999999, found {text!r:.60}")
    return int(text)


def names(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]

"""What all commands share at a terminal."""

from __future__ import annotations

import argparse
import os
import sys


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
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def names(text: str) -> list[str]:
    """The type of an argument that lists names, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]

"""Measures LoRA kernels on the machine at hand, yours beside ours.

    python -m nsc_kernels.bench [operator] ...     the adapters of a layer, the layer's own output being given
    python -m nsc_kernels.bench linear ...         the frozen layer and its adapters
    python -m nsc_kernels.bench step ...           one step of a merge, against the bare model
    python -m nsc_kernels.bench list               contenders, layers, and what is available here
    python -m nsc_kernels.bench table REPORT...    tables of reports, also in Markdown
    python -m nsc_kernels.bench plot REPORT...     pictures of reports
    python -m nsc_kernels.bench compare A B        what changed between two reports

    python -m nsc_kernels.bench --quick --plot     under a minute: a table and a picture

Each says more with --help.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from ..printing import exit_status
from .timing import wait_passively

# Loaded when they are asked for: a step needs transformers, pictures need matplotlib.
COMMANDS = {
    "operator": ("measure", "operator"),
    "linear": ("measure", "linear"),
    "step": ("step.command", "main"),
    "list": ("listing", "main"),
    "table": ("show", "main"),
    "plot": ("plots", "main"),
    "compare": ("compare", "main"),
}
TIMED = ("operator", "linear", "step")


def named(arguments: Sequence[str]) -> str:
    """The command that is meant."""
    return arguments[0] if arguments and not arguments[0].startswith("-") else TIMED[0]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    name = named(arguments)
    if name not in COMMANDS:
        print(f"{name!r} is no command; there are {', '.join(COMMANDS)}. Layers are named by --shapes", file=sys.stderr)
        return 2
    module, function = COMMANDS[name]
    command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(f".{module}", __package__), function)
    return command(arguments[1:] if arguments[:1] == [name] else arguments)


if __name__ == "__main__":
    # Loading torch a second time takes seconds, which a table need not wait for.
    if named(sys.argv[1:]) in TIMED and not {"-h", "--help"}.intersection(sys.argv):
        wait_passively()
    raise SystemExit(exit_status(main))

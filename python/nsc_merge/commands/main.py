"""The ``nsc-merge`` command: its parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsc_merge.commands import (
    analyse,
    completion,
    demo,
    evaluate,
    export,
    importing,
    init,
    inspect,
    methods,
    pipeline,
    run,
)
from nsc_merge.commands.terminal import EXAMPLES
from nsc_merge.utils.atomic_file import no_room
from nsc_merge.utils.errors import printable

_DESCRIPTION = "Merge LoRA adapters into one model without labels (NSC merging, arXiv 2603.26317)."


class _Parser(argparse.ArgumentParser):
    """Those of the commands are of its class, too."""

    def print_help(self, file: Any = None) -> None:
        """Print all of it, or fail: argparse's own passes over a disk that is full."""
        print(self.format_help(), end="", file=file)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="nsc-merge",
        description=_DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in (init, importing, run, inspect, export, pipeline, evaluate, analyse, methods, demo):
        part.add(commands)
    completion.add(commands, parser)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Version(argparse.Action):
    """Prints the version, which is not looked up before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # As it is installed: the package itself would import torch, which takes seconds.
        from importlib.metadata import version

        print(f"nsc-merge {version('nsc-kernels')}")
        parser.exit()


def _flush() -> None:
    # It may have been closed before Python began.
    if sys.stdout is not None:
        sys.stdout.flush()


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes a list of positionals in one place only; overrides may stand among the options.
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    # Idle OpenMP threads spin by default, which makes steps several times slower when other programs want the
    # cores. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.stderr is None:
        # Closed before Python began: what is said there is for nobody, and would be printed among the output.
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    debug = False
    try:
        try:
            arguments = _parsed(argv)
        except SystemExit:
            # Parsing prints the version and help: that a reader has left is to show here, not at the end of Python.
            _flush()
            raise
        debug = arguments.debug
        status = arguments.run(arguments)
        _flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left of it must not be written at the end, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("nsc-merge: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if debug:
            raise
        what = str(error)
        if isinstance(error, OSError) and error.filename is None and no_room(error, Path()):
            # Every file that is written is named where it is.
            what = f"the output cannot be written: {error.strerror}"
        if isinstance(error, UnicodeEncodeError):
            found = ascii(error.object[error.start : error.end])
            what = f"the encoding {error.encoding} has no form of {found:.80}; expected LC_ALL=C.UTF-8"
        # One line, whatever the library that raised it wrote.
        print(f"nsc-merge: error: {' '.join(printable(what).split())}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except ModuleNotFoundError as error:
        if debug:
            raise
        print(f"nsc-merge: error: {error.name} is not installed: pip install 'nsc-kernels[merge]'", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {' '.join(printable(str(error)).split())}"
        print(f"nsc-merge: unexpected error: {what} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

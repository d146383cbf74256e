"""``nsc-merge completion``: a script that completes commands, options and their choices in a shell."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
_EXAMPLES = """examples:
  nsc-merge completion bash > ~/.local/share/bash-completion/completions/nsc-merge
  nsc-merge completion zsh > ~/.zfunc/_nsc-merge      # with fpath+=~/.zfunc before compinit in ~/.zshrc
  source <(nsc-merge completion bash)                 # for this shell alone
"""


def add(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add the command.

    Args:
        whole: the parser of the command line, which is complete once a command is run.
    """
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description="Prints a script that completes commands, options and file names in a shell.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=lambda arguments: _run(whole, arguments.shell))


def _run(whole: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        raise RuntimeError("completion: the script is made by shtab; pip install shtab") from None
    for parser in (whole, *_commands(whole)):
        for action in parser._actions:
            if action.choices is None and action.nargs != 0:
                # Whatever is named there may be a file or a folder.
                vars(action)["complete"] = shtab.FILE
    print(shtab.complete(whole, shell=shell))
    return 0


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands, and of theirs."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found += [one, *_commands(one)]
    return found

"""``python -m nsc_merge.integrations.mergekit CONFIG OUT``: ``mergekit-yaml`` with this library's methods, and LoRA
models from their factors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from nsc_merge.integrations.mergekit import from_factors
from nsc_merge.integrations.mergekit.one_tensor import PREFIX, WEIGHT, OneTensor, methods, misplaced_parameter


def main(argv: Sequence[str] | None = None) -> int:
    """Run mergekit's command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _check_parameters(arguments)
    try:
        with from_factors():
            mergekit_yaml.main(arguments, prog_name="python -m nsc_merge.integrations.mergekit")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _check_parameters(arguments: Sequence[str]) -> None:
    """Refuse parameters that the method does not have, which mergekit looks over."""
    for file in (Path(one) for one in arguments if not one.startswith("-")):
        # mergekit says what is wrong with the file itself.
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        if not isinstance(config, dict) or "merge_method" not in config:
            continue
        for one in map(OneTensor, methods()):
            known = [*one.types, WEIGHT]
            if config["merge_method"] == one.name and (found := misplaced_parameter(config, known)) is not None:
                raise ValueError(
                    f"parameters: expected of {one.name} for all models some of {', '.join(known)}, of one model "
                    f"{WEIGHT}, found {found} (nsc-merge methods explains those of {one.name.removeprefix(PREFIX)})"
                )


def command(argv: Sequence[str] | None = None) -> int:
    """:func:`main` at a terminal: what is refused is said without a traceback, which mergekit's ``-v`` shows."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return main(arguments)
    except (OSError, ValueError, yaml.YAMLError) as error:
        if any(one.startswith("-v") for one in arguments):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command())

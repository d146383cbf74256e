"""What a terminal is told without waiting for a library: help, and the methods; what the others do not wait for."""

from __future__ import annotations

import subprocess
import sys

from nsc_merge.methods import listing

ASKED = (
    ["--help"],
    ["--version"],
    ["completion", "bash"],
    ["methods"],
    ["methods", "--json"],
    *([command, "--help"] for command in ("init", "run", "inspect", "export", "eval", "analyse", "methods", "demo")),
)


def test_the_listing_is_that_of_the_methods():
    assert listing.FILE.read_text(encoding="utf-8") == listing.text(), (
        "a method or a default has changed: write the listing anew with python -m nsc_merge.methods.listing"
    )


def test_nothing_is_imported_for_help_or_the_methods():
    code = f"""if True:
        import sys
        from nsc_merge.commands.main import main
        for arguments in {ASKED!r}:
            try:
                assert main(arguments) == 0, arguments
            except SystemExit as stop:
                assert stop.code in (0, None), arguments
            print("imported", *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("imported")] == ["imported"] * len(ASKED)
    assert "score_blocks='last_quarter'" in done.stdout


def test_torch_s_compiler_and_sharded_tensors_are_not_waited_for():
    code = """if True:
        import sys
        import nsc_merge.analysis, nsc_merge.recipes.schema
        nsc_merge.recipes.schema.schema()
        print(*(name for name in ("torch._dynamo", "torch.distributed.tensor", "sympy") if name in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"

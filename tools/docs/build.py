"""Builds the documentation's site.

    python tools/docs/build.py build/docs      # make docs

Needs no network; neither do its readers. A link that leads nowhere, a docstring that cannot be read and a page that no
page leads to are errors. Exit codes: those of sphinx-build.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import pages  # noqa: E402
from sphinx.cmd.build import main as sphinx_build  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Build the site and return the exit status."""
    parser = argparse.ArgumentParser(description="Builds the documentation's site.")
    parser.add_argument("out", type=Path, help="folder of the site")
    out = parser.parse_args(argv).out.resolve()
    laid_out = out.with_name(f"{out.name}-pages")
    pages.lay_out(laid_out)
    # Modules are imported for their docstrings, and need no cores for that.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # All pages anew: the column at their side is of the home page.
    settings = ["-q", "-E", "-a", "-W", "--keep-going", "-c", str(Path(__file__).parent)]
    return sphinx_build([*settings, str(laid_out), str(out)])


if __name__ == "__main__":
    sys.exit(main())

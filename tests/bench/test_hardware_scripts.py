"""The scripts for machines with a GPU run nowhere else: what they take from the tests and the packages is there."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "bench" / "hardware").glob("[a-z]*.py"))

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(script: Path) -> None:
    before = dict(os.environ)
    importlib.import_module(".".join(script.with_suffix("").parts))
    assert dict(os.environ) == before  # or the other tests of this process would not meet what they were begun with

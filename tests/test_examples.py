"""The example scripts run as they are, on the small models that they make."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import nsc_merge

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "modules"), [("vit", 16), ("llama", 8), ("llava", 8)])
def test_example(name, modules, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    before, after = map(float, capsys.readouterr().out.split("\n")[0].split("ratio ")[1].split(" -> "))
    assert after < before
    merged = nsc_merge.load_adapter(tmp_path / f"merged-{name}", "merged")
    assert len(merged.factors) == modules
    assert {factor.rank for factor in merged.factors.values()} == {16}

"""What is typed wrongly after an example script is said before its model is loaded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "command_line.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a=x", "a=y", "--data", "a=d"], "adapters: task 'a' is named twice; give each a name of its own"),
        (["a=x", "y", "--data", "a=d"], "adapters: expected TASK=FOLDER or the like, found 'y'"),
        (["a=x", "b=y", "--data", "a=d", "b="], "data: expected TASK=FOLDER or the like, found 'b='"),
        (["a=x", "b=y", "--data", "a=d"], "data: expected some of each task, a, b, found that of a"),
    ],
)
def test_tasks_are_named_once_and_have_data(monkeypatch, capsys, words, error):
    spec = importlib.util.spec_from_file_location("command_line", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["vit.py", "base", *words])
    with pytest.raises(SystemExit) as ended:
        module.run("", None, batch_size=1, steps=1, out="out")  # there is no class to load a model of
    assert ended.value.code == 2
    assert error in capsys.readouterr().err

"""What the README shows must run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_the_operator_example_runs() -> None:
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["omega"].shape == (32, 197, 6)
    assert names["z"].grad.shape == names["z"].shape
    assert names["lam"].grad.abs().sum() > 0

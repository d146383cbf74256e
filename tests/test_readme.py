"""What the README shows must run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import nsc_kernels

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_the_operator_example_runs() -> None:
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["omega"].shape == (32, 197, 6)
    assert names["z"].grad.shape == names["z"].shape
    assert names["lam"].grad.abs().sum() > 0


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_it_opens_with_the_commands_that_the_guide_carries_out() -> None:
    block = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[0]
    guide = (README.parent / "docs" / "guides" / "text.md").read_text(encoding="utf-8")
    way = guide[guide.index("## Three commands") : guide.index("## Serving it")]
    carried_out = [shlex.split(code) for code in re.findall(r"```sh\n(.*?)```", way, re.S)]
    shown = [shlex.split(line, comments=True) for line in block.splitlines()]
    # The guide takes fewer steps.
    assert shown == [[word for word in words if not word.startswith("options.")] for words in carried_out]


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_links_lead_somewhere() -> None:
    for file in (README, *README.parent.glob("C*.md"), *(README.parent / "docs" / "guides").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_versions_that_stand_in_two_places_agree() -> None:
    root = README.parent
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited is not None
    assert cited[1] == nsc_kernels.__version__
    hooks = root / ".pre-commit-config.yaml"
    if hooks.exists():
        pinned = re.search(r"^ruff==(.*)$", (root / "constraints.txt").read_text(encoding="utf-8"), re.M)
        assert pinned is not None
        assert f"ruff=={pinned[1]}]" in hooks.read_text(encoding="utf-8")

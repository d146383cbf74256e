"""Every row of docs/architectures.md is what happens: real classes, adapters by PEFT, outputs compared with PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, BEGIN, END, PAGE, outcomes, row

LINES = PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_page_says_what_happens(name: str, tmp_path: Path) -> None:
    assert row(name, outcomes(ARCHITECTURES[name], tmp_path)) in LINES


def test_the_page_lists_all_of_them_and_no_other() -> None:
    rows = LINES[LINES.index(BEGIN) + 3 : LINES.index(END)]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == list(ARCHITECTURES)

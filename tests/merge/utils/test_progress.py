"""What long loops show."""

from __future__ import annotations

import pytest

from nsc_merge.utils.progress import Progress


@pytest.mark.parametrize("show", [None, True])
def test_names_are_shown_as_text_alone(capsys, show):
    with Progress("rows", 1, show) as bar:
        bar.update(row="a\x1b[2Kb\x07")
    shown = capsys.readouterr().err
    assert "a [2Kb" in shown
    assert "\x1b[2K" not in shown
    assert "\x07" not in shown

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


class Written(list):
    """A standard error such as services put in its place to have what is written in their logs."""

    write = list.append

    def flush(self):
        pass


@pytest.mark.parametrize("show", [None, True, False])
def test_a_host_of_python_may_have_no_standard_error_or_one_that_cannot_tell(capsys, monkeypatch, show):
    for host in (None, Written()):
        monkeypatch.setattr("sys.stderr", host)
        with Progress("rows", 1, show) as bar:
            bar.update()
    assert ("rows: " in "".join(host)) == (show is not False)
    assert capsys.readouterr().out == ""

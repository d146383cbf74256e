"""The picture of an evaluation."""

from __future__ import annotations

import matplotlib.figure
import pytest

from nsc_merge.evaluation.plots import draw


@pytest.mark.parametrize(
    ("values", "ends"), [([20.0], "min"), ([200.0], "max"), ([20.0, 200.0], "both"), ([98.0], "neither")]
)
def test_names_are_shown_as_they_are_and_colours_say_what_they_leave_out(tmp_path, monkeypatch, values, ends):
    """A $ begins no formula, which some names would not be; values beyond the colours have arrows."""
    shown, original = [], matplotlib.figure.Figure.savefig

    def savefig(self, *arguments, **options):
        shown.append(self)
        original(self, *arguments, **options)
        # A process that is killed while it draws leaves nothing.
        assert not list(tmp_path.iterdir())

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    named = {r"$\frac$ and $x$": values[0]} | {f"row {number}": value for number, value in enumerate(values[1:])}
    named |= {f"near {number}": 97.0 + number / 10 for number in range(60)}
    document = {
        "tasks": {"a$b": {"metric": "acc", "lower_is_better": False}},
        "seeds": [0],
        "rows": [
            {"row": name, "runs": [{"method": "ties", "normalised": {"a$b": value}, "average": value}]}
            for name, value in named.items()
        ],
    }
    assert draw(document, tmp_path) == [tmp_path / "normalised.png"]
    (figure,) = shown
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == list(named)
    assert not any(label.get_parse_math() for label in labels)
    assert figure.axes[0].images[0].colorbar.extend == ends

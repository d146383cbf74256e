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


def test_means_over_seeds_stand_in_the_picture_and_dashes_where_one_has_none(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *arguments, **options: shown.append(self))
    monkeypatch.setattr("nsc_merge.evaluation.plots.write_picture", lambda figure, path: figure.savefig(path))

    def runs(method, *values):
        return [{"method": method, "normalised": {"x": x, "y": y}, "average": average} for x, y, average in values]

    whole = {"row": "finetuned", "runs": runs("finetuned", (100.0, 100.0, 100.0))}
    merged = {"row": "ties", "runs": runs("ties", (60.0, 98.0, 79.0), (70.0, 99.0, 84.5))}
    broken = {"row": "nsc", "runs": runs("nsc", (90.0, 98.0, 94.0), (90.0, None, None))}
    tasks = {task: {"metric": "acc", "lower_is_better": False} for task in "xy"}
    document = {"tasks": tasks, "seeds": [0, 1], "rows": [whole, merged, broken]}
    assert draw({**document, "rows": [whole]}, tmp_path) == shown == []
    assert draw(document, tmp_path) == [tmp_path / "normalised.png"]
    (figure,) = shown
    axis = figure.axes[0]
    texts = [one.get_text() for one in axis.texts]
    assert texts == ["65.0", "98.5", "81.8", "90.0", "–", "–"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "average"]
    # Colours reach as far as all but the most extreme, 18.25 from 100, and a fifth more; dark ones have light letters.
    assert axis.images[0].get_clim() == pytest.approx((100 - 1.2 * 18.25, 100 + 1.2 * 18.25))
    assert [one.get_color() for one in axis.texts] == ["white", "black", "white", *["black"] * 3]
    assert [one.get_weight() for one in axis.texts] == ["normal", "normal", "bold"] * 2

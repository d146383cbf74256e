"""The table of docs/large_models.md is what the formula gives."""

from __future__ import annotations

from pathlib import Path

import pytest

if not (Path(__file__).resolve().parents[2] / "bench" / "merging" / "large_models.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)

from bench.merging.large_models import PAGE, SHAPES, VOCABULARY, WAYS, page_with, table, work_of


def test_the_page_holds_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page_with(page, table()) == page, "python -m bench.merging.large_models --write puts it there"


@pytest.mark.parametrize(("model", "parameters"), [("8 B", 8.03e9), ("70 B", 70.55e9), ("405 B", 405.85e9)])
def test_the_shapes_are_those_that_are_public(model, parameters):
    """By the number of parameters that the models are published with, norms aside."""
    work = work_of(SHAPES[model], WAYS[0])
    found = (sum(one.weights for one in work.blocks) + work.outside) / 2
    assert found == pytest.approx(parameters, rel=1e-3)
    assert work.outside / 2 == 2 * VOCABULARY * SHAPES[model][0]
